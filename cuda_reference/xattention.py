"""XAttention's choice of blocks in Torch operations: `flux_mlx.spec.xattention` on tensors, step by step.

Positions are absolute: keys are positions 0..S-1, queries the last L of them; groups and blocks start at position 0.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from flux_mlx.spec import PatternConfig


def _groups(x: torch.Tensor, stride: int, lead: int) -> torch.Tensor:
    """[B, H, T, D] to [B, H, groups, stride, D]: `lead` zero tokens in front, zeros up to a whole group behind."""
    x = pad(x, (0, 0, lead, -(lead + x.shape[2]) % stride))
    return x.unflatten(2, (-1, stride))


def group_scores(q: torch.Tensor, k: torch.Tensor, stride: int) -> torch.Tensor:
    """Antidiagonal sums of the stride x stride tiles of q k^T, scaled by 1 / (sqrt(D) * s).

    Args:
        q: `[B, HQ, L, D]`.
        k: `[B, HKV, S, D]`, S >= L.
        stride: s.

    Returns:
        `[B, HQ, query groups, key groups]`, float32 (float64 for float64 input); the first query group is group
        (S - L) // s. A group partly outside the tokens at hand counts zeros there.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    flat_q = _groups(q, stride, (k.shape[2] - q.shape[2]) % stride).flip(3).flatten(3).to(work)
    flat_k = _groups(k, stride, 0).flatten(3).to(work)
    flat_q = flat_q.unflatten(1, (k.shape[1], -1))  # [B, HKV, group heads, query groups, s * D]
    scores = flat_q @ flat_k.unsqueeze(2).transpose(-1, -2)
    return scores.flatten(1, 2) / (q.shape[-1] ** 0.5 * stride)


def _sum_by_block(weights: torch.Tensor, first_group: int, per_block: int) -> torch.Tensor:
    """Sum the last axis over the blocks that its groups belong to, zeros standing for groups not at hand."""
    lead = first_group % per_block
    tail = -(lead + weights.shape[-1]) % per_block
    return pad(weights, (lead, tail)).unflatten(-1, (-1, per_block)).sum(-1)


def block_mass(q: torch.Tensor, k: torch.Tensor, block_size: int, stride: int) -> torch.Tensor:
    """A[m, n]: attention mass of key block n as the groups of query block m see it.

    The softmax of `group_scores` runs over the key groups j <= i and is summed over both blocks' groups.

    Returns:
        `[B, HQ, M, N]`, float32 (float64 for float64 input): query blocks touched, all key blocks.
    """
    scores = group_scores(q, k, stride)
    first = (k.shape[2] - q.shape[2]) // stride
    rows = first + torch.arange(scores.shape[2], device=q.device)
    columns = torch.arange(scores.shape[3], device=q.device)
    scores = scores.masked_fill(columns > rows[:, None], float("-inf"))
    per_block = block_size // stride
    by_column = _sum_by_block(scores.softmax(-1), 0, per_block)
    return _sum_by_block(by_column.transpose(-1, -2), first, per_block).transpose(-1, -2).contiguous()


def choose_blocks(mass: torch.Tensor, first_q_block: int, threshold: float, top_k_blocks: int | None) -> torch.Tensor:
    """Blocks kept of each row of `mass`, bool of its shape.

    Row m keeps n = 0 and n = m, then the largest others (equal ones: the lower index first) until the kept mass
    reaches `threshold` of the row's total, or until `top_k_blocks` blocks are kept.

    Args:
        mass: `[..., M, N]`; row r is query block `first_q_block + r`.
    """
    n = torch.arange(mass.shape[-1], device=mass.device)
    m = first_q_block + torch.arange(mass.shape[-2], device=mass.device)[:, None]
    forced = (n == 0) | (n == m)
    rank_key = mass.masked_fill(n > m, float("-inf")).masked_fill(forced, float("inf"))
    order = rank_key.sort(dim=-1, descending=True, stable=True).indices
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    rank = torch.arange(mass.shape[-1], device=mass.device)
    by_mass = before < threshold * mass.sum(-1, keepdim=True)
    more = by_mass if top_k_blocks is None else rank < top_k_blocks
    chosen = (more | (rank < forced.sum(-1)[:, None])).expand(mass.shape)
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, chosen)
    return kept & (n <= m)


def select_blocks(q: torch.Tensor, k: torch.Tensor, pattern: PatternConfig) -> torch.Tensor:
    """Blocks that xattention keeps, per query head: bool `[B, HQ, M, N]` (see `block_mass`, `choose_blocks`)."""
    mass = block_mass(q, k, pattern.block_size, pattern.stride)
    first = (k.shape[2] - q.shape[2]) // pattern.block_size
    return choose_blocks(mass, first, pattern.threshold, pattern.top_k_blocks)
