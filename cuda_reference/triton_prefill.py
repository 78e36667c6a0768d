"""Prefill in Triton for any GPU and for the interpreter: one kernel by positions, one over block tables.

`streaming_kernel` sees what `visible` says: sink, window and the causal edge; with a window of more blocks than the
keys have it is dense causal attention. `block_kernel` walks the kept key blocks of each query block. Both keep a
running maximum and sum (FlashAttention-2, arXiv 2307.08691), with powers of two and the scale folded into them.

Buffers: q, out [B, HQ, L, D] and k, v [B, HKV, S, D] by strides, last axis contiguous; lse float32 [B, HQ, L].
Grid: (B * HQ, row tiles), the rows with most keys first. Sums are float32; nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_reference.pattern import BlockTable
from flux_mlx.spec import Route

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
ROUTE_SPARSE = tl.constexpr(int(Route.SPARSE))


@triton.jit
def visible(q_pos, k_pos, window_blocks, sink_span, BLOCK: tl.constexpr):
    """`flux_mlx.spec.visible` for streaming; `sink_span` is the sink in tokens, rounded up to blocks."""
    near = k_pos // BLOCK > q_pos // BLOCK - window_blocks
    return (k_pos <= q_pos) & (near | (k_pos < sink_span))


@triton.jit
def window_start(q_pos, window_blocks, BLOCK: tl.constexpr):
    """First position of the local blocks of the query at `q_pos`."""
    return tl.maximum(0, (q_pos // BLOCK - window_blocks + 1) * BLOCK)


@triton.jit
def load_tile(
    base, first, stride, stop, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr
):
    """Rows [first, first + ROWS) of a matrix, [ROWS, BLOCK_D]; zeros past D and, with CHECK, outside [0, stop)."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = base + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if CHECK:
        inside = (first + rows >= 0) & (first + rows < stop)
        tile = tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    elif BLOCK_D != D:
        tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def softmax_step(acc, m, total, q, k, v, seen, qk_scale, MASKED: tl.constexpr):
    """Take in one tile of keys: new (acc, m, total), m the running maximum in powers of two, total the running sum."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    m_next = tl.maximum(m, tl.max(scores, 1) * qk_scale)
    base = m_next
    if MASKED:
        base = tl.where(m_next == float("-inf"), 0.0, m_next)
    weights = tl.exp2(scores * qk_scale - base[:, None])
    alpha = tl.exp2(m - base)
    total = total * alpha + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_next, total


@triton.jit
def store_rows(
    out, lse, acc, m, total, b, h, HQ, L, first_row, stop_row, o_b, o_h, o_t,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write rows [first_row, first_row + ROWS) that lie in [0, stop_row); a row that saw nothing gets 0 and -inf."""
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows >= 0) & (rows < stop_row)
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    row_lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    pointers = out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + rows.to(tl.int64)[:, None] * o_t + columns[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])
    tl.store(lse + (b * HQ + h).to(tl.int64) * L + rows, row_lse, mask=inside)


@triton.jit
def streaming_kernel(
    q, k, v, out, lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    L, S, HQ, GROUP, window_blocks, sink_span, qk_scale,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """First the key tiles that need a mask (edges of sink and window, diagonal), then the others (sink, middle)."""
    b = tl.program_id(0) // HQ
    h = tl.program_id(0) % HQ
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    first_q = S - L + first_row
    stop_q = tl.minimum(first_q + ROWS, S)
    k += b.to(tl.int64) * k_b + (h // GROUP).to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + (h // GROUP).to(tl.int64) * v_h
    q_tile = load_tile(q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, first_row, q_t, L, ROWS, D, BLOCK_D, True)

    start = window_start(first_q, window_blocks, BLOCK)
    sink_stop = tl.minimum(sink_span, start)
    n_sink = sink_stop // KEYS
    n_sink_edge = tl.cdiv(sink_stop, KEYS) - n_sink
    n_edge = tl.cdiv(window_start(stop_q - 1, window_blocks, BLOCK) - start, KEYS)
    middle = start + n_edge * KEYS
    n_middle = tl.maximum(0, (first_q + 1 - middle) // KEYS)
    diagonal = middle + n_middle * KEYS
    n_diagonal = tl.cdiv(tl.maximum(0, stop_q - diagonal), KEYS)

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    q_pos = first_q + tl.arange(0, ROWS)
    columns = tl.arange(0, KEYS)
    for i in range(n_sink_edge + n_edge + n_diagonal):
        j = i - n_sink_edge
        key = tl.where(j < 0, n_sink * KEYS, tl.where(j < n_edge, start + j * KEYS, diagonal + (j - n_edge) * KEYS))
        stop = tl.where(j < 0, sink_stop, S)
        seen = visible(q_pos[:, None], (key + columns)[None, :], window_blocks, sink_span, BLOCK)
        seen = seen & (key + columns < stop)[None, :]
        k_tile = load_tile(k, key, k_t, S, KEYS, D, BLOCK_D, True)
        v_tile = load_tile(v, key, v_t, S, KEYS, D, BLOCK_D, True)
        acc, m, total = softmax_step(acc, m, total, q_tile, k_tile, v_tile, seen, qk_scale, True)
    for i in range(n_sink + n_middle):
        key = tl.where(i < n_sink, i * KEYS, middle + (i - n_sink) * KEYS)
        k_tile = load_tile(k, key, k_t, S, KEYS, D, BLOCK_D, False)
        v_tile = load_tile(v, key, v_t, S, KEYS, D, BLOCK_D, False)
        acc, m, total = softmax_step(acc, m, total, q_tile, k_tile, v_tile, True, qk_scale, False)
    store_rows(out, lse, acc, m, total, b, h, HQ, L, first_row, L, o_b, o_h, o_t, ROWS, D, BLOCK_D)


@triton.jit
def routed_kernel(
    q, k, v, route, out, lse, q_b, q_h, q_t, k_b, k_h, k_t,
    L, S, HQ, GROUP, window_blocks, sink_span, qk_scale,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`streaming_kernel` where the route of the batch row, int32 `[B]`, is SPARSE; else with a window of all blocks.

    out has the strides of q, and v those of k: the form that `cuda_reference.export_ptx` compiles for MLX.
    """
    is_sparse = tl.load(route + tl.program_id(0) // HQ) == ROUTE_SPARSE
    streaming_kernel(
        q, k, v, out, lse, q_b, q_h, q_t, k_b, k_h, k_t, k_b, k_h, k_t, q_b, q_h, q_t, L, S, HQ, GROUP,
        tl.where(is_sparse, window_blocks, S // BLOCK + 1), sink_span, qk_scale, BLOCK, D, BLOCK_D, ROWS, KEYS,
    )  # fmt: skip


@triton.jit
def block_kernel(
    q, k, v, out, lse, partial_counts, partial_blocks, full_counts, full_blocks,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    L, S, HQ, GROUP, first_q_block, row_blocks, key_blocks, qk_scale,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Full blocks without the causal rule, then partial ones with it; a block is cut into tiles of KEYS keys."""
    b = tl.program_id(0) // HQ
    h = tl.program_id(0) % HQ
    tiles: tl.constexpr = (BLOCK + ROWS - 1) // ROWS
    steps: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    block_row = tile // tiles
    first_q = (first_q_block + block_row) * BLOCK + tile % tiles * ROWS
    first_row = first_q - (S - L)
    k += b.to(tl.int64) * k_b + (h // GROUP).to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + (h // GROUP).to(tl.int64) * v_h
    q_tile = load_tile(q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, first_row, q_t, L, ROWS, D, BLOCK_D, True)

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    q_pos = first_q + tl.arange(0, ROWS)
    columns = tl.arange(0, KEYS)
    table_row = tl.program_id(0).to(tl.int64) * row_blocks + block_row
    for i in range(tl.load(full_counts + table_row) * steps):
        block = tl.load(full_blocks + table_row * key_blocks + i // steps)
        key = block * BLOCK + i % steps * KEYS
        k_tile = load_tile(k, key, k_t, S, KEYS, D, BLOCK_D, BLOCK % KEYS != 0)
        v_tile = load_tile(v, key, v_t, S, KEYS, D, BLOCK_D, BLOCK % KEYS != 0)
        seen = (key + columns < (block + 1) * BLOCK)[None, :]
        acc, m, total = softmax_step(acc, m, total, q_tile, k_tile, v_tile, seen, qk_scale, BLOCK % KEYS != 0)
    for i in range(tl.load(partial_counts + table_row) * steps):
        block = tl.load(partial_blocks + table_row * key_blocks + i // steps)
        key = block * BLOCK + i % steps * KEYS
        k_tile = load_tile(k, key, k_t, S, KEYS, D, BLOCK_D, True)
        v_tile = load_tile(v, key, v_t, S, KEYS, D, BLOCK_D, True)
        k_pos = (key + columns)[None, :]
        seen = (k_pos <= q_pos[:, None]) & (k_pos < (block + 1) * BLOCK)
        acc, m, total = softmax_step(acc, m, total, q_tile, k_tile, v_tile, seen, qk_scale, True)
    stop_row = tl.minimum(L, (first_q_block + block_row + 1) * BLOCK - (S - L))
    store_rows(out, lse, acc, m, total, b, h, HQ, L, first_row, stop_row, o_b, o_h, o_t, ROWS, D, BLOCK_D)


def tile_options(q: torch.Tensor) -> dict[str, int]:
    """`tile_options_of` q's dtype and head dim."""
    return tile_options_of(q.element_size(), q.shape[3])


def tile_options_of(item_bytes: int, head_dim: int) -> dict[str, int]:
    """Tile sizes and launch options: the largest that spill no register on an A800."""
    if item_bytes > 2:
        return {"ROWS": 32, "KEYS": 32, "num_warps": 4, "num_stages": 2 if head_dim <= 128 else 1}
    if head_dim <= 64:
        return {"ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
    if head_dim <= 128:
        return {"ROWS": 128, "KEYS": 32, "num_warps": 8, "num_stages": 4}
    return {"ROWS": 64, "KEYS": 32, "num_warps": 8, "num_stages": 2}


def strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of every axis but the last, which must be contiguous, of each tensor."""
    return [step for x in tensors for step in x.stride()[:3]]


def outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised out `[B, HQ, L, D]` and lse float32 `[B, HQ, L]`, both contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def streaming(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block_size: int, window_blocks: int, sink_span: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `streaming_kernel`; shapes as `cuda_reference.attention`, block sizes and spans as `PatternConfig`."""
    (B, HQ, L, D), (HKV, S) = q.shape, k.shape[1:3]
    out, lse = outputs(q)
    options = tile_options(q)
    streaming_kernel[(B * HQ, triton.cdiv(L, options["ROWS"]))](
        q, k, v, out, lse, *strides(q, k, v, out),
        L, S, HQ, HQ // HKV, window_blocks, sink_span, scale * LOG2_E,
        BLOCK=block_size, D=D, BLOCK_D=triton.next_power_of_2(max(16, D)), **options,
    )  # fmt: skip
    return out, lse


def block_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, table: BlockTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `block_kernel` over `table`, whose leading axes are `[B, HQ]`."""
    (B, HQ, L, D), (HKV, S) = q.shape, k.shape[1:3]
    row_blocks, key_blocks = table.full_kv_indices.shape[-2:]
    out, lse = outputs(q)
    options = tile_options(q)
    block = max(16, triton.next_power_of_2(table.block_size))
    options |= {"ROWS": min(options["ROWS"], block), "KEYS": min(options["KEYS"], block)}
    block_kernel[(B * HQ, row_blocks * triton.cdiv(table.block_size, options["ROWS"]))](
        q, k, v, out, lse,
        table.kv_num_blocks, table.kv_indices, table.full_kv_num_blocks, table.full_kv_indices,
        *strides(q, k, v, out),
        L, S, HQ, HQ // HKV, table.first_q_block, row_blocks, key_blocks, scale * LOG2_E,
        BLOCK=table.block_size, D=D, BLOCK_D=triton.next_power_of_2(max(16, D)), **options,
    )  # fmt: skip
    return out, lse
