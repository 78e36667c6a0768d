"""XAttention's choice of blocks in Triton: `cuda_reference.xattention`, fused.

`mass_kernel` is a matrix product over groups, one product for each of the s tokens of a group, with a running softmax:
the matrix of group scores never exists. It stores the sum of every key block at the maximum of its time, with that
maximum, and corrects all of them at the end. `choose_kernel` finds the smallest mass that is kept, without sorting.

Buffers: q [B, HQ, L, D], k [B, HKV, S, D] by strides; scratch float32 sums [B * HQ, groups, key blocks] and maxima
[B * HQ, groups, tiles]; mass float32 and kept int8 [B * HQ, M, N]. Grids: (B * HQ, row tiles) and (B * HQ * M,).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_reference import xattention
from cuda_reference.triton_prefill import LOG2_E, strides
from flux_mlx.spec import PatternConfig


@triton.jit
def load_groups(
    base, first_group, t, stride, start, stop,
    STRIDE: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Token t of each of GROUPS groups, [GROUPS, BLOCK_D]; positions outside [start, stop) count as zeros."""
    position = (first_group + tl.arange(0, GROUPS)) * STRIDE + t
    columns = tl.arange(0, BLOCK_D)
    inside = (position >= start) & (position < stop)
    pointers = base + (position - start).to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def mass_kernel(
    q, k, sums, maxima, mass, q_b, q_h, q_t, k_b, k_h, k_t, L, S, HQ, GROUP, first_tile, row_blocks, key_blocks,
    qk_scale,
    STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Block mass of TILE query groups, whose first is a whole number of blocks and of tiles."""
    b = tl.program_id(0) // HQ
    h = tl.program_id(0) % HQ
    blocks: tl.constexpr = TILE // PER_BLOCK  # key blocks of a tile
    tile = first_tile + tl.num_programs(1) - 1 - tl.program_id(1)
    tiles = first_tile + tl.num_programs(1)
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    k += b.to(tl.int64) * k_b + (h // GROUP).to(tl.int64) * k_h
    group = tile * TILE + tl.arange(0, TILE)
    scratch_row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) * TILE + (group - first_tile * TILE)
    in_tile = tl.arange(0, blocks)

    m = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for j in range(tile + 1):
        scores = tl.zeros([TILE, TILE], tl.float32)
        for t in range(STRIDE):
            q_tile = load_groups(q, tile * TILE, STRIDE - 1 - t, q_t, S - L, S, STRIDE, TILE, D, BLOCK_D)
            k_tile = load_groups(k, j * TILE, t, k_t, 0, S, STRIDE, TILE, D, BLOCK_D)
            scores = tl.dot(q_tile, tl.trans(k_tile), scores, input_precision="ieee")
        column = j * TILE + tl.arange(0, TILE)
        scores = tl.where(column[None, :] <= group[:, None], scores, float("-inf"))
        m_next = tl.maximum(m, tl.max(scores, 1) * qk_scale)
        weights = tl.exp2(scores * qk_scale - m_next[:, None])
        block_sums = tl.sum(tl.reshape(weights, [TILE, blocks, PER_BLOCK]), 2)
        total = total * tl.exp2(m - m_next) + tl.sum(block_sums, 1)
        m = m_next
        tl.store(sums + scratch_row[:, None] * (tiles * blocks) + (j * blocks + in_tile)[None, :], block_sums)
        tl.store(maxima + scratch_row * tiles + j, m)
    tl.debug_barrier()

    present = (group >= (S - L) // STRIDE) & (group < tl.cdiv(S, STRIDE))
    row = tile * blocks + in_tile - first_tile * blocks
    first_row = (S - L) // STRIDE // PER_BLOCK - first_tile * blocks
    for j in range(tile + 1):
        block_sums = tl.load(sums + scratch_row[:, None] * (tiles * blocks) + (j * blocks + in_tile)[None, :])
        share = tl.exp2(tl.load(maxima + scratch_row * tiles + j) - m) / total
        shares = tl.where(present[:, None], block_sums * share[:, None], 0.0)  # masked last: see the README on lanes
        block_mass = tl.sum(tl.reshape(shares, [blocks, PER_BLOCK, blocks]), 1)
        column = j * blocks + in_tile
        mass_row = tl.program_id(0).to(tl.int64) * row_blocks + row - first_row
        inside = (row >= first_row) & (row - first_row < row_blocks)
        inside = inside[:, None] & (column < key_blocks)[None, :]
        tl.store(mass + mass_row[:, None] * key_blocks + column[None, :], block_mass, mask=inside)


@triton.jit
def choose_kernel(
    mass, kept, row_blocks, key_blocks, first_q_block, threshold, top_k_blocks,
    BY_COUNT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row: keep n where the mass before n in rank (BY_COUNT: the number of blocks) is under the limit.

    A bisection over the bits of a float finds the cut, the least value whose larger ones together stay under the
    limit. Larger masses are kept, equal ones from the left until the limit is reached.
    """
    row = tl.program_id(0).to(tl.int64)
    diagonal = first_q_block + tl.program_id(0) % row_blocks
    n = tl.arange(0, COLUMNS)
    mine = tl.load(mass + row * key_blocks + n, mask=n <= diagonal, other=0.0)
    forced = (n == 0) | (n == diagonal)
    limit = top_k_blocks * 1.0 if BY_COUNT else threshold * tl.sum(mine, 0)
    worth = tl.where(n <= diagonal, 1.0, 0.0) if BY_COUNT else mine
    always = tl.sum(tl.where(forced, worth, 0.0), 0)
    bits = tl.where((n <= diagonal) & (forced == 0), mine.to(tl.int32, bitcast=True), -1)  # >= 0 orders as floats do
    low = -1
    cut = 0x7F800000  # infinity: nothing is larger
    for _ in range(31):
        middle = cut - (cut - low) // 2
        under = always + tl.sum(tl.where(bits > middle, worth, 0.0), 0) < limit
        low = tl.where(under, low, middle)
        cut = tl.where(under, middle, cut)
    larger = bits > cut
    equal = tl.where(bits == cut, worth, 0.0)
    before = always + tl.sum(tl.where(larger, worth, 0.0), 0) + tl.cumsum(equal, 0) - equal
    keep = forced | larger | ((bits == cut) & (before < limit))
    tl.store(kept + row * key_blocks + n, keep.to(tl.int8), mask=n < key_blocks)


def mass_options(q: torch.Tensor, per_block: int) -> dict[str, int]:
    """Tile size and launch options of `mass_kernel`; a tile holds whole blocks of `per_block` groups."""
    if q.element_size() > 2:
        return {"TILE": max(per_block, 32), "num_warps": 4, "num_stages": 2}
    tile, stages = (128, 3) if q.shape[3] <= 128 else (64, 2)
    return {"TILE": max(per_block, tile), "num_warps": 8, "num_stages": stages}


def block_mass(q: torch.Tensor, k: torch.Tensor, block_size: int, stride: int) -> torch.Tensor:
    """`cuda_reference.xattention.block_mass`, float32 `[B, HQ, M, N]`, 0 above the diagonal.

    A block of a number of groups that is no power of two goes through Torch operations.
    """
    (B, HQ, L, D), (HKV, S) = q.shape, k.shape[1:3]
    per_block = block_size // stride
    if per_block & (per_block - 1):
        return xattention.block_mass(q, k, block_size, stride)
    options = mass_options(q, per_block)
    tile = options["TILE"]
    first_tile = (S - L) // (stride * tile)
    tiles = triton.cdiv(S, stride * tile)
    rows, columns = triton.cdiv(S, block_size) - (S - L) // block_size, triton.cdiv(S, block_size)
    row_groups = (tiles - first_tile) * tile
    sums = torch.empty(B * HQ, row_groups, tiles * tile // per_block, dtype=torch.float32, device=q.device)
    maxima = torch.empty(B * HQ, row_groups, tiles, dtype=torch.float32, device=q.device)
    mass = torch.zeros(B, HQ, rows, columns, dtype=torch.float32, device=q.device)
    mass_kernel[(B * HQ, tiles - first_tile)](
        q, k, sums, maxima, mass, *strides(q, k),
        L, S, HQ, HQ // HKV, first_tile, rows, columns, LOG2_E / (D**0.5 * stride),
        STRIDE=stride, PER_BLOCK=per_block, D=D, BLOCK_D=triton.next_power_of_2(max(16, D)), **options,
    )  # fmt: skip
    return mass


def choose_blocks(mass: torch.Tensor, first_q_block: int, threshold: float, top_k_blocks: int | None) -> torch.Tensor:
    """`cuda_reference.xattention.choose_blocks` for float32 mass `[..., M, N]` that is 0 above the diagonal."""
    kept = torch.empty(mass.shape, dtype=torch.int8, device=mass.device)
    rows, columns = mass.shape[-2:]
    choose_kernel[(mass.numel() // columns,)](
        mass, kept, rows, columns, first_q_block, threshold, top_k_blocks or 0,
        BY_COUNT=top_k_blocks is not None, COLUMNS=triton.next_power_of_2(columns),
        num_warps=triton.next_power_of_2(max(1, min(16, columns // 512))),
    )  # fmt: skip
    return kept.bool()


def select_blocks(q: torch.Tensor, k: torch.Tensor, pattern: PatternConfig) -> torch.Tensor:
    """Blocks that xattention keeps, per query head: bool `[B, HQ, M, N]`, as `cuda_reference.xattention`."""
    mass = block_mass(q, k, pattern.block_size, pattern.stride)
    first = (k.shape[2] - q.shape[2]) // pattern.block_size
    return choose_blocks(mass, first, pattern.threshold, pattern.top_k_blocks)
