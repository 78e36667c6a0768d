const int64_t row = threadgroup_position_in_grid.x;
const int splits = pieces_shape[3];
flux::merge_splits<T, D>(
    pieces + row * splits * D, stats + row * splits * 2, splits, thread_index_in_simdgroup, out + row * D, lse + row);
