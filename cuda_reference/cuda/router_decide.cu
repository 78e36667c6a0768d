// The layer router's head: logits and route from what router_encode left.
//
// encoded float32 [B, encoder_blocks, 2 D]; weights as in flux_mlx.spec.RouterConfig.parameter_shapes, float32; tickets
// [slots, B], zeros. Outputs: route int32 [B], codes of flux_mlx.spec.Route; logits float32 [B, 2]; and
// work [B, blocks, D], scratch. Grid: (4 D / 16, B). The blocks of a batch row leave what their units add in `work` and
// take a ticket; the last to come adds it up and decides. Tickets count in the caller's array, zero before and after
// every launch.
#include "loads.cuh"
#include "router.cuh"
#include "warp.cuh"

namespace flux {

constexpr int kRouteFull = 1;  // codes of flux_mlx.spec.Route
constexpr int kRouteSparse = 2;

// desk.inputs [columns] = bias + sum of rows [count, columns], with SiLU if `activate`.
__device__ inline void sum_parts(
    const float* rows, const float* bias, int count, int columns, bool activate, Desk& desk) {
  const Part part = part_of(columns);
  float4 sum = {};
  add_rows(rows, count, columns, part, sum);
  float4 total = joined(sum, part, columns, desk);
  if (part.lane == 0) {
    add(total, reinterpret_cast<const float4*>(bias)[part.quad]);
    if (activate) {
      total = make_float4(silu(total.x), silu(total.y), silu(total.z), silu(total.w));
    }
    reinterpret_cast<float4*>(desk.inputs)[part.quad] = total;
  }
}

// Whether this block is the last of its batch row; then it sees what the others have written.
__device__ inline bool is_last(unsigned* ticket, Desk& desk) {
  __syncthreads();
  if (threadIdx.x == 0) {
    desk.is_last = take_ticket(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  return desk.is_last;
}

// The last layer, of desk.inputs, and the decision: SPARSE unless logit 1 > logit 0; FULL if they are not numbers.
__device__ inline void decide(
    const float* weight, const float* bias, int channels, Desk& desk, int* route, float* logits) {
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp < 2) {
    const float sum = row_product(weight + warp * channels, channels, desk);
    if (threadIdx.x % 32 == 0) {
      desk.logits[warp] = sum + bias[warp];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    logits[0] = desk.logits[0];
    logits[1] = desk.logits[1];
    *route = desk.logits[0] >= desk.logits[1] ? kRouteSparse : kRouteFull;
  }
}

}  // namespace flux

extern "C" __global__ void __launch_bounds__(flux::kThreads, 1) FLUX_ENTRY(
    const float* __restrict__ encoded, const float* __restrict__ encoder_2_bias,
    const float* __restrict__ head_0_weight, const float* __restrict__ head_0_bias,
    const float* __restrict__ head_2_weight, const float* __restrict__ head_2_bias,
    const float* __restrict__ head_4_weight, const float* __restrict__ head_4_bias, unsigned* tickets, int* route,
    float* logits, float* work, int encoder_blocks, int channels, int slot) {
  __shared__ flux::Desk desk;
  const int64_t row = blockIdx.y;
  flux::prefetch_weights(head_0_weight, head_2_weight, 2 * channels, channels, 4 * channels);
  flux::prefetch_all(encoder_2_bias, 2 * channels);
  flux::prefetch_all(head_0_bias, 4 * channels);
  flux::prefetch_all(head_2_bias, channels);
  flux::prefetch_all(head_4_weight, 2 * channels);
  flux::prefetch_all(head_4_bias, 2);
  const float* parts = encoded + row * encoder_blocks * 2 * channels;
  flux::sum_parts(parts, encoder_2_bias, encoder_blocks, 2 * channels, false, desk);
  flux::compute_units(head_0_weight, head_0_bias, 2 * channels, desk);
  work += row * gridDim.x * channels;
  flux::write_products(head_2_weight, channels, 4 * channels, desk, work + int64_t(blockIdx.x) * channels);
  if (flux::is_last(tickets + int64_t(slot) * gridDim.y + row, desk)) {
    flux::sum_parts(work, head_2_bias, gridDim.x, channels, true, desk);
    flux::decide(head_4_weight, head_4_bias, channels, desk, route + row, logits + 2 * row);
  }
}
