// The layer router's mean over the pooled tokens and its context encoder, but for the last sum.
//
// prefix and recent float32 [B, P, D]: the mean is over the first prefix_tokens rows of prefix and the last
// recent_tokens of recent. Weights as in flux_mlx.spec.RouterConfig.parameter_shapes, float32. Output: encoded
// [B, blocks, 2 D], to be summed over the blocks, without the second bias. Grid: (8 D / 16, B).
#include "loads.cuh"
#include "router.cuh"

namespace flux {

// desk.inputs = the mean over a batch row's pooled tokens.
__device__ inline void pool(
    const float* prefix, const float* recent, int pool_tokens, int channels, int prefix_tokens, int recent_tokens,
    Desk& desk) {
  const Part part = part_of(channels);
  const int64_t first = int64_t(blockIdx.y) * pool_tokens * channels;
  float4 sum = {};
  add_rows(prefix + first, prefix_tokens, channels, part, sum);
  add_rows(recent + first + int64_t(pool_tokens - recent_tokens) * channels, recent_tokens, channels, part, sum);
  const float4 total = joined(sum, part, channels, desk);
  const int tokens = prefix_tokens + recent_tokens;
  const float count = float(tokens > 1 ? tokens : 1);
  if (part.lane == 0) {
    reinterpret_cast<float4*>(desk.inputs)[part.quad] =
        make_float4(total.x / count, total.y / count, total.z / count, total.w / count);
  }
}

}  // namespace flux

extern "C" __global__ void __launch_bounds__(flux::kThreads, 1) FLUX_ENTRY(
    const float* __restrict__ prefix, const float* __restrict__ recent, const float* __restrict__ encoder_0_weight,
    const float* __restrict__ encoder_0_bias, const float* __restrict__ encoder_2_weight, float* __restrict__ encoded,
    int pool_tokens, int channels, int prefix_tokens, int recent_tokens) {
  __shared__ flux::Desk desk;
  flux::prefetch_weights(encoder_0_weight, encoder_2_weight, channels, 2 * channels, 8 * channels);
  flux::prefetch_all(encoder_0_bias, 8 * channels);
  flux::pool(prefix, recent, pool_tokens, channels, prefix_tokens, recent_tokens, desk);
  flux::compute_units(encoder_0_weight, encoder_0_bias, channels, desk);
  float* out = encoded + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * channels;
  flux::write_products(encoder_2_weight, 2 * channels, 8 * channels, desk, out);
}
