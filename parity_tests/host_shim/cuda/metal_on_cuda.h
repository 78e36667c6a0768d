// Metal's names in CUDA C++, so that a GPU of NVIDIA's runs the same kernel text: a SIMD-group is a warp.
//
// For nvcc. Matrix products go through shuffles: right, not fast.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

using uint = unsigned int;
using ushort = unsigned short;
using float16_t = __half;
using bfloat = __nv_bfloat16;
using bfloat16_t = __nv_bfloat16;

#define METAL_FUNC __device__ __forceinline__

struct Int3 {
  int x, y, z;
  __device__ explicit Int3(uint3 u) : x(int(u.x)), y(int(u.y)), z(int(u.z)) {}
};

namespace attribute {
__device__ inline uint thread_index_in_threadgroup() { return threadIdx.x; }
__device__ inline uint thread_index_in_simdgroup() { return threadIdx.x % 32; }
__device__ inline uint simdgroup_index_in_threadgroup() { return threadIdx.x / 32; }
__device__ inline uint3 threadgroup_position_in_grid() { return blockIdx; }
__device__ inline uint3 threadgroups_per_grid() { return make_uint3(gridDim.x, gridDim.y, gridDim.z); }
}  // namespace attribute

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__device__ inline T max(T a, T b) {
  return a < b ? b : a;
}
namespace fast {
__device__ inline float exp2(float x) { return exp2f(x); }
}  // namespace fast

__device__ inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
__device__ inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

__device__ inline float simd_shuffle_xor(float value, ushort mask) { return __shfl_xor_sync(kAllLanes, value, mask); }

__device__ inline float simd_sum(float value) {
  for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

__device__ inline float simd_max(float value) {
  for (int mask = 16; mask; mask /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

template <typename T, int Rows, int Cols>
struct simdgroup_matrix {
  T elements[2];
  __device__ T* thread_elements() { return elements; }
};

// The lane that holds (row, column) and its neighbour: the inverse of Metal's layout.
__device__ inline int matrix_owner(int row, int column) {
  return (row & 4) << 2 | (row & 3) << 1 | (column & 4) << 1 | (column & 2) >> 1;
}

using FloatMatrix = simdgroup_matrix<float, 8, 8>;

__device__ inline void simdgroup_multiply_accumulate(FloatMatrix& d, FloatMatrix a, FloatMatrix b, FloatMatrix c) {
  const int lane = threadIdx.x % 32;
  const int row = ((lane / 4) & 4) + (lane / 2) % 4;
  const int column = ((lane / 4) & 2) * 2 + (lane % 2) * 2;
  float sums[2] = {c.elements[0], c.elements[1]};
  for (int k = 0; k < 8; k++) {
    const float left = __shfl_sync(kAllLanes, a.elements[k % 2], matrix_owner(row, k));
    for (int e = 0; e < 2; e++) {
      sums[e] += left * __shfl_sync(kAllLanes, b.elements[e], matrix_owner(k, column));
    }
  }
  d.elements[0] = sums[0];
  d.elements[1] = sums[1];
}

}  // namespace metal

using namespace metal;

#define int3 Int3
#define FLUX_THREADGROUP(type, name, count) __shared__ type name[count]
