// XAttention's block mass (flux_mlx/spec/xattention.py, arXiv 2503.16428): how much of the attention of query block m,
// seen through antidiagonals of stride x stride tiles, falls on key block n.
//
// q [B, HQ, L, D] and k [B, HKV, S, D] by strides, T float, half or bfloat, D a multiple of 8; block_size a multiple of
// stride. mass float [B, HQ, M, N]. Grid: (M, HQ, B) threadgroups of 128 threads; 64 floats of threadgroup memory.
//
// A group is `stride` tokens. A threadgroup owns one query block and takes its groups 8 at a time. The group scores are
// computed twice, for the softmax's maximum and sum and then for the masses: storing them would take (S / stride)^2
// floats a head. A SIMD-group owns every fourth key block.

namespace flux {

constexpr constant int kMassGroups = 4;

template <typename T>
struct GroupScorer {
  Rows<T> q;
  Rows<T> k;
  int kv_tokens;
  int stride;
  int head_dim;
  float scale;  // 1 / (sqrt(D) * stride), in units of log 2
};

// Scores of query groups row_group..+7 with key groups column_group..+7; tokens outside count as zeros.
template <typename T>
METAL_FUNC Matrix score_groups(GroupScorer<T> scorer, int row_group, int column_group, uint lane) {
  const int row = matrix_row(lane);
  const int column = matrix_column(lane);
  const int offset = scorer.kv_tokens - scorer.q.tokens;
  Matrix scores = matrix_of(0.0f, 0.0f);
  for (int t = 0; t < scorer.stride; t++) {
    const int q_row = (row_group + row) * scorer.stride + scorer.stride - 1 - t - offset;
    const int k_pos = (column_group + column) * scorer.stride + t;
    for (int d = 0; d < scorer.head_dim; d += 8) {
      const Matrix query = matrix_of(element(scorer.q, q_row, d + column), element(scorer.q, q_row, d + column + 1));
      const Matrix key =
          matrix_of(element(scorer.k, k_pos, d + row), element(scorer.k, k_pos + scorer.stride, d + row));
      simdgroup_multiply_accumulate(scores, query, key, scores);
    }
  }
  return scores;
}

// A thread's row of groups: its index, and the maximum and sum of its softmax.
struct GroupRow {
  int group;
  float top;
  float total;
};

// Whether the row's softmax has the key group: causal, and inside the key block that ends at `end`.
METAL_FUNC bool has_group(int row_group, int key_group, int end) { return key_group <= row_group && key_group < end; }

// Take key groups [begin, end) into the row's running maximum and this thread's part of its sum.
template <typename T>
METAL_FUNC void take_block(
    GroupScorer<T> scorer, thread GroupRow& row, int row_group, int begin, int end, uint lane) {
  for (int first = begin; first < end; first += 8) {
    Matrix scores = score_groups(scorer, row_group, first, lane);
    for (int e = 0; e < 2; e++) {
      const float score = scores.thread_elements()[e] * scorer.scale;
      if (has_group(row.group, first + matrix_column(lane) + e, end)) {
        const float top = max(row.top, score);
        row.total = row.total * fast::exp2(row.top - top) + fast::exp2(score - top);
        row.top = top;
      }
    }
  }
}

// Sum of the softmax weights of the 8 rows over key groups [begin, end).
template <typename T>
METAL_FUNC float weigh_block(
    GroupScorer<T> scorer, GroupRow row, bool row_counts, int row_group, int begin, int end, uint lane) {
  float sum = 0.0f;
  for (int first = begin; first < end; first += 8) {
    Matrix scores = score_groups(scorer, row_group, first, lane);
    for (int e = 0; e < 2; e++) {
      const float score = scores.thread_elements()[e] * scorer.scale;
      if (row_counts && has_group(row.group, first + matrix_column(lane) + e, end)) {
        sum += fast::exp2(score - row.top) / row.total;
      }
    }
  }
  return simd_sum(sum);
}

// Bring the row's maximum and sum together, over the lanes that share it and over the SIMD-groups.
METAL_FUNC GroupRow merge_row(GroupRow row, uint simd_index, uint lane, threadgroup float* tile) {
  const int line = matrix_row(lane);
  const float top = row_max(row.top);
  const float total = row_sum(row.total * fast::exp2(row.top - top));
  if (matrix_column(lane) == 0) {
    tile[int(simd_index) * 8 + line] = top;
    tile[kMassGroups * 8 + int(simd_index) * 8 + line] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  GroupRow merged = {row.group, kNoScore, 0.0f};
  for (int g = 0; g < kMassGroups; g++) {
    merged.top = max(merged.top, tile[g * 8 + line]);
  }
  for (int g = 0; g < kMassGroups; g++) {
    merged.total += tile[kMassGroups * 8 + g * 8 + line] * fast::exp2(tile[g * 8 + line] - merged.top);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return merged;
}

// The masses of query block `row` of the call, mass [N]. groups_per_block = block_size / stride.
template <typename T>
METAL_FUNC void block_mass(
    GroupScorer<T> scorer, int groups_per_block, int row, int key_blocks, uint simd_index, uint lane,
    threadgroup float* tile, device float* mass) {
  const int first_group = max(scorer.kv_tokens - scorer.q.tokens, 0) / scorer.stride;
  const int block = first_group / groups_per_block + row;
  const int groups = (scorer.kv_tokens + scorer.stride - 1) / scorer.stride;
  for (int n = int(simd_index); n < key_blocks; n += kMassGroups) {
    if (lane == 0) {
      mass[n] = 0.0f;
    }
  }
  for (int tile_row = 0; tile_row < groups_per_block; tile_row += 8) {
    const int row_group = block * groups_per_block + tile_row;
    const int own = tile_row + matrix_row(lane);
    GroupRow group_row = {row_group + matrix_row(lane), kNoScore, 0.0f};
    for (int n = int(simd_index); n <= block; n += kMassGroups) {
      take_block(scorer, group_row, row_group, n * groups_per_block, (n + 1) * groups_per_block, lane);
    }
    group_row = merge_row(group_row, simd_index, lane, tile);
    const bool counts = own < groups_per_block && group_row.group >= first_group && group_row.group < groups;
    for (int n = int(simd_index); n <= min(block, key_blocks - 1); n += kMassGroups) {
      const float sum = weigh_block(
          scorer, group_row, counts, row_group, n * groups_per_block, (n + 1) * groups_per_block, lane);
      if (lane == 0) {
        mass[n] += sum;
      }
    }
  }
}

}  // namespace flux
