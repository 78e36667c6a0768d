"""Gradients of full and streaming attention in Triton, from the saved log-sum-exp; deterministic, nothing is atomic.

`key_kernel` holds a tile of keys and walks the queries that see it, all heads of the group, for dk and dv;
`query_kernel` holds a tile of queries and walks its keys for dq (the split of FlashAttention-2, arXiv 2307.08691).
With delta = sum(out * dout) - dlse, the gradient of a score is weight * (dout . v - delta).

Buffers: q, out, dout, dq [B, HQ, L, D] and k, v, dk, dv [B, HKV, S, D] by strides; lse, delta float32 [B, HQ, L].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cuda_reference.triton_prefill import LOG2_E, load_tile, strides, visible, window_start

LOG2_E_IN_KERNEL = tl.constexpr(LOG2_E)


@triton.jit
def delta_kernel(
    out, dout, dlse, delta, o_b, o_h, o_t, do_b, do_h, do_t, L, HQ,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = sum over D of out * dout, less dlse. Grid: (B * HQ, row tiles)."""
    b = tl.program_id(0) // HQ
    h = tl.program_id(0) % HQ
    first = tl.program_id(1) * ROWS
    o = load_tile(out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h, first, o_t, L, ROWS, D, BLOCK_D, True)
    do = load_tile(dout + b.to(tl.int64) * do_b + h.to(tl.int64) * do_h, first, do_t, L, ROWS, D, BLOCK_D, True)
    rows = first + tl.arange(0, ROWS)
    at = tl.program_id(0).to(tl.int64) * L + rows
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - tl.load(dlse + at, mask=rows < L, other=0.0)
    tl.store(delta + at, total, mask=rows < L)


@triton.jit
def score_gradient(a, b, do_a, do_b, lse, delta, seen, qk_scale):
    """(weights, gradients of the scores) of a tile a b^T; `do_a do_b^T` is dout . v in the same orientation."""
    scores = tl.dot(a, tl.trans(b), input_precision="ieee") * qk_scale
    weights = tl.where(seen, tl.exp2(scores - lse * LOG2_E_IN_KERNEL), 0.0)
    return weights, weights * (tl.dot(do_a, tl.trans(do_b), input_precision="ieee") - delta)


@triton.jit
def store_gradient(base, tile, first, stride, stop, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of `load_tile`: rows [first, first + ROWS) below `stop`."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = base + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (first + rows < stop)[:, None] & (columns < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def key_kernel(
    q, k, v, dout, dk, dv, lse, delta,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    L, S, HQ, HKV, window_blocks, sink_span, scale, qk_scale,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys. Grid: (B * HKV, key tiles); the sink, seen by most queries, comes first."""
    b = (tl.program_id(0) // HKV).to(tl.int64)
    kv_head = (tl.program_id(0) % HKV).to(tl.int64)
    key = tl.program_id(1) * KEYS
    k_tile = load_tile(k + b * k_b + kv_head * k_h, key, k_t, S, KEYS, D, BLOCK_D, True)
    v_tile = load_tile(v + b * v_b + kv_head * v_h, key, v_t, S, KEYS, D, BLOCK_D, True)
    k_pos = key + tl.arange(0, KEYS)
    last_key = tl.minimum(key + KEYS, S) - 1
    stop_q = tl.where(key < sink_span, S, tl.minimum(S, (last_key // BLOCK + window_blocks) * BLOCK))
    first_row = tl.maximum(0, key - (S - L))
    row_tiles = tl.cdiv(tl.maximum(0, stop_q - (S - L) - first_row), ROWS)

    dk_tile = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for i in range(row_tiles * (HQ // HKV)):
        h = kv_head * (HQ // HKV) + i // row_tiles
        row = first_row + i % row_tiles * ROWS
        q_tile = load_tile(q + b * q_b + h * q_h, row, q_t, L, ROWS, D, BLOCK_D, True)
        do_tile = load_tile(dout + b * do_b + h * do_h, row, do_t, L, ROWS, D, BLOCK_D, True)
        rows = row + tl.arange(0, ROWS)
        at = (b * HQ + h) * L + rows
        lse_tile = tl.load(lse + at, mask=rows < L, other=0.0)[None, :]
        delta_tile = tl.load(delta + at, mask=rows < L, other=0.0)[None, :]
        seen = visible((S - L + rows)[None, :], k_pos[:, None], window_blocks, sink_span, BLOCK) & (rows < L)[None, :]
        weights, ds = score_gradient(k_tile, q_tile, v_tile, do_tile, lse_tile, delta_tile, seen, qk_scale)
        dv_tile = tl.dot(weights.to(do_tile.dtype), do_tile, dv_tile, input_precision="ieee")
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    store_gradient(dk + b * dk_b + kv_head * dk_h, dk_tile * scale, key, dk_t, S, KEYS, D, BLOCK_D)
    store_gradient(dv + b * dv_b + kv_head * dv_h, dv_tile, key, dv_t, S, KEYS, D, BLOCK_D)


@triton.jit
def query_kernel(
    q, k, v, dout, dq, lse, delta,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    L, S, HQ, GROUP, window_blocks, sink_span, scale, qk_scale,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries. Grid: (B * HQ, row tiles), the rows with most keys first."""
    b = (tl.program_id(0) // HQ).to(tl.int64)
    h = (tl.program_id(0) % HQ).to(tl.int64)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    first_q = S - L + row
    stop_q = tl.minimum(first_q + ROWS, S)
    q_tile = load_tile(q + b * q_b + h * q_h, row, q_t, L, ROWS, D, BLOCK_D, True)
    do_tile = load_tile(dout + b * do_b + h * do_h, row, do_t, L, ROWS, D, BLOCK_D, True)
    k += b * k_b + h // GROUP * k_h
    v += b * v_b + h // GROUP * v_h
    rows = row + tl.arange(0, ROWS)
    at = (b * HQ + h) * L + rows
    lse_tile = tl.load(lse + at, mask=rows < L, other=0.0)[:, None]
    delta_tile = tl.load(delta + at, mask=rows < L, other=0.0)[:, None]
    start = window_start(first_q, window_blocks, BLOCK)
    sink_stop = tl.minimum(sink_span, start)
    n_sink = tl.cdiv(sink_stop, KEYS)

    dq_tile = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(n_sink + tl.cdiv(stop_q - start, KEYS)):
        key = tl.where(i < n_sink, i * KEYS, start + (i - n_sink) * KEYS)
        stop = tl.where(i < n_sink, sink_stop, S)
        k_pos = key + tl.arange(0, KEYS)
        k_tile = load_tile(k, key, k_t, S, KEYS, D, BLOCK_D, True)
        v_tile = load_tile(v, key, v_t, S, KEYS, D, BLOCK_D, True)
        seen = visible((S - L + rows)[:, None], k_pos[None, :], window_blocks, sink_span, BLOCK)
        seen = seen & (k_pos < stop)[None, :]
        _weights, ds = score_gradient(q_tile, k_tile, do_tile, v_tile, lse_tile, delta_tile, seen, qk_scale)
        dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    store_gradient(dq + b * dq_b + h * dq_h, dq_tile * scale, row, dq_t, L, ROWS, D, BLOCK_D)


def backward_options(q: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of (`key_kernel`, `query_kernel`): the largest that spill no register."""
    launch = {"num_warps": 8, "num_stages": 2}
    if q.element_size() > 2 or q.shape[3] > 128:
        return ({"ROWS": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},) * 2
    if q.shape[3] > 64:
        return {"ROWS": 32, "KEYS": 128, **launch}, {"ROWS": 128, "KEYS": 32, **launch}
    return {"ROWS": 64, "KEYS": 128, **launch}, {"ROWS": 128, "KEYS": 64, **launch}


def streaming_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    dout: torch.Tensor, dlse: torch.Tensor, scale: float, block_size: int, window_blocks: int, sink_span: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) of `triton_prefill.streaming`, contiguous, given the gradients of out and of lse."""
    (B, HQ, L, D), (HKV, S) = q.shape, k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    dims = {"D": D, "BLOCK_D": triton.next_power_of_2(max(16, D))}
    delta_kernel[(B * HQ, triton.cdiv(L, 64))](
        out, dout, dlse, delta, *strides(out, dout), L, HQ, **dims, ROWS=64, num_warps=4
    )
    sizes = (window_blocks, sink_span, scale, scale * LOG2_E)
    for_keys, for_queries = backward_options(q)
    key_kernel[(B * HKV, triton.cdiv(S, for_keys["KEYS"]))](
        q, k, v, dout, dk, dv, lse, delta, *strides(q, k, v, dout, dk, dv),
        L, S, HQ, HKV, *sizes, BLOCK=block_size, **dims, **for_keys,
    )  # fmt: skip
    query_kernel[(B * HQ, triton.cdiv(L, for_queries["ROWS"]))](
        q, k, v, dout, dq, lse, delta, *strides(q, k, v, dout, dq),
        L, S, HQ, HQ // HKV, *sizes, BLOCK=block_size, **dims, **for_queries,
    )  # fmt: skip
    return dq, dk, dv
