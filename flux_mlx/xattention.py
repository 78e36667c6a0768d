"""XAttention in MLX: the steps of `flux_mlx.spec.xattention`, then attention over each query block's kept blocks."""

from __future__ import annotations

import mlx.core as mx

from flux_mlx.spec import PatternConfig


def _groups(x: mx.array, stride: int, lead: int) -> mx.array:
    """[B, H, T, D] to [B, H, groups, stride, D]: `lead` zero tokens in front, zeros up to a whole group behind."""
    B, H, T, D = x.shape
    x = mx.pad(x.astype(mx.float32), ((0, 0), (0, 0), (lead, -(lead + T) % stride), (0, 0)))
    return x.reshape(B, H, -1, stride, D)


def group_scores(q: mx.array, k: mx.array, stride: int) -> mx.array:
    """Antidiagonal sums of the stride x stride tiles of q k^T, scaled: float32 `[B, HQ, query groups, key groups]`."""
    B, HQ, L, D = q.shape
    HKV = k.shape[1]
    q_groups = _groups(q, stride, (k.shape[2] - L) % stride)[..., ::-1, :].reshape(B, HKV, HQ // HKV, -1, stride * D)
    k_groups = _groups(k, stride, 0).reshape(B, HKV, 1, -1, stride * D)
    scores = q_groups @ k_groups.swapaxes(-1, -2) / (D**0.5 * stride)
    return scores.reshape(B, HQ, *scores.shape[-2:])


def _sum_by_block(x: mx.array, axis: int, first_group: int, per_block: int) -> mx.array:
    """Sum groups into blocks along `axis`; group 0 of the axis is the absolute group `first_group`."""
    lead = first_group % per_block
    pad = [(0, 0)] * x.ndim
    pad[axis] = (lead, -(lead + x.shape[axis]) % per_block)
    x = mx.pad(x, pad)
    return x.reshape(*x.shape[:axis], -1, per_block, *x.shape[axis + 1 :]).sum(axis + 1)


def block_mass(q: mx.array, k: mx.array, block_size: int, stride: int) -> mx.array:
    """Attention mass of each key block as each query block sees it: float32 `[B, HQ, M, N]`."""
    scores = group_scores(q, k, stride)
    first = (k.shape[2] - q.shape[2]) // stride
    rows = first + mx.arange(scores.shape[2])[:, None]
    scores = mx.where(mx.arange(scores.shape[3])[None, :] <= rows, scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1, precise=True)
    per_block = block_size // stride
    return _sum_by_block(_sum_by_block(weights, 2, first, per_block), 3, 0, per_block)


def choose_blocks(mass: mx.array, first_q_block: int, threshold: float, top_k_blocks: int | None) -> mx.array:
    """Blocks kept of each row, bool `[..., M, N]`: the first, the diagonal, then the largest until enough."""
    n = mx.arange(mass.shape[-1])
    m = first_q_block + mx.arange(mass.shape[-2])[:, None]
    forced = (n == 0) | (n == m)
    rank_key = mx.where(forced, mx.inf, mx.where(n < m, mass, -mx.inf))
    order = mx.argsort(-rank_key, axis=-1)  # MLX sorts are stable: of equal blocks the lower index comes first
    ranked = mx.take_along_axis(mass, order, axis=-1)
    by_mass = mx.cumsum(ranked, axis=-1) - ranked < threshold * mass.sum(-1, keepdims=True)
    more = by_mass if top_k_blocks is None else mx.broadcast_to(n < top_k_blocks, mass.shape)
    kept = mx.put_along_axis(mx.zeros(mass.shape, mx.bool_), order, more | (n < forced.sum(-1)[:, None]), axis=-1)
    return kept & (n <= m)


def select_blocks(q: mx.array, k: mx.array, pattern: PatternConfig) -> mx.array:
    """Blocks that xattention keeps, per query head: bool `[B, HQ, M, N]`."""
    mass = block_mass(q, k, pattern.block_size, pattern.stride)
    first = (k.shape[2] - q.shape[2]) // pattern.block_size
    return choose_blocks(mass, first, pattern.threshold, pattern.top_k_blocks)


def attend(q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, scale: float) -> mx.array:
    """Attention over the chosen blocks. Shapes as in `flux_mlx.attention.sparse_attention`.

    Each query block attends to its heads' kept blocks, gathered and padded to the largest count among the heads.
    """
    block, kv_tokens = pattern.block_size, k.shape[2]
    offset = kv_tokens - q.shape[2]
    kept = select_blocks(q, k, pattern)
    counts = kept.sum(-1)  # [B, HQ, M]
    order = mx.argsort(~kept, axis=-1)
    pad = ((0, 0), (0, 0), (0, -kv_tokens % block), (0, 0))
    k_blocks, v_blocks = (mx.pad(x, pad).reshape(*x.shape[:2], -1, block, x.shape[-1]) for x in (k, v))
    outputs = []
    for row, widest in enumerate(counts.max(axis=(0, 1)).tolist()):
        start = max(offset, (offset // block + row) * block)
        stop = min(kv_tokens, (offset // block + row + 1) * block)
        rows = q[:, :, start - offset : stop - offset]
        chosen = order[:, :, row, :widest]  # [B, HQ, W]
        valid = mx.arange(widest) < counts[:, :, row, None]
        outputs.append(_attend_row(rows, k_blocks, v_blocks, chosen, valid, start, scale))
    return mx.concatenate(outputs, axis=2)


def _attend_row(
    q: mx.array, k_blocks: mx.array, v_blocks: mx.array, chosen: mx.array, valid: mx.array, start: int, scale: float
) -> mx.array:
    """Queries `[B, HQ, R, D]` from position `start` over the blocks `chosen`, int `[B, HQ, W]`, where `valid`."""
    B, HQ, R, _ = q.shape
    block = k_blocks.shape[3]
    batch = mx.arange(B)[:, None, None]
    kv_head = (mx.arange(HQ) // (HQ // k_blocks.shape[1]))[None, :, None]
    keys, values = (x[batch, kv_head, chosen].reshape(B, HQ, -1, x.shape[-1]) for x in (k_blocks, v_blocks))
    k_pos = (chosen[..., None] * block + mx.arange(block)).reshape(B, HQ, 1, -1)
    inside = mx.repeat(valid, block, axis=-1)[:, :, None, :]
    mask = inside & (k_pos <= (start + mx.arange(R))[:, None])
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
