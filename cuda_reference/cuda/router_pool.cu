// Mean over the heads of every token that the layer router pools (flux_mlx/spec/router.py).
//
// queries [tokens, HQ, D] dense, elements FLUX_T; rows float32 [tokens, D]; D a multiple of 4, at most 256. The entry is
// FLUX_ENTRY. Grid: a block a token, whose threads take four channels and every so many-th head. Sums are float32.
#include "loads.cuh"

namespace flux {

constexpr int kPoolThreads = 128;
constexpr int kHeadsAtOnce = 8;  // that a thread loads before it adds the first

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

template <typename T>
__device__ void add(float4& sum, const Four<T>& four) {
  sum.x += float(four.x[0]);
  sum.y += float(four.x[1]);
  sum.z += float(four.x[2]);
  sum.w += float(four.x[3]);
}

// Four channels of every `lanes`-th head from `lane` on, with the loads of several under way at once.
template <typename T>
__device__ float4 sum_of_heads(const Four<T>* queries, int heads, int quads, int quad, int lane, int lanes) {
  float4 sum = {};
  #pragma unroll 1
  for (int first = 0; first < heads; first += kHeadsAtOnce * lanes) {  // as often in every thread
    Four<T> loaded[kHeadsAtOnce];
    #pragma unroll
    for (int i = 0; i < kHeadsAtOnce; i++) {
      const int head = first + i * lanes + lane;
      loaded[i] = load_in_order(queries + int64_t(head < heads ? head : heads - 1) * quads + quad);
    }
    __syncwarp();  // or the assembler would move loads behind the first sums
    #pragma unroll
    for (int i = 0; i < kHeadsAtOnce; i++) {
      if (first + i * lanes + lane < heads) {
        add(sum, loaded[i]);
      }
    }
  }
  return sum;
}

template <typename T>
__device__ void pool_token(const T* queries, float* row, int heads, int channels, float4* sums) {
  const int quads = channels / 4, lanes = kPoolThreads / quads;
  const int quad = int(threadIdx.x) % quads, lane = int(threadIdx.x) / quads;
  sums[threadIdx.x] = sum_of_heads(reinterpret_cast<const Four<T>*>(queries), heads, quads, quad, lane, lanes);
  __syncthreads();
  if (lane > 0) {
    return;
  }
  float4 total = {};
  #pragma unroll 1
  for (int other = 0; other < lanes; other++) {
    const float4 sum = sums[other * quads + quad];
    total.x += sum.x;
    total.y += sum.y;
    total.z += sum.z;
    total.w += sum.w;
  }
  const float count = float(heads);
  reinterpret_cast<float4*>(row)[quad] =
      make_float4(total.x / count, total.y / count, total.z / count, total.w / count);
}

}  // namespace flux

extern "C" __global__ void __launch_bounds__(flux::kPoolThreads, 2) FLUX_ENTRY(
    const FLUX_T* __restrict__ queries, float* __restrict__ rows, int heads, int channels) {
  __shared__ float4 sums[flux::kPoolThreads];
  const int64_t token = blockIdx.x;
  flux::pool_token(queries + token * heads * channels, rows + token * channels, heads, channels, sums);
}
