const int3 at = int3(threadgroup_position_in_grid);
const int kv_head = at.y / max(q_shape[1] / k_shape[1], 1);
const int key_blocks = (k_shape[2] + block_size - 1) / block_size;
const int rows = key_blocks - (k_shape[2] - q_shape[2]) / block_size;
const int row = at.x * flux::kMassBlocks + int(simdgroup_index_in_threadgroup);
const int64_t line = (int64_t(at.z) * q_shape[1] + at.y) * rows + row;
const flux::GroupScorer<T> scorer = {
    flux::head_rows(q, q_shape, q_strides, at.z, at.y), flux::head_rows(k, k_shape, k_strides, at.z, kv_head),
    k_shape[2], stride, q_shape[3], flux::kLog2e / (sqrt(float(q_shape[3])) * float(stride))};
if (row < rows) {
  flux::block_mass(scorer, block_size / stride, row, key_blocks, thread_index_in_simdgroup, mass + line * key_blocks);
}
