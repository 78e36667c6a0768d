"""Full and sparse attention over a packed row, each sample by its own route.

A hard route needs the chosen branch's output and gradient, but of the other branch only its output: the gradient of z
is <d out, FA - SA>. So one masked attention, whose mask follows the routes, runs with gradient, and its opposite
without. On a GPU both are FlexAttention, whose tile tables are put together from two tables made once for each pack.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cuda_reference.data_packing import TILE, Pack
from cuda_reference.eager import masked_rows
from cuda_reference.pattern import visible
from flux_mlx.spec import PatternConfig

ROWS_PER_STEP = 256  # queries whose scores exist at one time without FlexAttention

Tables = tuple[torch.Tensor, ...]


class PackedAttention:
    """Attention of one pack under one pattern.

    Args:
        pack: The layout; its tensors lie on the device of the calls.
        pattern: What sparse samples see. Streaming: the other patterns act in exact prefill only.
    """

    def __init__(self, pack: Pack, pattern: PatternConfig):
        self.pattern = pattern
        self._sample, self._positions, self._branch = pack.sample, pack.positions, pack.branch
        self._rows = pack.sample.shape[0]
        self._tile_sample = pack.sample[::TILE]
        self._flex = pack.sample.is_cuda
        if self._flex:
            self._dense, self._streaming = self._tables()

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, full: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of every sample by its route.

        Args:
            q: `[1, HQ, T, D]`.
            k: `[1, HKV, T, D]`.
            v: `[1, HKV, T, D]`.
            full: bool `[G, N]`: True is full attention, False the pattern; G is 1, or HQ for a route of each head.
            scale: Multiplier of the scores.

        Returns:
            `[1, HQ, T, D]` of q's dtype.
        """
        allowed = self._allowed(full[:, self._sample])
        if not self._flex:
            return self._by_rows(q, k, v, allowed, scale)
        mask = self._block_mask(full, allowed)
        return _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def mixture(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor, scale: float, *, hard: bool
    ) -> torch.Tensor:
        """z * FA + (1 - z) * SA with the gradients of q, k, v and z.

        Args:
            z: `[G, N]`, weight of full attention; with `hard` its values are exactly 0 or 1.
            hard: Use that to save work (see the module's text); other arguments and the result as `__call__`.
        """
        if not hard:
            dense = self(q, k, v, torch.ones_like(z, dtype=torch.bool), scale)
            sparse = self(q, k, v, torch.zeros_like(z, dtype=torch.bool), scale)
            weight = z[:, self._sample].to(q.dtype)[None, :, :, None]
            return weight * dense + (1 - weight) * sparse
        full = z.detach() > 0.5
        chosen = self(q, k, v, full, scale)
        if not z.requires_grad:
            return chosen
        with torch.no_grad():
            difference = chosen - self(q, k, v, ~full, scale)
        return _RouteGradient.apply(chosen, difference, z, self._sample)

    def _allowed(self, full: torch.Tensor) -> Callable[..., torch.Tensor]:
        """The mask over row indices, in FlexAttention's form; `full` is bool `[G, T]`."""
        pattern = self.pattern
        sample, positions, branch = (x.int() for x in (self._sample, self._positions, self._branch))

        by_head = full.shape[0] > 1

        def allowed(b: object, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            together = (sample[q] == sample[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
            causal = positions[k] <= positions[q]
            return together & causal & (full[h if by_head else 0, q] | visible(pattern, positions[q], positions[k]))

        return allowed

    def _by_rows(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: Callable[..., torch.Tensor], scale: float
    ) -> torch.Tensor:
        """The plain form: each sample's rows over its own keys."""
        parts = []
        heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
        ends = torch.bincount(self._sample).cumsum(0).tolist()
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            for start in range(first, end, ROWS_PER_STEP):
                stop = min(start + ROWS_PER_STEP, end)  # no row sees what lies after it in the row of tokens
                keys, rows = (torch.arange(low, stop, device=q.device) for low in (first, start))
                mask = allowed(0, heads, rows[:, None], keys[None, :])
                out, _ = masked_rows(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask, scale)
                parts.append(out)
        return torch.cat(parts, dim=2)

    def _tables(self) -> tuple[Tables, Tables]:
        """Tile tables of full and of sparse attention: a tile is left out, partial, or whole (no mask needed).

        Bounds by the least and greatest position of a tile: never too few tiles, never a whole one that is not.
        """
        p, block = self._positions.view(-1, TILE), self.pattern.block_size
        low, high = p.amin(1), p.amax(1)
        q_low, q_high, k_low, k_high = low[:, None], high[:, None], low[None, :], high[None, :]
        same = self._tile_sample[:, None] == self._tile_sample[None, :]
        trunk = (self._branch.view(-1, TILE).amax(1) == 0)[None, :]
        some, whole = same & (k_low <= q_high), same & trunk & (k_high <= q_low)
        sinks, window = self.pattern.sink_blocks, self.pattern.window_blocks
        near_some = k_high // block > q_low // block - window
        near_whole = k_low // block > q_high // block - window
        sparse_some = some & ((k_low // block < sinks) | near_some)
        sparse_whole = whole & ((k_high // block < sinks) | near_whole)
        return _pack_tables(some, whole), _pack_tables(sparse_some, sparse_whole)

    def _block_mask(self, full: torch.Tensor, allowed: Callable[..., torch.Tensor]) -> BlockMask:
        """Rows of the full table for samples routed full, of the sparse table for the others."""
        chosen = full[None, :, self._tile_sample]  # [1, G, M]
        tables = [
            torch.where(chosen if dense.dim() == 3 else chosen[..., None], dense, sparse).contiguous()
            for dense, sparse in zip(self._dense, self._streaming, strict=True)
        ]
        return BlockMask((self._rows, self._rows), *tables, BLOCK_SIZE=(TILE, TILE), mask_mod=allowed)


class _RouteGradient(torch.autograd.Function):
    """The chosen branch's output; backward, z's gradient is <d out, FA - SA>, summed over its sample's rows."""

    @staticmethod
    def forward(ctx, chosen, difference, z, sample):
        ctx.save_for_backward(difference, z, sample)
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx, grad):
        difference, z, sample = ctx.saved_tensors
        by_row = (grad.float() * difference.float()).sum((0, 3))  # [HQ, T]
        by_row = by_row if z.shape[0] > 1 else by_row.sum(0, keepdim=True)
        sign = 2.0 * (z > 0.5).float() - 1.0
        by_sample = torch.zeros_like(sign).index_add(1, sample, by_row) * sign
        return grad, None, by_sample.to(z.dtype), None


def _ordered(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [M, N] to (counts [1, 1, M], kept columns first [1, 1, M, N]), int32."""
    counts = kept.sum(-1, dtype=torch.int32)
    order = kept.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts.contiguous()[None, None], order.contiguous()[None, None]


def _pack_tables(some: torch.Tensor, whole: torch.Tensor) -> Tables:
    """The eight tables of a `BlockMask`: by query row, then by key row; partial tiles, then whole ones."""
    partial = some & ~whole
    by_query = (*_ordered(partial), *_ordered(whole))
    return (*by_query, *_ordered(partial.T), *_ordered(whole.T))


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=False)
