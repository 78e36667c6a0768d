// Attention of 1 to 8 new queries over a long cache, read in place: sink and window are never copied together.
//
// q [B, HQ, L, D], k and v [B, HKV, capacity, D] by strides, T float, half or bfloat, D at most 256.
// Grid: (HKV * row chunks, B, splits) threadgroups of 256 threads; 8 * (D + 2) floats of threadgroup memory.
//
// The L queries of the HQ / HKV heads that share a KV head are rows; a threadgroup takes ROWS of them, so that a key is
// read once for all. The visible keys are numbered 0..n-1 (sink, then window) and cut into `splits` even pieces; within a
// piece the 8 SIMD-groups take keys in turn, each lane ceil(D / 32) channels. With one split the result is final;
// otherwise `merge_splits` combines the pieces.

namespace flux {

constexpr constant int kDecodeGroups = 8;

// What a SIMD-group has seen of one row: each lane some channels of the output.
template <int E>
struct Partial {
  float out[E];
  float top;
  float total;
};

// The row of a threadgroup: which head and query it is.
struct DecodeRow {
  int head;
  int query;
  bool exists;
};

METAL_FUNC DecodeRow decode_row(int index, int kv_head, int heads_per_kv, int q_tokens) {
  const int last = heads_per_kv * q_tokens - 1;
  const int bounded = min(index, last);
  const DecodeRow row = {kv_head * heads_per_kv + bounded / q_tokens, bounded % q_tokens, index <= last};
  return row;
}

template <bool DENSE, typename T, int D, int E>
METAL_FUNC void load_row(Rows<T> rows, int token, uint lane, thread float* values) {
  const device T* source = rows.data + token * rows.token_stride;
  for (int e = 0; e < E; e++) {
    const int channel = int(lane) * E + e;
    values[e] = channel < D ? float(channel_of<DENSE>(source, rows.channel_stride, channel)) : 0.0f;
  }
}

// Channels lane * E, ... of token `token`, as float32; 0 past D. The choice is the same for all threads.
template <typename T, int D, int E>
METAL_FUNC void load_channels(Rows<T> rows, int token, uint lane, thread float* values) {
  if (rows.channel_stride == 1) {
    load_row<true, T, D, E>(rows, token, lane, values);
  } else {
    load_row<false, T, D, E>(rows, token, lane, values);
  }
}

// One key for one row.
template <int E>
METAL_FUNC void see_key(thread Partial<E>& part, const thread float* query, const thread float* key, const thread float* value) {
  float score = 0.0f;
  for (int e = 0; e < E; e++) {
    score += query[e] * key[e];
  }
  score = simd_sum(score);
  const float top = max(part.top, score);
  const float rescale = fast::exp2(part.top - top);
  const float weight = fast::exp2(score - top);
  part.top = top;
  part.total = part.total * rescale + weight;
  for (int e = 0; e < E; e++) {
    part.out[e] = part.out[e] * rescale + weight * value[e];
  }
}

// The keys of a split: numbers [begin, end) of the visible ones.
struct Piece {
  Span span;
  int begin;
  int end;
};

METAL_FUNC Piece piece_of(Span span, int split, int splits) {
  const int visible = max(span.sink_end + span.end - span.window_begin, 0);
  const int size = (visible + splits - 1) / splits;
  const Piece piece = {span, min(split * size, visible), min((split + 1) * size, visible)};
  return piece;
}

METAL_FUNC int key_position(Span span, int number) {
  return number < span.sink_end ? number : span.window_begin + number - span.sink_end;
}

// Scratch of a threadgroup: a row's output, maximum and sum from each SIMD-group.
template <int D>
struct DecodeTile {
  static constexpr constant int kFloats = kDecodeGroups * (D + 2);
};

template <int D, int E>
METAL_FUNC void store_partial(Partial<E> part, uint simd_index, uint lane, threadgroup float* tile) {
  for (int e = 0; e < E; e++) {
    const int channel = int(lane) * E + e;
    if (channel < D) {
      tile[int(simd_index) * D + channel] = part.out[e];
    }
  }
  if (lane == 0) {
    tile[kDecodeGroups * D + int(simd_index)] = part.top;
    tile[kDecodeGroups * (D + 1) + int(simd_index)] = part.total;
  }
}

// One channel of the row that the SIMD-groups stored in `tile`: sum of weight * value, with maximum and sum of weights.
template <int D>
METAL_FUNC Partial<1> merge_groups(const threadgroup float* tile, int channel) {
  Partial<1> merged = {{0.0f}, kNoScore, 0.0f};
  for (int g = 0; g < kDecodeGroups; g++) {
    merged.top = max(merged.top, tile[kDecodeGroups * D + g]);
  }
  for (int g = 0; g < kDecodeGroups; g++) {
    const float weight = fast::exp2(tile[kDecodeGroups * D + g] - merged.top);
    merged.total += weight * tile[kDecodeGroups * (D + 1) + g];
    merged.out[0] += weight * tile[g * D + channel];
  }
  return merged;
}

// Where results go. Final: out [B, HQ, L, D] of T, stats = lse [B, HQ, L]. Pieces: out float [B, HQ, L, splits, D],
// stats float [B, HQ, L, splits, 2] (maximum in units of log 2, sum).
template <bool FINAL, typename Out>
METAL_FUNC void write_channel(Partial<1> merged, int64_t slot, int channel, int D, device Out* out, device float* stats) {
  const float divisor = FINAL && merged.total > 0.0f ? merged.total : 1.0f;
  out[slot * D + channel] = Out(merged.out[0] / divisor);
  if (channel == 0 && FINAL) {
    stats[slot] = merged.total > 0.0f ? (merged.top + log2(merged.total)) * kLn2 : -INFINITY;
  } else if (channel == 0) {
    stats[2 * slot] = merged.top;
    stats[2 * slot + 1] = merged.total;
  }
}

// Where a threadgroup is in the grid, and a thread in it.
struct DecodeSeat {
  int batch;
  int kv_head;
  int first_row;
  int split;
  int splits;
  uint simd_index;
  uint lane;
};

METAL_FUNC DecodeSeat decode_seat(uint3 at, uint3 groups, int row_chunks, int rows, uint simd_index, uint lane) {
  const int x = int(at.x);
  const DecodeSeat seat = {int(at.y), x / row_chunks, x % row_chunks * rows, int(at.z), int(groups.z), simd_index, lane};
  return seat;
}

// The rows' queries (in units of log 2) and spans.
template <typename T, int D, int ROWS, int E>
METAL_FUNC void load_queries(
    const device T* q, const constant int* q_shape, const constant int64_t* q_strides, DecodeSeat seat, Keys<T> keys,
    int heads_per_kv, Rule rule, thread float* query, thread Span* spans) {
  for (int r = 0; r < ROWS; r++) {
    const DecodeRow row = decode_row(seat.first_row + r, seat.kv_head, heads_per_kv, q_shape[2]);
    const Rows<T> rows = head_rows(q, q_shape, q_strides, seat.batch, row.head);
    load_channels<T, D, E>(rows, row.query, seat.lane, query + r * E);
    for (int e = 0; e < E; e++) {
      query[r * E + e] *= keys.scale;
    }
    spans[r] = query_span(rule, keys.kv_tokens - q_shape[2] + row.query, keys.kv_tokens);
  }
}

template <typename T, int D, int ROWS, bool FINAL, typename Out>
METAL_FUNC void decode(
    const device T* q, const constant int* q_shape, const constant int64_t* q_strides, Keys<T> keys, int heads_per_kv,
    Rule rule, DecodeSeat seat, threadgroup float* tile, device Out* out, device float* stats) {
  constexpr int E = (D + 31) / 32;
  float query[ROWS * E];
  Span spans[ROWS];
  load_queries<T, D, ROWS, E>(q, q_shape, q_strides, seat, keys, heads_per_kv, rule, query, spans);
  Partial<E> parts[ROWS];
  for (int r = 0; r < ROWS; r++) {
    parts[r].top = kNoScore;
    parts[r].total = 0.0f;
    for (int e = 0; e < E; e++) {
      parts[r].out[e] = 0.0f;
    }
  }
  const Span all = union_span(rule, keys.kv_tokens - q_shape[2], keys.kv_tokens - 1, keys.kv_tokens);
  const Piece piece = piece_of(all, seat.split, seat.splits);
  for (int number = piece.begin + int(seat.simd_index); number < piece.end; number += kDecodeGroups) {
    const int k_pos = key_position(all, number);
    float key[E];
    float value[E];
    load_channels<T, D, E>(keys.k, k_pos, seat.lane, key);
    load_channels<T, D, E>(keys.v, k_pos, seat.lane, value);
    for (int r = 0; r < ROWS; r++) {
      if (sees(spans[r], k_pos)) {
        see_key<E>(parts[r], query + r * E, key, value);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    const DecodeRow row = decode_row(seat.first_row + r, seat.kv_head, heads_per_kv, q_shape[2]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    store_partial<D, E>(parts[r], seat.simd_index, seat.lane, tile);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int channel = int(seat.simd_index * 32 + seat.lane);
    if (row.exists && channel < D) {
      const int64_t slot = ((int64_t(seat.batch) * q_shape[1] + row.head) * q_shape[2] + row.query);
      write_channel<FINAL>(merge_groups<D>(tile, channel), slot * seat.splits + seat.split, channel, D, out, stats);
    }
  }
}

// Combine the splits of one row: pieces [splits, D], stats [splits, 2]. A SIMD-group a row. Stats is a device pointer, or
// a constant one where all rows together have fewer than 8 of them.
template <typename T, int D, typename Stats>
METAL_FUNC void merge_splits(
    const device float* pieces, Stats stats, int splits, uint lane, device T* out, device float* lse) {
  float top = kNoScore;
  for (int s = int(lane); s < splits; s += 32) {
    top = max(top, stats[2 * s]);
  }
  top = simd_max(top);
  float total = 0.0f;
  for (int s = 0; s < splits; s++) {
    total += fast::exp2(stats[2 * s] - top) * stats[2 * s + 1];
  }
  for (int channel = int(lane); channel < D; channel += 32) {
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) {
      sum += fast::exp2(stats[2 * s] - top) * pieces[s * D + channel];
    }
    out[channel] = T(total > 0.0f ? sum / total : 0.0f);
  }
  if (lane == 0) {
    lse[0] = total > 0.0f ? (top + log2(total)) * kLn2 : -INFINITY;
  }
}

}  // namespace flux
