"""Full and sparse attention in plain Torch, one block of queries at a time: the readable form, on any device.

Scores and sums are float32 (float64 for float64 input). Memory is one block of rows, forward and backward: the
backward computes the rows again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from cuda_reference.pattern import visible
from cuda_reference.xattention import select_blocks
from flux_mlx.spec import PatternConfig

ROWS_PER_STEP = 256  # queries whose scores exist at one time

Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (q_pos [rows, 1], k_pos [1, keys]) to bool


def masked_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T + mask) v for the rows and keys at hand.

    Args:
        q: `[B, HQ, R, D]`; query head h reads KV head h // (HQ / HKV).
        k: `[B, HKV, T, D]`.
        v: `[B, HKV, T, D]`.
        mask: bool, broadcasts to `[B, HQ, R, T]`; False hides a key.
        scale: Multiplier of the scores.

    Returns:
        (out `[B, HQ, R, D]` of q's dtype, lse `[B, HQ, R]` natural log). A row that sees nothing has 0 and -inf.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(work)  # [B, HKV, G, R, D]
    scores = scale * (grouped @ k.to(work).unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top.isneginf(), 0.0)
    weights = (scores - top).exp()  # divided by their own sum: exp(scores - lse) would carry the rounding of lse
    total = weights.sum(-1, keepdim=True)
    out = (weights.unflatten(1, (k.shape[1], -1)) @ v.to(work).unsqueeze(2)).flatten(1, 2)
    return (out / total.masked_fill(total == 0, 1.0)).to(q.dtype), (top + total.log()).squeeze(-1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, spans: list[slice], mask: Mask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `q`, whose first has position `first`, over the keys of `spans`."""
    q_pos = torch.arange(first, first + q.shape[2], device=q.device)
    k_pos = torch.cat([torch.arange(span.start, span.stop, device=q.device) for span in spans])
    k, v = (torch.cat([x[:, :, span] for span in spans], dim=2) for x in (k, v))
    return masked_rows(q, k, v, mask(q_pos[:, None], k_pos[None, :]), scale)


def _by_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float, pattern: PatternConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, `ROWS_PER_STEP` at a time. With `pattern`, keys outside its sink and window are never touched."""
    offset = k.shape[2] - q.shape[2]
    remember = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    parts = []
    for start in range(0, q.shape[2], ROWS_PER_STEP):
        rows = q[:, :, start : start + ROWS_PER_STEP]
        first, stop = offset + start, offset + start + rows.shape[2]
        near = 0 if pattern is None else pattern.window_start(first)
        spans = [slice(near, stop)] if near == 0 else [slice(0, min(near, pattern.sink_span)), slice(near, stop)]
        args = (rows, k, v, first, spans, mask, scale)
        parts.append(checkpoint(_attend, *args, use_reentrant=False) if remember else _attend(*args))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def full_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention: (out `[B, HQ, L, D]`, lse `[B, HQ, L]`). Shapes as `cuda_reference.attention`."""
    return _by_rows(q, k, v, lambda q_pos, k_pos: k_pos <= q_pos, scale)


def streaming_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: PatternConfig, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sink and window: (out, lse) as `full_attention`. `pattern.name` is not looked at."""
    return _by_rows(q, k, v, lambda q_pos, k_pos: visible(pattern, q_pos, k_pos), scale, pattern)


def block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, block_size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside the kept blocks, bool `[B, HQ, M, N]` as `spec.expand_blocks`: (out, lse)."""
    first_block = (k.shape[2] - q.shape[2]) // block_size

    def mask(q_pos: torch.Tensor, k_pos: torch.Tensor) -> torch.Tensor:
        return kept[..., q_pos // block_size - first_block, k_pos // block_size] & (k_pos <= q_pos)

    return _by_rows(q, k, v, mask, scale)


def xattention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: PatternConfig, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """XAttention's exact prefill: choose blocks without gradient, then attend inside them. (out, lse)."""
    with torch.no_grad():
        kept = select_blocks(q, k, pattern)
    return block_attention(q, k, v, kept, pattern.block_size, scale)
