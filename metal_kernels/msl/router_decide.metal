threadgroup float pooled[D];
threadgroup float wide[8 * D];
threadgroup float narrow[2 * D];
const int batch = int(threadgroup_position_in_grid.y);
const uint group = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const int parts = sums_shape[1];
flux::finish_pool(sums + int64_t(batch) * parts * D, parts, D, count, int(group * 32 + lane), pooled);
flux::linear(encoder_0_weight, encoder_0_bias, 8 * D, D, true, pooled, wide, group, lane);
flux::linear(encoder_2_weight, encoder_2_bias, 2 * D, 8 * D, false, wide, narrow, group, lane);
flux::linear(head_0_weight, head_0_bias, 4 * D, 2 * D, true, narrow, wide, group, lane);
flux::linear(head_2_weight, head_2_bias, D, 4 * D, true, wide, narrow, group, lane);
flux::linear(head_4_weight, head_4_bias, 2, D, false, narrow, pooled, group, lane);
if (group == 0 && lane == 0) {
  flux::write_decision(pooled, logits + 2 * batch, route + batch);
}
