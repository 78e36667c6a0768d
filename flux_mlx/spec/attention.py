"""Attention in float64: the oracle of every kernel. Keys are positions 0..S-1, queries the last L of them."""

from __future__ import annotations

import numpy as np

from flux_mlx.spec.config import PatternConfig
from flux_mlx.spec.pattern import visible_mask
from flux_mlx.spec.xattention import expand_blocks, select_blocks


def masked_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale * q k^T + mask) v.

    Args:
        q: `[B, HQ, L, D]`, any real dtype; computed in float64.
        k: `[B, HKV, S, D]`; query head h reads KV head h // (HQ / HKV).
        v: `[B, HKV, S, D]`.
        mask: bool, broadcasts to `[B, HQ, L, S]`; False hides a key.
        scale: Multiplier of the scores.

    Returns:
        (out `[B, HQ, L, D]` float64, lse `[B, HQ, L]` float64, natural log). A row that sees nothing has out 0 and
        lse -inf.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = np.where(mask, scale * (q @ k.swapaxes(-1, -2)), -np.inf)  # [B, HQ, L, S]
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(-1, keepdims=True)
    out = (weights @ v) / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        lse = (np.where(np.isfinite(top), top, 0.0) + np.log(total))[..., 0]
    return out, lse


def full_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention. Shapes and results as `masked_attention`; `scale` defaults to D**-0.5."""
    q_tokens, kv_tokens = q.shape[2], k.shape[2]
    mask = np.tri(q_tokens, kv_tokens, kv_tokens - q_tokens, dtype=bool)
    return masked_attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def sparse_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pattern: PatternConfig,
    *,
    prompt_tokens: int | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention restricted to `pattern`. Shapes and results as `masked_attention`.

    Args:
        prompt_tokens: Length of the whole prompt in exact prefill; None (chunked calls, decode) means streaming.
        scale: Multiplier of the scores, D**-0.5 by default.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if pattern.name == "xattention" and prompt_tokens is not None:
        mask = expand_blocks(select_blocks(q, k, pattern), pattern.block_size, q.shape[2], k.shape[2])
    else:
        mask = visible_mask(pattern, q.shape[2], k.shape[2], prompt_tokens)
    return masked_attention(q, k, v, mask, scale)
