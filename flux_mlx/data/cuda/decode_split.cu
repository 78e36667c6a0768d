// Inputs q, k, v and route (int32 [B], codes of flux_mlx.spec.Route). D, ROWS, BLOCK, SINK, WINDOW and SCALE_BITS (a
// float's) are template arguments.
__shared__ flux::Tile<D, ROWS> tile;
constexpr int kRouteSparse = 2;
const int heads_per_kv = q_shape[1] / k_shape[1];
const flux::Seat seat = flux::seat_of<ROWS>(heads_per_kv, q_shape[2]);
flux::decode_split<T, D, ROWS, BLOCK, SINK, WINDOW>(
    flux::head_rows(k, k_strides, seat.batch, seat.kv_head), flux::head_rows(v, v_strides, seat.batch, seat.kv_head), q,
    q_strides, seat, q_shape[1], heads_per_kv, q_shape[2], k_shape[2], __int_as_float(SCALE_BITS),
    route[seat.batch] == kRouteSparse, tile, pieces, stats);
