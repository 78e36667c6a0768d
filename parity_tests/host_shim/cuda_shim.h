// CUDA's names on the host, so that `driver.h` runs a kernel of `mx.fast.cuda_kernel`: a warp is a SIMD-group.
#pragma once

#include <cmath>

#include "metal_shim.h"

using __half = half;
using __nv_bfloat16 = bfloat;

#define __device__
#define __global__
#define __grid_constant__
#define __shared__ static

template <typename T>
struct Axes {
  T values[10];
  T operator[](int axis) const { return values[axis]; }
};
using Shape = Axes<int32_t>;
using Strides = Axes<int64_t>;

struct Index3 {
  uint32_t x, y, z;
};
inline Index3 thread_of_block() { return {lockstep::tg.current, 0, 0}; }
inline Index3 index3(const uint32_t* values) { return {values[0], values[1], values[2]}; }
#define threadIdx thread_of_block()
#define blockIdx index3(lockstep::tg.position)
#define gridDim index3(lockstep::tg.groups)

#define __syncthreads() lockstep::barrier(__LINE__)

inline float __shfl_xor_sync(unsigned, float value, int mask, int line = __builtin_LINE()) {
  return metal::simd_shuffle_xor(value, (ushort)mask, line);
}

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
