// XAttention's block mass (flux_mlx/spec/xattention.py, arXiv 2503.16428): how much of the attention of query block m,
// seen through antidiagonals of stride x stride tiles, falls on key block n.
//
// q [B, HQ, L, D] and k [B, HKV, S, D] by strides, T float, half or bfloat, D a multiple of 8; block_size a multiple of
// stride. mass float [B, HQ, M, N]. Grid: (ceil(M / 4), HQ, B) threadgroups of 128 threads; no threadgroup memory.
//
// A group is `stride` tokens. A SIMD-group owns one query block and takes its groups 8 at a time. The group scores are
// computed twice, for the softmax's maximum and sum and then for the masses: storing them would take (S / stride)^2
// floats a head. The SIMD-groups of a threadgroup read the same keys at about the same time, through the cache.

namespace flux {

constexpr constant int kMassBlocks = 4;  // query blocks of a threadgroup

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

// Bring the row's maximum and sum together over the lanes that share it.
METAL_FUNC GroupRow merge_row(GroupRow row) {
  const float top = row_max(row.top);
  const GroupRow merged = {row.group, top, row_sum(row.total * fast::exp2(row.top - top))};
  return merged;
}

// The masses of query block `row` of the call, mass [N]. groups_per_block = block_size / stride.
template <typename T>
METAL_FUNC void block_mass(
    GroupScorer<T> scorer, int groups_per_block, int row, int key_blocks, uint lane, device float* mass) {
  const int first_group = max(scorer.kv_tokens - scorer.q.tokens, 0) / scorer.stride;
  const int groups = (scorer.kv_tokens + scorer.stride - 1) / scorer.stride;
  const int block = min(first_group / groups_per_block + row, key_blocks - 1);
  for (int n = int(lane); n < key_blocks; n += 32) {
    mass[n] = 0.0f;
  }
  simdgroup_barrier(mem_flags::mem_device);
  for (int tile_row = 0; tile_row < groups_per_block; tile_row += 8) {
    const int row_group = block * groups_per_block + tile_row;
    GroupRow group_row = {row_group + matrix_row(lane), kNoScore, 0.0f};
    for (int n = 0; n <= block; n++) {
      take_block(scorer, group_row, row_group, n * groups_per_block, (n + 1) * groups_per_block, lane);
    }
    group_row = merge_row(group_row);
    const bool in_block = tile_row + matrix_row(lane) < groups_per_block;
    const bool counts = in_block && group_row.group >= first_group && group_row.group < groups;
    for (int n = 0; n <= block; n++) {
      const float sum = weigh_block(
          scorer, group_row, counts, row_group, n * groups_per_block, (n + 1) * groups_per_block, lane);
      if (lane == 0) {
        mass[n] += sum;
      }
    }
  }
}

}  // namespace flux
