// What the router's kernels write in PTX. The host shim has its own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace flux {

// A load of 8 or 16 bytes past L1, in its place among others: with a `__syncwarp` behind them all are under way at once.
template <typename T>
__device__ inline T load_in_order(const T* source) {
  static_assert(sizeof(T) == 8 || sizeof(T) == 16, "what one instruction loads");
  uint32_t words[sizeof(T) / 4];
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(__cvta_generic_to_global(source)));
  } else {
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(__cvta_generic_to_global(source)));
  }
  T value;
  memcpy(&value, words, sizeof value);
  return value;
}

// Has the line of 128 bytes at `source` fetched into L2, and waits for nothing.
__device__ inline void prefetch(const void* source) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(source)));
}

}  // namespace flux
