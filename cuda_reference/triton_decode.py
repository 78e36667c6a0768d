"""Decode in Triton: a few queries over keys in place, the keys split over the GPU and merged by log-sum-exp.

All query heads of a KV head are the rows of one tile, so that a key is read once. The keys of sink and window are
walked as one list; streaming decode reads the same number of bytes whatever the length of the cache. The merge is a
second, small kernel that adds the splits in their order: the result does not depend on timing.

Buffers: q, out [B, HQ, L, D] and k, v [B, HKV, S, D] by strides; scratch float32 [splits, B * HKV, ROWS, D] and
[splits, B * HKV, ROWS]. Grid: (B * HKV, splits), then (B * HKV, rows).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from cuda_reference.triton_prefill import LOG2_E, load_tile, outputs, softmax_step, strides, visible

LN_2 = tl.constexpr(0.6931471805599453)
MAX_TOKENS = 16  # longest call that is decoded
BLOCKS_PER_MULTIPROCESSOR = 2  # as many as its shared memory holds
MAX_SPLITS = 128  # one program merges them


@triton.jit
def split_kernel(
    q, k, v, part_out, part_lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    L, S, HKV, GROUP, start, sink_stop, window_blocks, sink_span, tiles_per_split, qk_scale,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one KV head: its normalised output and its log2-sum-exp2."""
    b = tl.program_id(0) // HKV
    kv_head = tl.program_id(0) % HKV
    k += b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + rows // L
    q_rows = q + b.to(tl.int64) * q_b + head.to(tl.int64) * q_h + (rows % L) * q_t
    inside = (rows < GROUP * L)[:, None] & (columns < D)[None, :]
    q_tile = tl.load(q_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    q_pos = S - L + rows % L

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    n_sink = tl.cdiv(sink_stop, KEYS)
    first = tl.program_id(1) * tiles_per_split
    for i in range(first, tl.minimum(first + tiles_per_split, n_sink + tl.cdiv(S - start, KEYS))):
        key = tl.where(i < n_sink, i * KEYS, start + (i - n_sink) * KEYS)
        stop = tl.where(i < n_sink, sink_stop, S)
        k_pos = key + tl.arange(0, KEYS)
        seen = visible(q_pos[:, None], k_pos[None, :], window_blocks, sink_span, BLOCK) & (k_pos < stop)[None, :]
        k_tile = load_tile(k, key, k_t, stop, KEYS, D, BLOCK_D, True)
        v_tile = load_tile(v, key, v_t, stop, KEYS, D, BLOCK_D, True)
        acc, m, total = softmax_step(acc, m, total, q_tile, k_tile, v_tile, seen, qk_scale, True)
    empty = total == 0.0
    part = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * ROWS + rows
    tl.store(part_lse + part, tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, total))))
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(part_out + part[:, None] * D + columns[None, :], acc, mask=(columns < D)[None, :])


@triton.jit
def merge_kernel(
    part_out, part_lse, out, lse, L, HQ, HKV, GROUP, n_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out = sum over the splits of 2**(lse_i - lse) * out_i for one row."""
    b = tl.program_id(0) // HKV
    row = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    columns = tl.arange(0, BLOCK_D)
    part = (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * ROWS + row
    part_of_lse = tl.load(part_lse + part, mask=split < n_splits, other=float("-inf"))
    top = tl.max(part_of_lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(part_of_lse - base)
    total = tl.sum(weights, 0)
    inside = (split < n_splits)[:, None] & (columns < D)[None, :]
    parts = tl.load(part_out + part[:, None] * D + columns[None, :], mask=inside, other=0.0)
    shares = tl.where(inside, parts * weights[:, None], 0.0)  # masked last: see the README on lanes
    merged = tl.sum(shares, 0) / tl.where(total == 0.0, 1.0, total)
    head = tl.program_id(0) % HKV * GROUP + row // L
    token = (b * HQ + head).to(tl.int64) * L + row % L
    tl.store(out + token * D + columns, merged.to(out.dtype.element_ty), mask=columns < D)
    row_lse = tl.where(total == 0.0, float("-inf"), (base + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2)
    tl.store(lse + token, row_lse)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 4 for the interpreter, so that its runs are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def tile_options(q: torch.Tensor, query_rows: int) -> dict[str, int]:
    """Tile sizes and launch options of `split_kernel` for `query_rows` rows (heads of the group times tokens)."""
    keys = 64 if q.shape[3] * q.element_size() <= 256 else 32
    return {"ROWS": max(16, triton.next_power_of_2(query_rows)), "KEYS": keys, "num_warps": 4, "num_stages": 3}


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block_size: int, window_blocks: int, sink_span: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the split and the merge; arguments as `triton_prefill.streaming`, with L at most `MAX_TOKENS`."""
    (B, HQ, L, D), (HKV, S) = q.shape, k.shape[1:3]
    out, lse = outputs(q)
    start = max(0, ((S - L) // block_size - window_blocks + 1) * block_size)
    sink_stop = min(sink_span, start)
    options = tile_options(q, HQ // HKV * L)
    dims = {"D": D, "BLOCK_D": triton.next_power_of_2(max(16, D))}
    tiles = triton.cdiv(sink_stop, options["KEYS"]) + triton.cdiv(S - start, options["KEYS"])
    wanted = BLOCKS_PER_MULTIPROCESSOR * multiprocessors(q.device) // (B * HKV)
    tiles_per_split = triton.cdiv(tiles, max(1, min(MAX_SPLITS, wanted)))
    splits = triton.cdiv(tiles, tiles_per_split)
    part_out = torch.empty(splits, B * HKV, options["ROWS"], D, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(splits, B * HKV, options["ROWS"], dtype=torch.float32, device=q.device)
    split_kernel[(B * HKV, splits)](
        q, k, v, part_out, part_lse, *strides(q, k, v),
        L, S, HKV, HQ // HKV, start, sink_stop, window_blocks, sink_span, tiles_per_split, scale * LOG2_E,
        BLOCK=block_size, **dims, **options,
    )  # fmt: skip
    merge_kernel[(B * HKV, HQ // HKV * L)](
        part_out, part_lse, out, lse, L, HQ, HKV, HQ // HKV, splits,
        **dims, ROWS=options["ROWS"], SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return out, lse
