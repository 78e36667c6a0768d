const int3 at = int3(threadgroup_position_in_grid);
const int parts = int(threadgroups_per_grid.x);
flux::pool_part(
    queries, queries_shape, queries_strides, pool_tokens, at.y, at.x, int(thread_index_in_threadgroup),
    sums + (int64_t(at.y) * parts + at.x) * queries_shape[3]);
