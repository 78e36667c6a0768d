// CUDA's names on the host, so that `driver.h` runs a kernel in CUDA C++: a warp is a SIMD-group, blocks run in turn.
#pragma once

#include <cmath>

#include "metal_shim.h"

using __half = half;
using __nv_bfloat16 = bfloat;

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct Index3 {
  uint32_t x, y, z;
};
inline Index3 thread_of_block() { return {lockstep::tg.current, 0, 0}; }
inline Index3 index3(const uint32_t* values) { return {values[0], values[1], values[2]}; }
#define threadIdx thread_of_block()
#define blockIdx index3(lockstep::tg.position)
#define gridDim index3(lockstep::tg.groups)

#define __syncthreads() lockstep::barrier(__LINE__)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
inline T __ldcg(const T* source) {
  return *source;
}
template <typename T>
inline void __stcg(T* target, T value) {
  *target = value;
}

inline void __syncwarp(int line = __builtin_LINE()) { metal::simdgroup_barrier(metal::mem_flags::mem_none, line); }

inline float __shfl_xor_sync(unsigned, float value, int mask, int line = __builtin_LINE()) {
  return metal::simd_shuffle_xor(value, (ushort)mask, line);
}

inline float __shfl_sync(unsigned, float value, int source, int line = __builtin_LINE()) {
  struct Slot {
    float in, out;
    int source;
  } slot{value, value, source};
  lockstep::meet(&slot, "__shfl_sync", line, [](void** slots, uint32_t lanes) {
    for (uint32_t i = 0; i < lanes; i++) {
      Slot& own = *(Slot*)slots[i];
      if (own.source < 0 || own.source >= (int)lanes) lockstep::fail("cuda_shim: __shfl_sync reads no lane");
      own.out = ((Slot*)slots[own.source])->in;
    }
  });
  return slot.out;
}

// Bytes of two words, chosen by the four nibbles of `selector`.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t word = 0;
  for (int i = 0; i < 4; i++) word |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return word;
}

// The headers `warp.cuh` and `loads.cuh`.
namespace flux {

constexpr int kWords = 4;

struct alignas(16) Pack {
  uint32_t words[kWords];
};

inline Pack load_once(const void* source) {
  if ((uintptr_t)source % sizeof(Pack)) lockstep::fail("cuda_shim: a load of 16 bytes that are not aligned");
  return *(const Pack*)source;
}

template <typename T>
inline T load_in_order(const T* source) {
  if ((uintptr_t)source % sizeof(T)) lockstep::fail("cuda_shim: a load of 8 or 16 bytes that are not aligned");
  return *source;
}

inline void prefetch(const void* source) { (void)*(const volatile char*)source; }

inline unsigned take_ticket(unsigned* counter, unsigned highest) {
  const unsigned before = *counter;
  *counter = before >= highest ? 0 : before + 1;
  return before;
}

template <typename T>
inline float number_of(uint32_t word, int index) {
  T pair[2];
  std::memcpy(pair, &word, sizeof word);
  return float(pair[index]);
}

// c[16, 8] += a[16, 16] b[16, 8]; which lane holds what is said in warp.cuh.
template <typename T>
inline void multiply_add(
    float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T, int line = __builtin_LINE()) {
  struct Slot {
    float* c;
    uint32_t a[4], b[2];
  } slot{c, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  lockstep::meet(&slot, "multiply_add", line, [](void** slots, uint32_t lanes) {
    if (lanes != lockstep::kLanes) lockstep::fail("cuda_shim: a matrix product in a partial warp");
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const Slot& slot = *(Slot*)slots[lane];
      const int group = lane / 4, first = lane % 4 * 2;
      for (int e = 0; e < 2; e++) {
        for (int i = 0; i < 4; i++) left[group + i % 2 * 8][first + i / 2 * 8 + e] = number_of<T>(slot.a[i], e);
        for (int i = 0; i < 2; i++) right[first + i * 8 + e][group] = number_of<T>(slot.b[i], e);
      }
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float& sum = ((Slot*)slots[lane])->c[i];
        for (int k = 0; k < 16; k++) sum += left[row][k] * right[k][column];
      }
  });
}

}  // namespace flux
