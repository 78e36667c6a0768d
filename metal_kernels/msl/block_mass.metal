threadgroup float tile[flux::kMassGroups * 16];
const int3 at = int3(threadgroup_position_in_grid);
const int kv_head = at.y / max(q_shape[1] / k_shape[1], 1);
const int rows = int(threadgroups_per_grid.x);
const int key_blocks = (k_shape[2] + block_size - 1) / block_size;
const int64_t line = (int64_t(at.z) * q_shape[1] + at.y) * rows + at.x;
const flux::GroupScorer<T> scorer = {
    flux::head_rows(q, q_shape, q_strides, at.z, at.y), flux::head_rows(k, k_shape, k_strides, at.z, kv_head),
    k_shape[2], stride, q_shape[3], flux::kLog2e / (sqrt(float(q_shape[3])) * float(stride))};
flux::block_mass(
    scorer, block_size / stride, at.x, key_blocks, simdgroup_index_in_threadgroup, thread_index_in_simdgroup, tile,
    mass + line * key_blocks);
