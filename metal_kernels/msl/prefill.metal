threadgroup T tile[flux::PrefillTile<T, D>::kElements];
const int3 at = int3(threadgroup_position_in_grid);
const int kv_head = at.y / max(q_shape[1] / k_shape[1], 1);
const int64_t line = (int64_t(at.z) * q_shape[1] + at.y) * q_shape[2];
const flux::Keys<T> keys = {
    flux::head_rows(k, k_shape, k_strides, at.z, kv_head), flux::head_rows(v, v_shape, v_strides, at.z, kv_head),
    flux::tokens_in_use(kv_tokens, k_shape, v_shape), scale * flux::kLog2e};
flux::prefill<T, D>(
    flux::head_rows(q, q_shape, q_strides, at.z, at.y), keys,
    flux::read_rule(rule, route[min(at.z, route_shape[0] - 1)]), at.x,
    flux::take_seat(simdgroup_index_in_threadgroup, thread_index_in_simdgroup), tile, out + line * D, lse + line);
