// Prefill attention with an online softmax (arXiv 2205.14135, 2307.08691), skipping keys that no query of a tile sees.
//
// q [B, HQ, L, D], k and v [B, HKV, capacity, D] by strides, D a multiple of 8, T float, half or bfloat.
// out T [B, HQ, L, D] and lse float [B, HQ, L] (natural log), both contiguous; a query that sees nothing has 0 and -inf.
// Grid: (query tiles, HQ, B) threadgroups of 128 threads; 2 * kKeys * kStride elements of T of threadgroup memory.
//
// A threadgroup owns 32 queries, a SIMD-group 8 of them, and a thread parts of one row: its queries and outputs stay in
// registers. Keys and values pass through threadgroup memory kKeys at a time. Masks are applied on edge tiles only.

namespace flux {

constexpr constant int kQueryRows = 32;
constexpr constant uint kPrefillThreads = 128;

template <typename T, int D>
struct PrefillTile {
  static constexpr constant int kKeys = D >= 256 && sizeof(T) == 4 ? 8 : D >= 128 ? 16 : 32;
  static constexpr constant int kStride = D + 16 / int(sizeof(T));  // padded: rows 8 apart fall into other banks
  static constexpr constant int kElements = 2 * kKeys * kStride;
};

// Where a thread is: which row of the tile, which columns of each 8 x 8 matrix.
struct Seat {
  uint thread_index;
  int row;
  int matrix_row;
  int matrix_column;
};

METAL_FUNC Seat take_seat(uint simd_index, uint lane) {
  const Seat seat = {simd_index * 32 + lane, int(simd_index) * 8 + matrix_row(lane), matrix_row(lane), matrix_column(lane)};
  return seat;
}

// A thread's part of its row.
template <typename T, int D>
struct RowState {
  T query[D / 4];
  Matrix out[D / 8];
  float top;    // running maximum of the row's scores, in units of log 2
  float total;  // this thread's part of the row's sum of exp2(score - top)
};

template <typename T, int D>
METAL_FUNC void begin_row(thread RowState<T, D>& state, Rows<T> q, int q_row, Seat seat) {
  for (int d = 0; d < D / 8; d++) {
    state.query[2 * d] = T(element(q, q_row, 8 * d + seat.matrix_column));
    state.query[2 * d + 1] = T(element(q, q_row, 8 * d + seat.matrix_column + 1));
    state.out[d] = matrix_of(0.0f, 0.0f);
  }
  state.top = kNoScore;
  state.total = 0.0f;
}

template <bool DENSE, typename T, int D>
METAL_FUNC void stage_channels(Rows<T> rows, int first, int count, threadgroup T* tile, uint thread_index) {
  constexpr int quads = D / 4;
  for (int i = int(thread_index); i < PrefillTile<T, D>::kKeys * quads; i += int(kPrefillThreads)) {
    const int row = i / quads;
    const int channel = (i % quads) * 4;
    threadgroup T* target = tile + row * PrefillTile<T, D>::kStride + channel;
    const device T* source = rows.data + (first + row) * rows.token_stride;
    for (int e = 0; e < 4; e++) {
      target[e] = row < count ? channel_of<DENSE>(source, rows.channel_stride, channel + e) : T(0.0f);
    }
  }
}

// Copy tokens [first, first + count) to tile [kKeys, kStride], zeros behind them. The choice is the same for all threads.
template <typename T, int D>
METAL_FUNC void stage(Rows<T> rows, int first, int count, threadgroup T* tile, uint thread_index) {
  if (rows.channel_stride == 1) {
    stage_channels<true, T, D>(rows, first, count, tile, thread_index);
  } else {
    stage_channels<false, T, D>(rows, first, count, tile, thread_index);
  }
}

// scores = query keys^T for the SIMD-group's 8 rows, unscaled.
template <typename T, int D>
METAL_FUNC void score_tile(
    const thread RowState<T, D>& state, const threadgroup T* keys, Seat seat, thread Matrix* scores) {
  constexpr int stride = PrefillTile<T, D>::kStride;
  for (int c = 0; c < PrefillTile<T, D>::kKeys / 8; c++) {
    scores[c] = matrix_of(0.0f, 0.0f);
  }
  for (int d = 0; d < D / 8; d++) {
    const Matrix query = matrix_of(float(state.query[2 * d]), float(state.query[2 * d + 1]));
    for (int c = 0; c < PrefillTile<T, D>::kKeys / 8; c++) {
      const threadgroup T* key = keys + (8 * c + seat.matrix_column) * stride + 8 * d + seat.matrix_row;
      simdgroup_multiply_accumulate(scores[c], query, matrix_of(float(key[0]), float(key[stride])), scores[c]);
    }
  }
}

// Scale to units of log 2 and, on an edge tile, hide what the row does not see. scores[c] has keys first + 8c + column.
template <int KEYS>
METAL_FUNC void scale_and_mask(
    thread Matrix* scores, float scale, bool is_edge, Span span, int first, int range_end, int column) {
  for (int c = 0; c < KEYS / 8; c++) {
    for (int e = 0; e < 2; e++) {
      const int k_pos = first + 8 * c + column + e;
      const bool seen = !is_edge || (k_pos < range_end && sees(span, k_pos));
      scores[c].thread_elements()[e] = seen ? scores[c].thread_elements()[e] * scale : kHidden;
    }
  }
}

// scores become exp2(score - top); the row's earlier sum and output are brought to the new maximum.
template <typename T, int D>
METAL_FUNC void softmax_step(thread RowState<T, D>& state, thread Matrix* scores) {
  float top = state.top;
  for (int c = 0; c < PrefillTile<T, D>::kKeys / 8; c++) {
    top = max(top, max(scores[c].thread_elements()[0], scores[c].thread_elements()[1]));
  }
  top = row_max(top);
  const float rescale = fast::exp2(state.top - top);
  state.top = top;
  state.total *= rescale;
  for (int c = 0; c < PrefillTile<T, D>::kKeys / 8; c++) {
    for (int e = 0; e < 2; e++) {
      const float weight = fast::exp2(scores[c].thread_elements()[e] - top);
      scores[c].thread_elements()[e] = weight;
      state.total += weight;
    }
  }
  for (int d = 0; d < D / 8; d++) {
    state.out[d].thread_elements()[0] *= rescale;
    state.out[d].thread_elements()[1] *= rescale;
  }
}

// out += weights values.
template <typename T, int D>
METAL_FUNC void add_values(
    thread RowState<T, D>& state, const thread Matrix* weights, const threadgroup T* values, Seat seat) {
  constexpr int stride = PrefillTile<T, D>::kStride;
  for (int d = 0; d < D / 8; d++) {
    for (int c = 0; c < PrefillTile<T, D>::kKeys / 8; c++) {
      const threadgroup T* value = values + (8 * c + seat.matrix_row) * stride + 8 * d + seat.matrix_column;
      simdgroup_multiply_accumulate(
          state.out[d], weights[c], matrix_of(float(value[0]), float(value[1])), state.out[d]);
    }
  }
}

// The keys and values of one KV head, and how to score them.
template <typename T>
struct Keys {
  Rows<T> k;
  Rows<T> v;
  int kv_tokens;
  float scale;  // in units of log 2
};

// What a tile of queries sees: the span of this thread's row, and the keys that need no mask.
struct TileView {
  Span row;
  int first_query;
  int common_begin;
};

// Attend to keys [begin, end), which any row of the tile may see. All threads of the threadgroup call it alike.
template <typename T, int D>
METAL_FUNC void attend(
    thread RowState<T, D>& state, Keys<T> keys, TileView view, int begin, int end, threadgroup T* tile, Seat seat) {
  constexpr int step = PrefillTile<T, D>::kKeys;
  threadgroup T* value_tile = tile + step * PrefillTile<T, D>::kStride;
  end = min(end, keys.kv_tokens);
  for (int first = max(begin, 0); first < end; first += step) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<T, D>(keys.k, first, min(end - first, step), tile, seat.thread_index);
    stage<T, D>(keys.v, first, min(end - first, step), value_tile, seat.thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    Matrix scores[step / 8];
    score_tile<T, D>(state, tile, seat, scores);
    const int last = first + step - 1;
    const bool in_common = first >= view.common_begin || last < view.row.sink_end;
    const bool is_edge = last >= end || last > view.first_query || !in_common;
    scale_and_mask<step>(scores, keys.scale, is_edge, view.row, first, end, seat.matrix_column);
    softmax_step<T, D>(state, scores);
    add_values<T, D>(state, scores, value_tile, seat);
  }
}

// Write row `q_row` of out [L, D] and lse [L] of this head.
template <typename T, int D>
METAL_FUNC void end_row(thread RowState<T, D>& state, int q_row, Seat seat, device T* out, device float* lse) {
  const float total = row_sum(state.total);
  if (q_row < 0) {
    return;
  }
  const float divisor = total > 0.0f ? total : 1.0f;
  for (int d = 0; d < D / 8; d++) {
    device T* target = out + int64_t(q_row) * D + 8 * d + seat.matrix_column;
    target[0] = T(state.out[d].thread_elements()[0] / divisor);
    target[1] = T(state.out[d].thread_elements()[1] / divisor);
  }
  if (seat.matrix_column == 0) {
    lse[q_row] = total > 0.0f ? (state.top + log2(total)) * kLn2 : -INFINITY;
  }
}

// Full, streaming or triangle attention of query tile `tile_index`, whose rule is computed in place.
template <typename T, int D>
METAL_FUNC void prefill(
    Rows<T> q, Keys<T> keys, Rule rule, int tile_index, Seat seat, threadgroup T* tile, device T* out, device float* lse) {
  const int offset = keys.kv_tokens - q.tokens;
  const int first = offset + tile_index * kQueryRows;
  const int last = min(first + kQueryRows, keys.kv_tokens) - 1;
  const int q_pos = first + seat.row;
  const int q_row = q_pos <= last ? q_pos - offset : -1;
  RowState<T, D> state;
  begin_row<T, D>(state, q, q_row, seat);
  const TileView view = {query_span(rule, q_pos, keys.kv_tokens), first, common_begin(rule, first, last)};
  const Span span = union_span(rule, first, last, keys.kv_tokens);
  attend<T, D>(state, keys, view, 0, span.sink_end, tile, seat);
  attend<T, D>(state, keys, view, span.window_begin, span.end, tile, seat);
  end_row<T, D>(state, q_row, seat, out, lse);
}

// The row of a block table that one query block reads. Counts and indices are device or constant pointers.
template <typename Counts, typename Indices>
struct TableRow {
  Counts count;
  Indices indices;
  int columns;
};

// Row `row` of the table of (batch, head); a table with one batch row or one head serves all.
template <typename Counts, typename Indices>
METAL_FUNC TableRow<Counts, Indices> table_row(
    Counts counts, Indices indices, const constant int* shape, int batch, int head, int row) {
  const int line = (min(batch, shape[0] - 1) * shape[1] + min(head, shape[1] - 1)) * shape[2] + min(row, shape[2] - 1);
  const TableRow<Counts, Indices> result = {counts + line, indices + int64_t(line) * shape[3], shape[3]};
  return result;
}

// Attend to the blocks that a table row lists. Entries outside the keys, and blocks above the diagonal, are passed over.
template <typename T, int D, typename Counts, typename Indices>
METAL_FUNC void attend_listed(
    thread RowState<T, D>& state, Keys<T> keys, TileView view, TableRow<Counts, Indices> row, int block_size,
    int end, threadgroup T* tile, Seat seat) {
  const int count = min(int(row.count[0]), row.columns);
  for (int i = 0; i < count; i++) {
    const int block = row.indices[i];
    if (block >= 0 && block <= (end - 1) / block_size) {
      attend<T, D>(state, keys, view, block * block_size, min((block + 1) * block_size, end), tile, seat);
    }
  }
}

// The queries of one tile of the block-sparse kernel: a tile never crosses a query block.
struct BlockTile {
  int table_row;
  int first;
  int end;
};

METAL_FUNC BlockTile block_tile(int tile_index, int block_size, int offset, int kv_tokens) {
  const int tiles_per_block = (block_size + kQueryRows - 1) / kQueryRows;
  const int row = tile_index / tiles_per_block;
  const int block_start = (offset / block_size + row) * block_size;
  const int first = block_start + (tile_index % tiles_per_block) * kQueryRows;
  const BlockTile result = {row, first, min(min(first + kQueryRows, block_start + block_size), kv_tokens)};
  return result;
}

// The four arrays of a block table: counts [TB, TH, M] and indices [TB, TH, M, N] of partial and of full blocks.
template <typename Counts, typename Indices, typename FullCounts, typename FullIndices>
struct Table {
  Counts counts;
  Indices indices;
  FullCounts full_counts;
  FullIndices full_indices;
};

template <typename Counts, typename Indices, typename FullCounts, typename FullIndices>
METAL_FUNC Table<Counts, Indices, FullCounts, FullIndices> make_table(
    Counts counts, Indices indices, FullCounts full_counts, FullIndices full_indices) {
  const Table<Counts, Indices, FullCounts, FullIndices> table = {counts, indices, full_counts, full_indices};
  return table;
}

// Block-sparse attention of query tile `tile_index`: the listed blocks, causal inside; everything if not `is_sparse`.
template <typename T, int D, typename TableType>
METAL_FUNC void prefill_table(
    Rows<T> q, Keys<T> keys, TableType table, const constant int* table_shape, int batch, int head, int block_size,
    bool is_sparse, int tile_index, Seat seat, threadgroup T* tile, device T* out, device float* lse) {
  block_size = min(max(block_size, 1), max(keys.kv_tokens, 1));  // a larger block is one block
  const int offset = keys.kv_tokens - q.tokens;
  const BlockTile rows = block_tile(tile_index, block_size, max(offset, 0), keys.kv_tokens);
  const int q_pos = rows.first + seat.row;
  const int q_row = q_pos >= offset && q_pos < rows.end ? q_pos - offset : -1;
  RowState<T, D> state;
  begin_row<T, D>(state, q, q_row, seat);
  const TileView view = {{0, 0, q_pos + 1}, max(rows.first, offset), 0};
  if (is_sparse) {
    const auto partial = table_row(table.counts, table.indices, table_shape, batch, head, rows.table_row);
    attend_listed<T, D>(state, keys, view, partial, block_size, rows.end, tile, seat);
    const auto full = table_row(table.full_counts, table.full_indices, table_shape, batch, head, rows.table_row);
    attend_listed<T, D>(state, keys, view, full, block_size, rows.end, tile, seat);
  } else {
    attend<T, D>(state, keys, view, 0, rows.end, tile, seat);
  }
  end_row<T, D>(state, q_row, seat, out, lse);
}

}  // namespace flux
