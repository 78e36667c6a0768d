// The layer router (flux_mlx/spec/router.py): mean of the queries at both ends of a prompt, then a five-layer MLP.
//
// Two launches. router_pool: queries T [B, L, HQ, D] by strides; grid (parts, B) threadgroups of 128 threads; writes
// float sums [B, parts, D]. router_decide: the parts and ten parameters W (float, half or bfloat); grid (1, B)
// threadgroups of 1,024 threads, 11 * D floats of threadgroup memory; writes logits [B, 2] and the route code [B].
// Sums are float32.

#include <metal_simdgroup>

namespace flux {

constexpr constant int kPoolThreads = 128;
constexpr constant int kPoolSlots = 8;  // pooled tokens of a part
constexpr constant int kDecideGroups = 32;
constexpr constant int kRouteFull = 1;  // flux_mlx.spec.Route.FULL

// The token of pool slot `slot`: the first `ends` slots are the first tokens, the next the last ones.
METAL_FUNC int pooled_token(int slot, int ends, int tokens) { return slot < ends ? slot : tokens - 2 * ends + slot; }

// Sum over the heads and over the slots of `part`, channel by channel.
template <typename T>
METAL_FUNC void pool_part(
    const device T* queries, const constant int* shape, const constant int64_t* strides, int pool_tokens, int batch,
    int part, int thread_index, device float* sums) {
  const int ends = min(max(pool_tokens, 1), shape[1]);
  const int last = min((part + 1) * kPoolSlots, 2 * ends);
  for (int channel = thread_index; channel < shape[3]; channel += kPoolThreads) {
    float sum = 0.0f;
    for (int slot = part * kPoolSlots; slot < last; slot++) {
      const int token = pooled_token(slot, ends, shape[1]);
      const device T* row = queries + batch * strides[0] + token * strides[1] + channel * strides[3];
      for (int head = 0; head < shape[2]; head++) {
        sum += float(row[head * strides[2]]);
      }
    }
    sums[channel] = sum;
  }
}

METAL_FUNC float silu(float x) { return x * (0.5f + 0.5f * tanh(0.5f * x)); }

// pooled[channel] = mean, from the parts' sums. All threads call it; a barrier follows.
METAL_FUNC void finish_pool(
    const device float* sums, int parts, int channels, float count, int thread_index, threadgroup float* pooled) {
  for (int channel = thread_index; channel < channels; channel += kDecideGroups * 32) {
    float sum = 0.0f;
    for (int part = 0; part < parts; part++) {
      sum += sums[part * channels + channel];
    }
    pooled[channel] = sum / count;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// outputs = weight [rows, columns] inputs + bias, with SiLU if `activate`: a SIMD-group a row. A barrier follows.
// Weight and Bias are device or constant pointers.
template <typename Weight, typename Bias>
METAL_FUNC void linear(
    Weight weight, Bias bias, int rows, int columns, bool activate, const threadgroup float* inputs,
    threadgroup float* outputs, uint simd_index, uint lane) {
  for (int row = int(simd_index); row < rows; row += kDecideGroups) {
    float sum = 0.0f;
    for (int column = int(lane); column < columns; column += 32) {
      sum += float(weight[int64_t(row) * columns + column]) * inputs[column];
    }
    sum = simd_sum(sum);
    if (lane == 0) {
      sum += float(bias[row]);
      outputs[row] = activate ? silu(sum) : sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// FULL iff logit 1 > logit 0, and if they are not numbers.
METAL_FUNC void write_decision(const threadgroup float* outputs, device float* logits, device int32_t* route) {
  logits[0] = outputs[0];
  logits[1] = outputs[1];
  route[0] = outputs[0] >= outputs[1] ? kRouteSparse : kRouteFull;
}

}  // namespace flux
