// Inputs pieces float [B, HQ, L, splits, D] and stats float [B, HQ, L, splits, 2].
flux::merge_splits<T, D>(pieces, stats, pieces_shape[1], pieces_shape[2], pieces_shape[3], out, lse);
