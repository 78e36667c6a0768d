// What the decode kernel writes in PTX. The host shim has its own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flux {

constexpr int kWords = 4;  // of a load of 16 bytes, two numbers each

struct alignas(16) Pack {
  uint32_t words[kWords];
};

// 16 bytes that this block reads once.
__device__ inline Pack load_once(const void* source) {
  Pack pack;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
               : "l"(__cvta_generic_to_global(source)));
  return pack;
}

// c[16, 8] += a[16, 16] b[16, 8] of a warp, by mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). With
// g = lane / 4 and t = lane % 4 a lane holds a[g | g + 8, 2 t | 2 t + 8], b[2 t | 2 t + 8, g] and c[g | g + 8, 2 t].
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Counts up, and from `highest` back to 0; the count before. What the block wrote before a barrier in front of this is
// seen by the block of a later ticket behind its barrier.
__device__ inline unsigned take_ticket(unsigned* counter, unsigned highest) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(highest)
               : "memory");
  return before;
}

}  // namespace flux
