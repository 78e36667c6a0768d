"""Full and sparse attention over a packed row, each sample by its own route.

A hard route needs the chosen branch's output and gradient, but of the other branch only its output: the gradient of z
is <d out, FA - SA>. So one masked attention, whose mask follows the routes, runs with gradient, and its opposite
without. On a GPU both are FlexAttention, whose tile tables are put together from two tables made once for each pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cuda_reference.data_packing import TILE, Pack
from cuda_reference.eager import masked_rows
from cuda_reference.pattern import visible
from cuda_reference.xattention import select_blocks
from flux_mlx.spec import PatternConfig

ROWS_PER_STEP = 256  # queries whose scores exist at one time without FlexAttention
ELEMENTS_PER_STEP = 2**25  # of float32 products that exist at one time in the gradient of a route

Tables = tuple[torch.Tensor, ...]


class PackedAttention:
    """Attention of one pack under one pattern.

    Args:
        pack: The layout; its tensors lie on the device of the calls.
        pattern: What sparse samples see: the exact prefill of `prompt[:-1]`, then decoding.

    Raises:
        ValueError: xattention with blocks that do not divide a tile.
    """

    def __init__(self, pack: Pack, pattern: PatternConfig):
        if pattern.name == "xattention" and TILE % pattern.block_size:
            raise ValueError(f"[PackedAttention] xattention's block_size must divide {TILE}, got {pattern.block_size}.")
        self.pattern = pattern
        self._sample, self._positions, self._branch, self._group = pack.sample, pack.positions, pack.branch, pack.group
        self._prompt_tokens = pack.prompt_tokens[pack.sample]
        self._spans = _prompt_spans(pack) if pattern.name == "xattention" else []
        self._rows, self._whole_samples = pack.sample.shape[0], pack.groups == pack.samples
        self._tile_sample, self._tile_group = pack.sample[::TILE], pack.group[::TILE]
        self._flex = pack.sample.is_cuda
        if self._flex:
            self._dense, self._sparse = self._tables()

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        full: torch.Tensor,
        scale: float,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of every token by its group's route.

        Args:
            q: `[1, HQ, T, D]`.
            k: `[1, HKV, T, D]`.
            v: `[1, HKV, T, D]`.
            full: bool `[G, groups]`: True is full attention, False the pattern; G is 1, or HQ for a route of each head.
            scale: Multiplier of the scores.
            kept: What `kept_blocks(q, k)` gave; None calls it.

        Returns:
            `[1, HQ, T, D]` of q's dtype.
        """
        kept = self.kept_blocks(q, k) if kept is None else kept
        allowed = self._allowed(full[:, self._group], kept)
        if not self._flex:
            return self._by_rows(q, k, v, allowed, scale)
        mask = self._block_mask(full, allowed)
        return _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def mixture(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor, scale: float, *, hard: bool
    ) -> torch.Tensor:
        """z * FA + (1 - z) * SA with the gradients of q, k, v and z.

        Args:
            z: `[G, groups]`, weight of full attention; with `hard` its values are exactly 0 or 1.
            hard: Use that to save work (see the module's text); other arguments and the result as `__call__`.
        """
        kept = self.kept_blocks(q, k)
        if not hard:
            dense = self(q, k, v, torch.ones_like(z, dtype=torch.bool), scale, kept)
            sparse = self(q, k, v, torch.zeros_like(z, dtype=torch.bool), scale, kept)
            weight = z[:, self._group].to(q.dtype)[None, :, :, None]
            return weight * dense + (1 - weight) * sparse
        full = z.detach() > 0.5
        chosen = self(q, k, v, full, scale, kept)
        if not z.requires_grad:
            return chosen
        if not self._whole_samples:
            raise ValueError("[PackedAttention.mixture] expected one route for each sample, got one for each chunk.")
        with torch.no_grad():
            difference = chosen - self(q, k, v, ~full, scale, kept)
        return _RouteGradient.apply(chosen, difference, z, self._group)

    @torch.no_grad()
    def kept_blocks(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
        """xattention's blocks of every prompt, bool `[HQ, T/b, T/b]` over the blocks of the row; else None."""
        if self.pattern.name != "xattention":
            return None
        block = self.pattern.block_size
        kept = torch.zeros(q.shape[1], *2 * (self._rows // block,), dtype=torch.bool, device=q.device)
        for first, stop in self._spans:
            chosen = select_blocks(q[:, :, first:stop], k[:, :, first:stop], self.pattern)[0]
            start, end = first // block, first // block + chosen.shape[-1]
            kept[:, start:end, start:end] = chosen
        return kept

    def _allowed(self, full: torch.Tensor, kept: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
        """The mask over row indices, in FlexAttention's form; `full` is bool `[G, T]`."""
        pattern, decoding = self.pattern, replace(self.pattern, name="streaming")
        sample, positions, branch = (x.int() for x in (self._sample, self._positions, self._branch))
        prompt_tokens = self._prompt_tokens.int()
        by_head = full.shape[0] > 1

        def seen(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            later = visible(decoding, positions[q], positions[k])
            if pattern.name == "streaming":
                return later
            if kept is None:
                first = visible(pattern, positions[q], positions[k], prompt_tokens[q])
            else:
                first = kept[h, q // pattern.block_size, k // pattern.block_size]
            return torch.where(positions[q] < prompt_tokens[q] - 1, first, later)

        def allowed(b: object, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            together = (sample[q] == sample[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
            causal = positions[k] <= positions[q]
            return together & causal & (full[h if by_head else 0, q] | seen(h, q, k))

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
        A tile with a query of triangle's that sees everything leaves out none; xattention leaves out none at all.
        """
        p, block = self._positions.view(-1, TILE), self.pattern.block_size
        low, high = p.amin(1), p.amax(1)
        q_low, q_high, k_low, k_high = low[:, None], high[:, None], low[None, :], high[None, :]
        same = self._tile_sample[:, None] == self._tile_sample[None, :]
        trunk = (self._branch.view(-1, TILE).amax(1) == 0)[None, :]
        some, whole = same & (k_low <= q_high), same & trunk & (k_high <= q_low)
        if self.pattern.name == "xattention":
            return _pack_tables(some, whole), _pack_tables(some, torch.zeros_like(whole))
        sinks, window = self.pattern.sink_blocks, self.pattern.window_blocks
        near_some = k_high // block > q_low // block - window
        near_whole = k_low // block > q_high // block - window
        sparse_some = some & ((k_low // block < sinks) | near_some | self._sees_all()[:, None])
        sparse_whole = whole & ((k_high // block < sinks) | near_whole)
        return _pack_tables(some, whole), _pack_tables(sparse_some, sparse_whole)

    def _sees_all(self) -> torch.Tensor:
        """Tiles with a query that sees everything in a sparse layer too, bool `[T / TILE]`."""
        if self.pattern.name != "triangle":
            return torch.zeros_like(self._tile_sample, dtype=torch.bool)
        first = self._prompt_tokens - self.pattern.last_tokens
        late = (self._positions >= first) & (self._positions < self._prompt_tokens - 1)
        return late.view(-1, TILE).any(1)

    def _block_mask(self, full: torch.Tensor, allowed: Callable[..., torch.Tensor]) -> BlockMask:
        """Rows of the full table for groups routed full, of the sparse table for the others."""
        chosen = full[None, :, self._tile_group]  # [1, G, M]
        tables = [
            torch.where(chosen if dense.dim() == 3 else chosen[..., None], dense, sparse).contiguous()
            for dense, sparse in zip(self._dense, self._sparse, strict=True)
        ]
        return BlockMask((self._rows, self._rows), *tables, BLOCK_SIZE=(TILE, TILE), mask_mod=allowed)


def _prompt_spans(pack: Pack) -> list[tuple[int, int]]:
    """(first, stop) in the row of each sample's `prompt[:-1]`."""
    sizes = torch.bincount(pack.sample)
    starts = (sizes.cumsum(0) - sizes).tolist()
    return [(first, first + n - 1) for first, n in zip(starts, pack.prompt_tokens.tolist(), strict=True)]


class _RouteGradient(torch.autograd.Function):
    """The chosen branch's output; backward, z's gradient is <d out, FA - SA>, summed over its group's rows."""

    @staticmethod
    def forward(ctx, chosen, difference, z, group):
        ctx.save_for_backward(difference, z, group)
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx, grad):
        difference, z, group = ctx.saved_tensors
        by_row = _row_products(grad[0], difference[0])
        by_row = by_row if z.shape[0] > 1 else by_row.sum(0, keepdim=True)
        sign = 2.0 * (z > 0.5).float() - 1.0
        by_group = torch.zeros_like(sign).index_add(1, group, by_row) * sign
        return grad, None, by_group.to(z.dtype), None


def _row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Products of the last axis, `[H, T, D]` twice to float32 `[H, T]`: some heads at a time, not to copy them all."""
    heads = max(1, ELEMENTS_PER_STEP // a[0].numel())
    return torch.cat([(x.float() * y.float()).sum(-1) for x, y in zip(a.split(heads), b.split(heads), strict=True)])


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
    torch._dynamo.config.recompile_limit = 64  # one graph for each pattern; past the limit scores would be whole
    return torch.compile(flex_attention, dynamic=False)
