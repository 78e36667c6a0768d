// What a query may see, by position: flux_mlx/spec/pattern.py restated. Keys are positions 0..S-1, queries the last L.
//
// A span is the set of keys [0, sink_end) and [window_begin, end). Streaming gives each query a span; full attention
// is the span with window_begin 0, and so are the queries that triangle makes dense.

#include <metal_stdlib>

using namespace metal;

namespace flux {

constexpr constant int kNoLimit = 0x7fffffff;
constexpr constant int kRouteSparse = 2;  // flux_mlx.spec.Route.SPARSE; every other code computes full attention

// The words of the `rule` buffer. Queries at positions [dense_from, dense_to) see every earlier key.
struct Rule {
  int block_size;
  int sink_blocks;
  int window_blocks;
  int dense_from;
  int dense_to;
};

struct Span {
  int sink_end;
  int window_begin;
  int end;
};

// `words` int32 [5], `route` the code of this batch row. Every query is dense unless the route is SPARSE.
METAL_FUNC Rule read_rule(const constant int32_t* words, int route) {
  Rule rule = {max(int(words[0]), 1), max(int(words[1]), 0), max(int(words[2]), 1), words[3], words[4]};
  if (route != kRouteSparse) {
    rule.dense_from = 0;
    rule.dense_to = kNoLimit;
  }
  return rule;
}

METAL_FUNC bool is_dense(Rule rule, int q_pos) { return q_pos >= rule.dense_from && q_pos < rule.dense_to; }

// First position of the local blocks of the query at `q_pos`, as streaming sees it.
METAL_FUNC int streaming_begin(Rule rule, int q_pos) {
  return max(0, q_pos / rule.block_size - rule.window_blocks + 1) * rule.block_size;
}

METAL_FUNC int sink_end(Rule rule, int kv_tokens) {
  return min(min(rule.sink_blocks, kv_tokens / rule.block_size + 1) * rule.block_size, kv_tokens);
}

// The keys that the query at `q_pos` sees, 0 <= q_pos < kv_tokens.
METAL_FUNC Span query_span(Rule rule, int q_pos, int kv_tokens) {
  const int begin = is_dense(rule, q_pos) ? 0 : streaming_begin(rule, q_pos);
  const Span span = {sink_end(rule, kv_tokens), begin, q_pos + 1};
  return span;
}

METAL_FUNC bool sees(Span span, int k_pos) {
  return k_pos < span.end && (k_pos < span.sink_end || k_pos >= span.window_begin);
}

// Union of the spans of the queries first..last, its two parts disjoint: where they touch, all is window.
METAL_FUNC Span union_span(Rule rule, int first, int last, int kv_tokens) {
  const bool any_dense = first < rule.dense_to && last >= rule.dense_from;
  Span span = {sink_end(rule, kv_tokens), any_dense ? 0 : streaming_begin(rule, first), last + 1};
  if (span.window_begin <= span.sink_end) {
    span.sink_end = 0;
    span.window_begin = 0;
  }
  return span;
}

// Keys from here to the query itself are visible to each of the queries first..last.
METAL_FUNC int common_begin(Rule rule, int first, int last) {
  const bool all_dense = first >= rule.dense_from && last < rule.dense_to;
  return all_dense ? 0 : streaming_begin(rule, last);
}

}  // namespace flux
