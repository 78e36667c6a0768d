threadgroup float tile[flux::DecodeTile<D>::kFloats];
const int heads_per_kv = max(q_shape[1] / k_shape[1], 1);
const int chunks = (heads_per_kv * q_shape[2] + ROWS - 1) / ROWS;
const flux::DecodeSeat seat = flux::decode_seat(
    threadgroup_position_in_grid, threadgroups_per_grid, chunks, ROWS, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
const flux::Keys<T> keys = {
    flux::head_rows(k, k_shape, k_strides, seat.batch, seat.kv_head),
    flux::head_rows(v, v_shape, v_strides, seat.batch, seat.kv_head),
    flux::tokens_in_use(kv_tokens, k_shape, v_shape), scale * flux::kLog2e};
flux::decode<T, D, ROWS, FINAL>(
    q, q_shape, q_strides, keys, heads_per_kv, flux::read_rule(rule, route[min(seat.batch, route_shape[0] - 1)]), seat,
    tile, out, stats);
