// Inputs pieces float [B, HQ, L, splits, D] and stats float [B, HQ, L, splits, 2].
__shared__ flux::SplitStats scratch;
flux::merge_splits<T, D>(pieces, stats, pieces_shape[1], pieces_shape[2], pieces_shape[3], scratch, out, lse);
