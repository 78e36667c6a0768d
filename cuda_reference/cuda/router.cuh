// Steps that the layer router's two network kernels share (flux_mlx/spec/router.py), everything in float32.
//
// Two layers of the network are one kernel: a block computes `kUnits` neighbouring units of the first layer and what they
// add to every output of the second. Each kernel reads what the blocks before it left, and adds it up itself: so no
// block waits for another, and every sum has one order.
#pragma once

#include <cstdint>

namespace flux {

constexpr int kThreads = 512;
constexpr int kUnits = 16;  // of the first layer, a warp each
constexpr int kMostChannels = 256;  // D
constexpr int kLineFloats = 32;  // of 128 bytes
constexpr int kRowsAtOnce = 8;  // that a thread loads before it adds the first
constexpr unsigned kAllLanes = 0xffffffffu;

// Scratch of a block.
struct alignas(16) Desk {
  float4 sums[kThreads];
  float inputs[2 * kMostChannels];
  float units[kUnits];
  float logits[2];
  bool is_last;
};

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ inline void add(float4& sum, const float4& x) {
  sum.x += x.x;
  sum.y += x.y;
  sum.z += x.z;
  sum.w += x.w;
}

__device__ inline float dot(const float4& a, const float4& b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// A thread's part of sums over rows: four columns, and every `lanes`-th row from `lane` on. What threads past the last
// whole lane add up is not used.
struct Part {
  int quad;
  int lane;
  int lanes;
};

__device__ inline Part part_of(int columns) {
  const int quads = columns / 4;
  return {int(threadIdx.x) % quads, int(threadIdx.x) / quads, kThreads / quads};
}

// Adds this thread's part of rows [count, columns]; they may be of other blocks of this launch, so L1 is passed by.
__device__ inline void add_rows(const float* rows, int count, int columns, const Part& part, float4& sum) {
  const float4* quads = reinterpret_cast<const float4*>(rows) + part.quad;
  #pragma unroll 1
  for (int first = 0; first < count; first += kRowsAtOnce * part.lanes) {  // as often in every thread
    float4 loaded[kRowsAtOnce];
    #pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      const int row = first + i * part.lanes + part.lane;
      loaded[i] = load_in_order(quads + int64_t(row < count ? row : count - 1) * (columns / 4));
    }
    __syncwarp();  // or the assembler would move loads behind the first sums
    #pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      if (first + i * part.lanes + part.lane < count) {
        add(sum, loaded[i]);
      }
    }
  }
}

// Column `quad`'s sum over all threads' parts, in the first columns / 4 threads. All threads call it.
__device__ inline float4 joined(const float4& sum, const Part& part, int columns, Desk& desk) {
  desk.sums[threadIdx.x] = sum;
  __syncthreads();
  float4 total = {};
  if (part.lane == 0) {
    #pragma unroll 1
    for (int lane = 0; lane < part.lanes; lane++) {
      add(total, desk.sums[lane * (columns / 4) + part.quad]);
    }
  }
  return total;
}

// Has `count` floats fetched, at most kThreads lines of them.
__device__ inline void prefetch_all(const float* x, int count) {
  const int first = threadIdx.x * kLineFloats;
  if (first < count) {
    prefetch(x + first);
  }
}

// Has this block's weights fetched: rows of first [units, inputs] and columns of second [outputs, units].
__device__ inline void prefetch_weights(const float* first, const float* second, int inputs, int outputs, int units) {
  const float* rows = first + int64_t(blockIdx.x) * kUnits * inputs;
  #pragma unroll 1
  for (int i = threadIdx.x * kLineFloats; i < kUnits * inputs; i += kThreads * kLineFloats) {
    prefetch(rows + i);
  }
  #pragma unroll 1
  for (int row = threadIdx.x; row < outputs; row += kThreads) {
    prefetch(second + int64_t(row) * units + blockIdx.x * kUnits);
  }
}

// Product of a row of weights and desk.inputs, in all lanes of the warp that calls it.
__device__ inline float row_product(const float* row, int inputs, const Desk& desk) {
  float sum = 0.0f;
  #pragma unroll 2
  for (int i = threadIdx.x % 32 * 4; i < inputs; i += 128) {
    sum += dot(*reinterpret_cast<const float4*>(row + i), *reinterpret_cast<const float4*>(desk.inputs + i));
  }
  #pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

// desk.units = SiLU(first desk.inputs + bias), this block's. desk.inputs was written by any thread.
__device__ inline void compute_units(const float* first, const float* bias, int inputs, Desk& desk) {
  __syncthreads();
  const int warp = threadIdx.x / 32, unit = blockIdx.x * kUnits + warp;
  const float sum = row_product(first + int64_t(unit) * inputs, inputs, desk);
  if (threadIdx.x % 32 == 0) {
    desk.units[warp] = silu(sum + bias[unit]);
  }
  __syncthreads();
}

// What this block's units add to the outputs of second [outputs, units]: out [outputs].
__device__ inline void write_products(const float* second, int outputs, int units, const Desk& desk, float* out) {
  #pragma unroll 1
  for (int row = threadIdx.x; row < outputs; row += kThreads) {
    const float* weights = second + int64_t(row) * units + blockIdx.x * kUnits;
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < kUnits; i += 4) {
      sum += dot(*reinterpret_cast<const float4*>(weights + i), *reinterpret_cast<const float4*>(desk.units + i));
    }
    __stcg(out + row, sum);
  }
}

}  // namespace flux
