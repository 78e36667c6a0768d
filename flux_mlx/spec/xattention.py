"""XAttention's choice of blocks (arXiv 2503.16428): antidiagonal scores, then the smallest set of enough mass.

Positions are absolute: keys are positions 0..S-1, queries the last L of them; groups and blocks start at position 0.
"""

from __future__ import annotations

import numpy as np

from flux_mlx.spec.config import PatternConfig


def _groups(x: np.ndarray, stride: int, lead: int) -> np.ndarray:
    """[B, H, T, D] to [B, H, groups, stride, D]: `lead` zero tokens in front, zeros up to a whole group behind."""
    tail = -(lead + x.shape[2]) % stride
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (lead, tail), (0, 0)))
    return x.reshape(*x.shape[:2], -1, stride, x.shape[-1])


def group_scores(q: np.ndarray, k: np.ndarray, stride: int) -> np.ndarray:
    """Antidiagonal sums of the stride x stride tiles of q k^T, scaled.

    G[i, j] = sum over t < s of q[i*s + s-1-t] . k[j*s + t] / (sqrt(D) * s). A group partly outside the tokens at
    hand counts zeros there.

    Args:
        q: `[B, HQ, L, D]`.
        k: `[B, HKV, S, D]`, S >= L.
        stride: s.

    Returns:
        `[B, HQ, query groups, key groups]` float64; the first query group is group (S - L) // s.
    """
    q_groups = _groups(q, stride, (k.shape[2] - q.shape[2]) % stride)[..., ::-1, :]
    k_groups = np.repeat(_groups(k, stride, 0), q.shape[1] // k.shape[1], axis=1)
    flat_q = q_groups.reshape(*q_groups.shape[:3], -1)
    flat_k = k_groups.reshape(*k_groups.shape[:3], -1)
    return flat_q @ flat_k.swapaxes(-1, -2) / (q.shape[-1] ** 0.5 * stride)


def block_mass(q: np.ndarray, k: np.ndarray, block_size: int, stride: int) -> np.ndarray:
    """A[m, n]: attention mass of key block n as the groups of query block m see it.

    The softmax of `group_scores` runs over the key groups j <= i and is summed over both blocks' groups, so that a
    row's total is the number of groups of the query block.

    Returns:
        `[B, HQ, M, N]` float64: query blocks touched, all key blocks.
    """
    q_tokens, kv_tokens = q.shape[2], k.shape[2]
    scores = group_scores(q, k, stride)
    first = (kv_tokens - q_tokens) // stride
    rows = first + np.arange(scores.shape[2])
    columns = np.arange(scores.shape[3])
    scores = np.where(columns[None, :] <= rows[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    per_block = block_size // stride
    row_block, column_block = rows // per_block, columns // per_block
    row_starts = np.flatnonzero(np.diff(row_block, prepend=-1))
    column_starts = np.flatnonzero(np.diff(column_block, prepend=-1))
    return np.add.reduceat(np.add.reduceat(weights, row_starts, axis=2), column_starts, axis=3)


def choose_blocks(mass: np.ndarray, first_q_block: int, threshold: float, top_k_blocks: int | None) -> np.ndarray:
    """Blocks kept of each row of `mass`, bool of its shape.

    Row m keeps n = 0 and n = m, then the largest others (equal ones: the lower index first) until the kept mass
    reaches `threshold` of the row's total, or until `top_k_blocks` blocks are kept.

    Args:
        mass: `[..., M, N]`; row r is query block `first_q_block + r`.
    """
    n = np.arange(mass.shape[-1])
    m = first_q_block + np.arange(mass.shape[-2])[:, None]
    forced = (n == 0) | (n == m)
    rank_key = np.where(forced, np.inf, np.where(n < m, mass, -np.inf))
    order = np.argsort(-rank_key, axis=-1, kind="stable")
    ranked = np.take_along_axis(mass, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    rank = np.arange(mass.shape[-1])
    by_mass = before < threshold * mass.sum(-1, keepdims=True)
    more = by_mass if top_k_blocks is None else rank < top_k_blocks
    kept = np.zeros(mass.shape, bool)
    np.put_along_axis(kept, order, more | (rank < forced.sum(-1)[:, None]), axis=-1)
    return kept & (n <= m)


def select_blocks(q: np.ndarray, k: np.ndarray, pattern: PatternConfig) -> np.ndarray:
    """Blocks that xattention keeps, per query head: bool `[B, HQ, M, N]` (see `block_mass`, `choose_blocks`)."""
    mass = block_mass(q, k, pattern.block_size, pattern.stride)
    first = (k.shape[2] - q.shape[2]) // pattern.block_size
    return choose_blocks(mass, first, pattern.threshold, pattern.top_k_blocks)


def expand_blocks(kept: np.ndarray, block_size: int, q_tokens: int, kv_tokens: int) -> np.ndarray:
    """Kept blocks to the token mask, causal inside: bool `[..., M, N]` to bool `[..., L, S]`."""
    q_pos = np.arange(kv_tokens - q_tokens, kv_tokens)
    k_pos = np.arange(kv_tokens)
    rows = q_pos // block_size - (kv_tokens - q_tokens) // block_size
    tokens = kept[..., rows[:, None], (k_pos // block_size)[None, :]]
    return tokens & (k_pos[None, :] <= q_pos[:, None])
