// Views of [B, H, tokens, D] buffers by their strides (no copy of a sliced cache), and the lane layout of 8 x 8 matrices.

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

namespace flux {

constexpr constant float kHidden = -3.0e38f;   // score of a key that is not seen: finite, as every running maximum
constexpr constant float kNoScore = -1.5e38f;  // running maximum before the first key: exp2(kHidden - kNoScore) is 0
constexpr constant float kLog2e = 1.44269504088896341f;
constexpr constant float kLn2 = 0.69314718055994531f;

using Matrix = simdgroup_matrix<float, 8, 8>;

// The rows of one head: token t, channel c is data[t * token_stride + c * channel_stride], for t < tokens.
template <typename T>
struct Rows {
  const device T* data;
  int64_t token_stride;
  int64_t channel_stride;
  int tokens;
};

// Head `head` of batch row `batch`; both are brought into the tensor's bounds.
template <typename T>
METAL_FUNC Rows<T> head_rows(
    const device T* data, const constant int* shape, const constant int64_t* strides, int batch, int head) {
  const int64_t start = min(batch, shape[0] - 1) * strides[0] + min(head, shape[1] - 1) * strides[1];
  const Rows<T> rows = {data + start, strides[2], strides[3], shape[2]};
  return rows;
}

// `kv_tokens` brought into the bounds of both buffers.
METAL_FUNC int tokens_in_use(int kv_tokens, const constant int* k_shape, const constant int* v_shape) {
  return max(0, min(kv_tokens, min(k_shape[2], v_shape[2])));
}

// One element as float32; 0 outside [0, tokens).
template <typename T>
METAL_FUNC float element(Rows<T> rows, int token, int channel) {
  const bool inside = token >= 0 && token < rows.tokens;
  return inside ? float(rows.data[token * rows.token_stride + channel * rows.channel_stride]) : 0.0f;
}

// Channel `channel` of a row. DENSE: channels are neighbours, so that the compiler can load several at once.
template <bool DENSE, typename T>
METAL_FUNC T channel_of(const device T* row, int64_t channel_stride, int channel) {
  return row[DENSE ? int64_t(channel) : channel * channel_stride];
}

// A lane holds columns matrix_column(lane) and the next of row matrix_row(lane).
METAL_FUNC int matrix_row(uint lane) { return int((lane / 4) & 4) + int(lane / 2) % 4; }
METAL_FUNC int matrix_column(uint lane) { return int((lane / 4) & 2) * 2 + int(lane % 2) * 2; }

METAL_FUNC Matrix matrix_of(float first, float second) {
  Matrix matrix;
  matrix.thread_elements()[0] = first;
  matrix.thread_elements()[1] = second;
  return matrix;
}

// Over the four lanes that hold a matrix row.
METAL_FUNC float row_max(float value) {
  value = max(value, simd_shuffle_xor(value, ushort(1)));
  return max(value, simd_shuffle_xor(value, ushort(8)));
}

METAL_FUNC float row_sum(float value) {
  value += simd_shuffle_xor(value, ushort(1));
  return value + simd_shuffle_xor(value, ushort(8));
}

}  // namespace flux
