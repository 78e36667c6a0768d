// What a block of the decode kernel works on: its query rows, and the keys that they see, by number.
#pragma once

#include <cstdint>

namespace flux {

constexpr int kRows = 8;  // of a block: columns of a matrix product
constexpr int kTileKeys = 16;  // of a warp at once

struct Shape {
  unsigned kv_heads, group, q_tokens;
  int kv_tokens, capacity;
};

struct Pattern {
  unsigned block_size;
  int window_blocks, sink_span;
};

// What a query sees: keys [0, sink_end) and [window_begin, its own position].
struct Span {
  int sink_end;
  int window_begin;
};

__device__ inline Span span_of(const Pattern& pattern, unsigned q_pos, bool is_sparse) {
  const int first_block = is_sparse ? int(q_pos / pattern.block_size) - pattern.window_blocks + 1 : 0;
  const int begin = first_block > 0 ? first_block * int(pattern.block_size) : 0;
  return {begin < pattern.sink_span ? begin : pattern.sink_span, begin};
}

// Where a block is: its KV head, its first row and how many rows it has.
struct Seat {
  unsigned kv_head, first_row, rows;
};

__device__ inline Seat seat_of(const Shape& shape) {
  const unsigned rows = shape.group * shape.q_tokens, chunks = (rows + kRows - 1) / kRows;
  const unsigned kv_head = blockIdx.y / chunks, first_row = (blockIdx.y - kv_head * chunks) * kRows;
  return {kv_head, first_row, rows - first_row < kRows ? rows - first_row : kRows};
}

// A row of a block: its query, and where it lies in q and out (in rows of D) and in lse. Rows past the last repeat it.
struct Row {
  unsigned query;
  int64_t token, lse;
};

__device__ inline Row row_of(const Shape& shape, const Seat& seat, unsigned r) {
  const unsigned index = seat.first_row + (r < seat.rows ? r : seat.rows - 1), query = index % shape.q_tokens;
  const unsigned heads = shape.kv_heads * shape.group, head = seat.kv_head * shape.group + index / shape.q_tokens;
  const int64_t batch = blockIdx.z;
  return {query, (batch * shape.q_tokens + query) * heads + head, (batch * heads + head) * shape.q_tokens + query};
}

// A query: its position and what it sees.
struct Query {
  int position;
  Span span;
};

__device__ inline Query query_of(const Shape& shape, const Pattern& pattern, int query, bool is_sparse) {
  const int position = shape.kv_tokens - shape.q_tokens + query;
  return {position, span_of(pattern, position, is_sparse)};
}

__device__ inline bool sees(const Query& query, int position) {
  return position <= query.position && (position < query.span.sink_end || position >= query.span.window_begin);
}

// The keys [begin, end) of a split, by number; those below sink_end are the sink's.
struct Piece {
  int begin;
  int end;
  Span span;
};

__device__ inline Piece piece_of(const Span& span, int kv_tokens) {
  const int visible = span.sink_end + kv_tokens - span.window_begin;
  const int size = ((visible + gridDim.x - 1) / gridDim.x + kTileKeys - 1) / kTileKeys * kTileKeys;
  const int begin = int(blockIdx.x) * size < visible ? int(blockIdx.x) * size : visible;
  return {begin, begin + size < visible ? begin + size : visible, span};
}

// Position of a key by number; numbers past the end are the piece's first key.
__device__ inline int position_of(const Piece& piece, int number) {
  const int known = number < piece.end ? number : piece.begin;
  return known < piece.span.sink_end ? known : piece.span.window_begin + known - piece.span.sink_end;
}

}  // namespace flux
