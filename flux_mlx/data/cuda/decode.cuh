// Attention of 1 to 8 new queries over a long cache, read in place: sink and window are never copied together.
//
// q [B, HQ, L, D], k and v [B, HKV, S, D] by strides, T __nv_bfloat16 or __half. Grid: (HKV * row chunks, B, splits)
// blocks of 128 threads; then `merge_splits`, a block of D threads for each row.
//
// The L queries of the HQ / HKV heads that share a KV head are rows; a block takes ROWS of them, so that a key is read
// once for all. The keys that any of them sees are numbered 0..n-1 (sink, then window) and cut into even pieces, one for
// each split. D / 8 lanes hold one key, 8 channels each: a warp holds 256 / D keys at once, and loads several such
// groups before it uses the first.

namespace flux {

constexpr int kWarps = 4;
constexpr int kMaxSplits = 128;
constexpr int kChannels = 8;  // of a lane: one load of 16 bytes
constexpr int kNowhere = 0x7fffffff;  // a position that no query sees
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNoScore = -1e30f;  // below every score; its differences are finite

template <typename T>
struct alignas(16) Pack {
  T values[kChannels];
};

// The tokens of one head. `is_packed`: eight channels are one aligned load.
template <typename T>
struct Rows {
  const T* data;
  int64_t token_stride;
  int64_t channel_stride;
  bool is_packed;
};

template <typename T, typename Strides>
__device__ Rows<T> head_rows(const T* x, const Strides& strides, int batch, int head) {
  const T* data = x + batch * strides[0] + head * strides[1];
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[2] % kChannels == 0;
  return {data, strides[2], strides[3], aligned && strides[3] == 1};
}

template <bool PACKED, typename T>
__device__ Pack<T> load_pack(const Rows<T>& rows, int token, int channel) {
  const T* source = rows.data + token * rows.token_stride + channel * rows.channel_stride;
  Pack<T> pack;
  if constexpr (PACKED) {
    pack = *reinterpret_cast<const Pack<T>*>(source);
  } else {
    #pragma unroll
    for (int c = 0; c < kChannels; c++) {
      pack.values[c] = source[c * rows.channel_stride];
    }
  }
  return pack;
}

// What a query sees: keys [0, sink_end) and [window_begin, its own position].
struct Span {
  int sink_end;
  int window_begin;
};

// BLOCK: tokens of a block; SINK: tokens of the sink, rounded up to blocks; WINDOW: blocks of the window.
template <int BLOCK, int SINK, int WINDOW>
__device__ Span span_of(int q_pos, bool is_sparse) {
  const int first_block = is_sparse ? q_pos / BLOCK - WINDOW + 1 : 0;
  const int begin = first_block > 0 ? first_block * BLOCK : 0;
  return {begin < SINK ? begin : SINK, begin};
}

__device__ inline bool sees(const Span& span, int q_pos, int k_pos) {
  return k_pos <= q_pos && (k_pos < span.sink_end || k_pos >= span.window_begin);
}

// What a lane has seen: for each row its channels of the output, the maximum and the sum.
template <int ROWS>
struct Partial {
  float out[ROWS][kChannels];
  float top[ROWS];
  float total[ROWS];
};

// Take over what another has seen of row r.
template <int ROWS>
__device__ void merge_row(Partial<ROWS>& part, int r, float top, float total, const float* out) {
  const float highest = fmaxf(part.top[r], top);
  const float keep = exp2f(part.top[r] - highest);
  const float take = exp2f(top - highest);
  part.top[r] = highest;
  part.total[r] = part.total[r] * keep + total * take;
  #pragma unroll
  for (int c = 0; c < kChannels; c++) {
    part.out[r][c] = part.out[r][c] * keep + out[c] * take;
  }
}

// UNROLL keys for row r: `scores` in units of log 2, minus infinity where hidden.
template <int UNROLL, typename T, int ROWS>
__device__ void see_keys(Partial<ROWS>& part, int r, const float* scores, const Pack<T>* values) {
  float top = part.top[r];
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    top = fmaxf(top, scores[u]);
  }
  const float rescale = exp2f(part.top[r] - top);
  part.top[r] = top;
  part.total[r] *= rescale;
  #pragma unroll
  for (int c = 0; c < kChannels; c++) {
    part.out[r][c] *= rescale;
  }
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const float weight = exp2f(scores[u] - top);
    part.total[r] += weight;
    #pragma unroll
    for (int c = 0; c < kChannels; c++) {
      part.out[r][c] += weight * float(values[u].values[c]);
    }
  }
}

// Where a block is: its batch row, KV head, first row and split.
struct Seat {
  int batch;
  int kv_head;
  int first_row;
  int split;
  int splits;
};

template <int ROWS>
__device__ Seat seat_of(int heads_per_kv, int q_tokens) {
  const int chunks = (heads_per_kv * q_tokens + ROWS - 1) / ROWS;
  const int x = int(blockIdx.x);
  return {int(blockIdx.y), x / chunks, x % chunks * ROWS, int(blockIdx.z), int(gridDim.z)};
}

// Row r of a block: head and query; rows past the last repeat it.
struct Row {
  int head;
  int query;
  bool exists;
};

__device__ inline Row row_of(const Seat& seat, int r, int heads_per_kv, int q_tokens) {
  const int last = heads_per_kv * q_tokens - 1;
  const int index = seat.first_row + r < last ? seat.first_row + r : last;
  return {seat.kv_head * heads_per_kv + index / q_tokens, index % q_tokens, seat.first_row + r <= last};
}

// Sums over the D / 8 lanes of a key.
template <int D>
__device__ float sum_of_key(float value) {
  #pragma unroll
  for (int mask = D / kChannels / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, mask);
  }
  return value;
}

// The lanes of a warp that hold other keys, merged into all of them.
template <int D, int ROWS>
__device__ void merge_lanes(Partial<ROWS>& part) {
  #pragma unroll
  for (int mask = D / kChannels; mask < 32; mask *= 2) {
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float top = __shfl_xor_sync(kAllLanes, part.top[r], mask);
      const float total = __shfl_xor_sync(kAllLanes, part.total[r], mask);
      float out[kChannels];
      #pragma unroll
      for (int c = 0; c < kChannels; c++) {
        out[c] = __shfl_xor_sync(kAllLanes, part.out[r][c], mask);
      }
      merge_row<ROWS>(part, r, top, total, out);
    }
  }
}

// Scratch of a block: of each row and warp D outputs, the maximum and the sum.
template <int D, int ROWS>
struct Tile {
  float out[ROWS][kWarps][D];
  float top[ROWS][kWarps];
  float total[ROWS][kWarps];
};

// The keys [begin, end) of a split, by number; those below sink_end are the sink's.
struct Piece {
  int begin;
  int end;
  Span span;
};

__device__ inline Piece piece_of(const Span& span, int kv_tokens, int split, int splits) {
  const int visible = span.sink_end + kv_tokens - span.window_begin;
  const int size = (visible + splits - 1) / splits;
  const int begin = split * size < visible ? split * size : visible;
  return {begin, begin + size < visible ? begin + size : visible, span};
}

__device__ inline int position_of(const Piece& piece, int number) {
  return number < piece.span.sink_end ? number : piece.span.window_begin + number - piece.span.sink_end;
}

// A block's rows: queries in units of log 2, spans, positions.
template <int ROWS>
struct Queries {
  float values[ROWS][kChannels];
  Span spans[ROWS];
  int positions[ROWS];
};

// One split for ROWS rows.
template <bool PACKED, int UNROLL, int D, typename T, int ROWS>
__device__ void see_piece(
    const Rows<T>& k, const Rows<T>& v, const Piece& piece, const Queries<ROWS>& q, Partial<ROWS>& part) {
  constexpr int kLanesOfKey = D / kChannels;
  constexpr int kKeys = kWarps * 32 / kLanesOfKey;  // of a block at once
  const int channel = int(threadIdx.x) % kLanesOfKey * kChannels;
  const int first = piece.begin + int(threadIdx.x) / kLanesOfKey;
  const int steps = (piece.end - piece.begin + kKeys * UNROLL - 1) / (kKeys * UNROLL);
  for (int step = 0; step < steps; step++) {
    int positions[UNROLL];
    Pack<T> keys[UNROLL], values[UNROLL];
    #pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int number = first + (step * UNROLL + u) * kKeys;
      const bool exists = number < piece.end;
      const int position = position_of(piece, exists ? number : piece.begin);
      keys[u] = load_pack<PACKED>(k, position, channel);
      values[u] = load_pack<PACKED>(v, position, channel);
      positions[u] = exists ? position : kNowhere;
    }
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float scores[UNROLL];
      #pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        float score = 0.0f;
        #pragma unroll
        for (int c = 0; c < kChannels; c++) {
          score += q.values[r][c] * float(keys[u].values[c]);
        }
        score = sum_of_key<D>(score);
        scores[u] = sees(q.spans[r], q.positions[r], positions[u]) ? score : -INFINITY;
      }
      see_keys<UNROLL>(part, r, scores, values);
    }
  }
}

template <int D, int ROWS>
__device__ void store_partial(const Partial<ROWS>& part, Tile<D, ROWS>& tile) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  #pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (lane < D / kChannels) {
      #pragma unroll
      for (int c = 0; c < kChannels; c++) {
        tile.out[r][warp][lane * kChannels + c] = part.out[r][c];
      }
    }
    if (lane == 0) {
      tile.top[r][warp] = part.top[r];
      tile.total[r][warp] = part.total[r];
    }
  }
}

// Merge the warps: pieces float [B, HQ, L, splits, D], stats float [B, HQ, L, splits, 2] (maximum in units of log 2, sum).
template <int D, int ROWS>
__device__ void write_piece(
    const Tile<D, ROWS>& tile, const Seat& seat, int heads, int heads_per_kv, int q_tokens, float* pieces, float* stats) {
  for (int i = int(threadIdx.x); i < ROWS * D; i += kWarps * 32) {
    const int r = i / D, channel = i % D;
    const Row row = row_of(seat, r, heads_per_kv, q_tokens);
    float top = kNoScore, total = 0.0f, sum = 0.0f;
    #pragma unroll
    for (int w = 0; w < kWarps; w++) {
      top = fmaxf(top, tile.top[r][w]);
    }
    #pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float weight = exp2f(tile.top[r][w] - top);
      total += weight * tile.total[r][w];
      sum += weight * tile.out[r][w][channel];
    }
    if (row.exists) {
      const int64_t token = (int64_t(seat.batch) * heads + row.head) * q_tokens + row.query;
      const int64_t slot = token * seat.splits + seat.split;
      pieces[slot * D + channel] = sum;
      if (channel == 0) {
        stats[2 * slot] = top;
        stats[2 * slot + 1] = total;
      }
    }
  }
}

// One block: ROWS rows over one split of the keys of KV head `seat.kv_head`.
template <typename T, int D, int ROWS, int BLOCK, int SINK, int WINDOW, typename Strides>
__device__ void decode_split(
    const Rows<T>& k, const Rows<T>& v, const T* q, const Strides& q_strides, const Seat& seat, int heads,
    int heads_per_kv, int q_tokens, int kv_tokens, float scale, bool is_sparse, Tile<D, ROWS>& tile, float* pieces,
    float* stats) {
  const int channel = int(threadIdx.x) % (D / kChannels) * kChannels;
  Queries<ROWS> queries;
  Partial<ROWS> part;
  #pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const Row row = row_of(seat, r, heads_per_kv, q_tokens);
    const Rows<T> source = head_rows(q, q_strides, seat.batch, row.head);
    const Pack<T> pack =
        source.is_packed ? load_pack<true>(source, row.query, channel) : load_pack<false>(source, row.query, channel);
    queries.positions[r] = kv_tokens - q_tokens + row.query;
    queries.spans[r] = span_of<BLOCK, SINK, WINDOW>(queries.positions[r], is_sparse);
    part.top[r] = kNoScore;
    part.total[r] = 0.0f;
    #pragma unroll
    for (int c = 0; c < kChannels; c++) {
      queries.values[r][c] = float(pack.values[c]) * (scale * kLog2e);
      part.out[r][c] = 0.0f;
    }
  }
  const Span widest = span_of<BLOCK, SINK, WINDOW>(kv_tokens - q_tokens, is_sparse);
  const Piece piece = piece_of(widest, kv_tokens, seat.split, seat.splits);
  if (k.is_packed && v.is_packed) {
    see_piece<true, (ROWS > 4 ? 2 : 4), D>(k, v, piece, queries, part);
  } else {
    see_piece<false, 1, D>(k, v, piece, queries, part);
  }
  merge_lanes<D, ROWS>(part);
  store_partial<D, ROWS>(part, tile);
  __syncthreads();
  write_piece<D, ROWS>(tile, seat, heads, heads_per_kv, q_tokens, pieces, stats);
}

// Scratch of a merging block: maximum and sum of every split.
struct SplitStats {
  float top[kMaxSplits];
  float total[kMaxSplits];
};

// One channel of one row (a block of D threads): out [B, L, HQ, D] and lse [B, HQ, L] from the splits of `decode_split`.
template <typename T, int D>
__device__ void merge_splits(
    const float* pieces, const float* stats, int heads, int q_tokens, int splits, SplitStats& scratch, T* out, float* lse) {
  const int64_t row = blockIdx.x;  // (b * HQ + h) * L + t
  const int channel = int(threadIdx.x);
  for (int s = channel; s < splits; s += D) {
    scratch.top[s] = stats[2 * (row * splits + s)];
    scratch.total[s] = stats[2 * (row * splits + s) + 1];
  }
  __syncthreads();
  float top = kNoScore, total = 0.0f, sum = 0.0f;
#pragma unroll 8
  for (int s = 0; s < splits; s++) {
    top = fmaxf(top, scratch.top[s]);
  }
#pragma unroll 8
  for (int s = 0; s < splits; s++) {
    const float weight = exp2f(scratch.top[s] - top);
    total += weight * scratch.total[s];
    sum += weight * pieces[(row * splits + s) * D + channel];
  }
  const int64_t batch = row / (heads * q_tokens), head = row / q_tokens % heads, query = row % q_tokens;
  out[((batch * q_tokens + query) * heads + head) * D + channel] = T(sum / total);
  if (channel == 0) {
    lse[row] = (top + log2f(total)) * kLn2;
  }
}

}  // namespace flux
