// Attention of 1 to 8 new queries over a long cache, read in place, in one launch.
//
// q and out [B, L, HQ, D], k and v [B, HKV, capacity, D], dense; D is FLUX_D, elements are FLUX_T (__nv_bfloat16 or
// __half), the entry is FLUX_ENTRY. Grid: (splits, HKV * chunks, B) blocks of 9 warps.
//
// The L queries of the GROUP heads that share a KV head are rows; a block takes 8 of them (rows past the last repeat
// it), so that a key is read once for all. The keys that any query sees are numbered 0..n-1 (sink, then window) and cut
// into even pieces, one for each split. A warp takes 16 keys at a time, with all their loads under way before the first
// is used, and multiplies them on tensor cores. Weights are rounded to T twice, what the first leaves over by the second.
//
// The blocks of the same rows leave their parts in `work` and take a ticket; the last to come merges the parts. Tickets
// count in the caller's array, zero before and after every launch: launches that may run at once need slots of their own.
#include "span.cuh"
#include "warp.cuh"

namespace flux {

constexpr int kWarps = 9;  // 16 splits of 9 * 16 keys, 128 blocks of 8 KV heads, hold the default pattern on an H100
constexpr int kSplitsAtOnce = 8;  // whose parts are loaded before the first is merged
constexpr int kNowhere = 0x7fffffff;  // a position that no query sees
constexpr int kRouteSparse = 2;  // code of flux_mlx.spec.Route
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNoScore = -1e30f;  // below every score; its differences are finite

template <typename T>
__device__ uint32_t packed(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

// What is left of a weight that was rounded to T.
template <typename T>
__device__ float rest(float weight) {
  return weight - float(T(weight));
}

// What a warp has seen, its lanes being 4 g + t: maximum and (this lane's part of the) sum of row g; and outputs of rows
// 2 t and 2 t + 1 in channels 64 s + 8 g + 2 j and the next, at [4 s + j]: c[0] and c[2] of row 2 t, c[1] and c[3] of 2 t + 1.
template <int D>
struct Partial {
  float out[D / 16][4];
  float top;
  float total;
};

// Channels in matrix products are in an order in which a lane's eight neighbours are two steps of the product.
template <typename T, int D>
__device__ void score(const Pack (&q)[D / 32], const Pack (&keys)[2][D / 32], float (&scores)[2][4]) {
  #pragma unroll
  for (int s = 0; s < D / 32; s++) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t rows[4] = {q[s].words[2 * half], 0, q[s].words[2 * half + 1], 0};
      #pragma unroll
      for (int n = 0; n < 2; n++) {
        const uint32_t columns[2] = {keys[n][s].words[2 * half], keys[n][s].words[2 * half + 1]};
        multiply_add(scores[n], rows, columns, T());
      }
    }
  }
}

template <typename T, int D>
__device__ void add_values(const Pack (&values)[4][D / 64], const float (&weights)[4], Partial<D>& part) {
  const uint32_t rounded[2] = {packed<T>(weights[0], weights[1]), packed<T>(weights[2], weights[3])};
  const uint32_t rests[2] = {
      packed<T>(rest<T>(weights[0]), rest<T>(weights[1])), packed<T>(rest<T>(weights[2]), rest<T>(weights[3]))};
  #pragma unroll
  for (int s = 0; s < D / 64; s++) {
    #pragma unroll
    for (int j = 0; j < kWords; j++) {
      const uint32_t w[4] = {values[0][s].words[j], values[1][s].words[j], values[2][s].words[j], values[3][s].words[j]};
      const uint32_t channels[4] = {
          __byte_perm(w[0], w[1], 0x5410), __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x5410),
          __byte_perm(w[2], w[3], 0x7632)};
      multiply_add(part.out[kWords * s + j], channels, rounded, T());
      multiply_add(part.out[kWords * s + j], channels, rests, T());
    }
  }
}

// Scores in units of log 2 to weights; what was seen before is scaled to the new maximum.
template <int D>
__device__ void weigh(float (&scores)[4], Partial<D>& part) {
  const unsigned t = threadIdx.x % 4;
  float top = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3]));
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
  top = fmaxf(part.top, fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2)));
  const float keep = exp2f(part.top - top);
  const float keeps[2] = {__shfl_sync(kAllLanes, keep, 8 * t), __shfl_sync(kAllLanes, keep, 8 * t + 4)};
  part.top = top;
  part.total *= keep;
  #pragma unroll
  for (int i = 0; i < 4; i++) {
    scores[i] = exp2f(scores[i] - top);
    part.total += scores[i];
  }
  #pragma unroll
  for (int n = 0; n < D / 16; n++) {
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      part.out[n][i] *= keeps[i % 2];
    }
  }
}

// Sixteen keys from number `first` on, for the rows of q.
template <typename T, int D>
__device__ void see_keys(
    const T* k, const T* v, const Piece& piece, int first, const Query& query, const Pack (&q)[D / 32], float scale,
    Partial<D>& part) {
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  Pack keys[2][D / 32], values[4][D / 64];
  int positions[4];
  #pragma unroll
  for (int n = 0; n < 2; n++) {
    const T* key = k + int64_t(position_of(piece, first + 8 * n + g)) * D + 8 * t;
    #pragma unroll
    for (int s = 0; s < D / 32; s++) {
      keys[n][s] = load_once(key + 32 * s);
    }
  }
  #pragma unroll
  for (int i = 0; i < 4; i++) {
    const int number = first + i / 2 * 8 + 2 * t + i % 2;
    const int position = position_of(piece, number);
    const T* value = v + int64_t(position) * D + 8 * g;
    positions[i] = number < piece.end ? position : kNowhere;
    #pragma unroll
    for (int s = 0; s < D / 64; s++) {
      values[i][s] = load_once(value + 64 * s);
    }
  }
  __syncwarp();  // or the compiler would move loads of values behind the scores
  float products[2][4] = {}, weights[4];
  score<T, D>(q, keys, products);
  #pragma unroll
  for (int i = 0; i < 4; i++) {
    weights[i] = sees(query, positions[i]) ? products[i / 2][i % 2] * scale : -INFINITY;
  }
  weigh(weights, part);
  add_values<T, D>(values, weights, part);
}

// Scratch of a block: of each warp and row D outputs (4 more keep rows in banks of their own), the maximum and the sum.
// And its rows.
template <int D>
struct alignas(16) Tile {
  float out[kWarps][kRows][D + 4];
  float top[kWarps][kRows];
  float total[kWarps][kRows];
  Row rows[kRows];
  bool is_last;
};

template <int D>
__device__ void store(const Partial<D>& part, Tile<D>& tile) {
  const unsigned warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float total = part.total + __shfl_xor_sync(kAllLanes, part.total, 1);
  total += __shfl_xor_sync(kAllLanes, total, 2);
  if (t == 0) {
    tile.top[warp][g] = part.top;
    tile.total[warp][g] = total;
  }
  #pragma unroll
  for (int n = 0; n < D / 16; n += 2) {  // two products of a lane: four channels that lie together
    #pragma unroll
    for (int r = 0; r < 2; r++) {
      *reinterpret_cast<float4*>(&tile.out[warp][2 * t + r][n / 4 * 64 + 8 * g + n % 4 * 2]) =
          make_float4(part.out[n][r], part.out[n][r + 2], part.out[n + 1][r], part.out[n + 1][r + 2]);
    }
  }
}

// Four channels of a row, with its maximum and sum: parts are merged into it.
struct Merged {
  float4 out;
  float top;
  float total;
};

__device__ inline void merge(Merged& merged, float top, float total, const float4& out) {
  const float highest = fmaxf(merged.top, top);
  const float keep = exp2f(merged.top - highest), take = exp2f(top - highest);
  merged.top = highest;
  merged.total = merged.total * keep + total * take;
  merged.out.x = merged.out.x * keep + out.x * take;
  merged.out.y = merged.out.y * keep + out.y * take;
  merged.out.z = merged.out.z * keep + out.z * take;
  merged.out.w = merged.out.w * keep + out.w * take;
}

// Parts of the blocks in `work`: outputs [groups, splits, 8, D], maxima and sums [groups, splits, 8, 2], lse [B, HQ, L].
struct Work {
  float* out;
  float* stats;
  float* lse;
};

template <int D>
__device__ Work work_of(float* work) {
  const int64_t parts = int64_t(gridDim.x) * gridDim.y * gridDim.z * kRows;
  return {work, work + parts * D, work + parts * (D + 2)};
}

// Four channels of a row: what a thread merges and writes.
struct Item {
  unsigned r, channel;
};

template <int D>
__device__ Item item_of() {
  static_assert(kRows * D / 4 <= kWarps * 32, "one item a thread");
  return {threadIdx.x / (D / 4), threadIdx.x % (D / 4) * 4};
}

// This block's part, merged from its warps.
template <int D>
__device__ void write_part(const Tile<D>& tile, const Seat& seat, const Work& work, int64_t group) {
  const Item item = item_of<D>();
  if (item.r >= seat.rows) {
    return;
  }
  Merged merged = {{}, kNoScore, 0.0f};
  #pragma unroll 3
  for (int w = 0; w < kWarps; w++) {
    const float4 out = *reinterpret_cast<const float4*>(&tile.out[w][item.r][item.channel]);
    merge(merged, tile.top[w][item.r], tile.total[w][item.r], out);
  }
  const int64_t slot = (group * gridDim.x + blockIdx.x) * kRows + item.r;
  __stcg(reinterpret_cast<float4*>(work.out + slot * D + item.channel), merged.out);
  if (item.channel == 0) {
    __stcg(reinterpret_cast<float2*>(work.stats + 2 * slot), make_float2(merged.top, merged.total));
  }
}

// Whether this block is the last of its rows; then it sees what the others have written.
template <int D>
__device__ bool is_last(unsigned* ticket, Tile<D>& tile) {
  __syncthreads();
  if (threadIdx.x == 0) {
    tile.is_last = take_ticket(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  return tile.is_last;
}

// The rows, merged from the parts of all splits.
template <typename T, int D>
__device__ void write_rows(const Tile<D>& tile, const Seat& seat, const Work& work, int64_t group, T* out) {
  const Item item = item_of<D>();
  if (item.r >= seat.rows) {
    return;
  }
  const int splits = gridDim.x;
  const int64_t slot = group * splits * kRows + item.r;
  const float4* outs = reinterpret_cast<const float4*>(work.out + slot * D + item.channel);
  const float2* stats = reinterpret_cast<const float2*>(work.stats + 2 * slot);
  Merged merged = {{}, kNoScore, 0.0f};
  for (int first = 0; first < splits; first += kSplitsAtOnce) {
    #pragma unroll
    for (int i = 0; i < kSplitsAtOnce; i++) {
      const int split = first + i < splits ? first + i : splits - 1;
      const float2 top_total = __ldcg(stats + split * kRows);
      const float4 part = __ldcg(outs + split * (kRows * D / 4));
      merge(merged, first + i < splits ? top_total.x : -INFINITY, top_total.y, part);
    }
  }
  const float scale = 1.0f / merged.total;
  __stcg(
      reinterpret_cast<uint2*>(out + tile.rows[item.r].token * D + item.channel),
      make_uint2(
          packed<T>(merged.out.x * scale, merged.out.y * scale), packed<T>(merged.out.z * scale, merged.out.w * scale)));
  if (item.channel == 0) {
    work.lse[tile.rows[item.r].lse] = (merged.top + log2f(merged.total)) * kLn2;
  }
}

template <typename T, int D>
__device__ void decode(
    const T* q, const T* k, const T* v, bool is_sparse, unsigned* tickets, T* out, float* parts, const Shape& shape,
    const Pattern& pattern, float scale, Tile<D>& tile) {
  const Seat seat = seat_of(shape);
  const Row row = row_of(shape, seat, threadIdx.x % 32 / 4);
  const Query query = query_of(shape, pattern, row.query, is_sparse);
  const Piece piece = piece_of(query_of(shape, pattern, 0, is_sparse).span, shape.kv_tokens);
  const int64_t first_value = (int64_t(blockIdx.z) * shape.kv_heads + seat.kv_head) * shape.capacity * D;
  Pack queries[D / 32];
  const T* query_row = q + row.token * D + threadIdx.x % 4 * 8;
  #pragma unroll
  for (int s = 0; s < D / 32; s++) {
    queries[s] = load_once(query_row + 32 * s);
  }
  if (threadIdx.x < 32 && threadIdx.x % 4 == 0) {
    tile.rows[threadIdx.x / 4] = row;
  }
  Partial<D> part = {{}, kNoScore, 0.0f};
  #pragma unroll 1
  for (int first = piece.begin + int(threadIdx.x / 32) * kTileKeys; first < piece.end; first += kWarps * kTileKeys) {
    see_keys<T, D>(k + first_value, v + first_value, piece, first, query, queries, scale * kLog2e, part);
  }
  const int64_t group = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const Work work = work_of<D>(parts);
  store(part, tile);
  __syncthreads();
  write_part(tile, seat, work, group);
  if (is_last(tickets + group, tile)) {
    write_rows<T, D>(tile, seat, work, group, out);
  }
}

}  // namespace flux

// route: int32 [B], read where route_of_all is 0. tickets: [slots, B * HKV * chunks], zeros. work: see flux::Work.
extern "C" __global__ void __launch_bounds__(flux::kWarps * 32) FLUX_ENTRY(
    const FLUX_T* __restrict__ q, const FLUX_T* __restrict__ k, const FLUX_T* __restrict__ v,
    const int* __restrict__ route, unsigned* tickets, FLUX_T* out, float* work, int kv_heads, int group, int q_tokens,
    int capacity, int block_size, int window_blocks, int sink_span, int route_of_all, float scale, int kv_tokens,
    int slot) {
  __shared__ flux::Tile<FLUX_D> tile;
  const flux::Shape shape = {unsigned(kv_heads), unsigned(group), unsigned(q_tokens), kv_tokens, capacity};
  const flux::Pattern pattern = {unsigned(block_size), window_blocks, sink_span};
  const bool is_sparse = (route_of_all ? route_of_all : route[blockIdx.z]) == flux::kRouteSparse;
  tickets += int64_t(slot) * gridDim.y * gridDim.z;
  flux::decode<FLUX_T, FLUX_D>(q, k, v, is_sparse, tickets, out, work, shape, pattern, scale, tile);
}
