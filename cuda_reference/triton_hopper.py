"""Prefill for Hopper (sm_90) in Gluon: dense, streaming and block-sparse attention are one kernel with two tile lists.

The schedule is FlashAttention-3's (arXiv 2407.08608). In each block of a persistent grid one warp copies tiles with the
tensor memory accelerator, and two groups of four warps compute, 64 query rows each. A group issues the scores of the
next key tile before it takes the exponentials of this one, so that the tensor cores have work meanwhile.

Buffers: q, out [B, HQ, L, D] and k, v [B, HKV, S, D] as tensor descriptors; lse float32 [B, HQ, L]; for block-sparse
attention int32 counts [B, HQ, M] and blocks [B, HQ, M, N] of the kept blocks before the diagonal one. Row and key tiles
are 128 positions and start at multiples of 128. Grid: one block a multiprocessor. Shared memory: two query tiles and
STAGES tiles of keys and of values.

`prefill_kernel` takes descriptors made by the host. `routed_kernel` takes pointers, makes its descriptors on the device
and reads each batch row's route there: the form that `cuda_reference.export_ptx` compiles for MLX.

TILES says which key tiles a row tile has: "span" (sink and window by position), "route" (span where the batch row's
route is SPARSE, else all), "table" (those of a block table).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cuda_reference.pattern import BlockTable
from cuda_reference.triton_prefill import LOG2_E, ROUTE_SPARSE, outputs

TILE = 128  # positions of a row tile and of a key tile
STAGES = 2

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after triton 3.6
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _row_tiles(q_desc, k_desc):
    """Row tiles of one head: the tiles of 128 positions that the queries touch."""
    return gl.cdiv(k_desc.shape[2], 128) - (k_desc.shape[2] - q_desc.shape[2]) // 128


@gluon.jit
def _tile(index, q_desc, k_desc, section):
    """(b * HQ + h, row tile, its first position): sections of heads in turn, in each the last rows first."""
    row_tiles = _row_tiles(q_desc, k_desc)
    start = index // (section * row_tiles) * section
    size = gl.minimum(section, q_desc.shape[0] * q_desc.shape[1] - start)
    inside = index - start * row_tiles
    row_tile = row_tiles - 1 - inside // size
    first_tile = (k_desc.shape[2] - q_desc.shape[2]) // 128
    return start + inside % size, row_tile, (first_tile + row_tile) * 128


@gluon.jit
def _key_tiles(first_q, b, table_row, counts, sizes, TILES: gl.constexpr):
    """(key tiles of the row tile at `first_q`, those of them that are local)."""
    _section, block_size, window_blocks, sink_span, _qk_scale = sizes
    if TILES == "table":
        n_local = gl.load(counts + table_row) + 1
        n = n_local
    else:
        block = first_q // block_size
        if TILES == "route":
            window_blocks = gl.where(gl.load(counts + b) == ROUTE_SPARSE, window_blocks, block + 1)
        start = gl.maximum(0, (block - window_blocks + 1) * block_size)
        n_local = (first_q - start) // 128 + 1
        n = n_local + gl.minimum(sink_span, start) // 128
    return n, n_local


@gluon.jit
def _producer(descs, bufs, bars, tables, sizes, TILES: gl.constexpr, STAGES: gl.constexpr):
    """Copy the queries of every row tile and then its key and value tiles, the diagonal one first, then to the left."""
    q_desc, k_desc, v_desc, _out_desc = descs
    q_bufs, k_bufs, v_bufs = bufs
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = bars
    counts, blocks, key_blocks = tables
    section = sizes[0]
    row_tiles = _row_tiles(q_desc, k_desc)
    step = 0
    turn = 0
    for index in range(gl.program_id(0), row_tiles * q_desc.shape[0] * q_desc.shape[1], gl.num_programs(0)):
        bh, row_tile, first_q = _tile(index, q_desc, k_desc, section)
        table_row = bh * row_tiles + row_tile
        b = bh // q_desc.shape[1]
        h = bh % q_desc.shape[1]
        kv_head = h // (q_desc.shape[1] // k_desc.shape[1])
        n, n_local = _key_tiles(first_q, b, table_row, counts, sizes, TILES)
        q_slot = turn % 2
        mbarrier.wait(q_empty.index(q_slot), (turn // 2 & 1) ^ 1)
        mbarrier.expect(q_ready.index(q_slot), 2 * q_desc.block_type.nbytes)
        for group in gl.static_range(2):
            row = first_q - (k_desc.shape[2] - q_desc.shape[2]) + 64 * group
            tma_load(q_desc, [b, h, row, 0], q_ready.index(q_slot), q_bufs.index(2 * q_slot + group))
        for j in range(n):
            if TILES == "table":
                key = first_q
                if j > 0:
                    key = gl.load(blocks + table_row.to(gl.int64) * key_blocks + j - 1) * 128
            else:
                key = gl.where(j < n_local, first_q - j * 128, (j - n_local) * 128)
            slot = step % STAGES
            phase = (step // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
            tma_load(k_desc, [b, kv_head, key, 0], k_ready.index(slot), k_bufs.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, kv_head, key, 0], v_ready.index(slot), v_bufs.index(slot))
            step += 1
        turn += 1  # noqa: SIM113 (no enumerate in a kernel)


@gluon.jit
def _attend(
    q, k_bufs, v_bufs, bars, step, n, qk_scale, D: gl.constexpr, STAGES: gl.constexpr, WARP_GROUP: gl.constexpr
):
    """Attention of 64 rows over the next `n` key tiles, the diagonal one first: (acc, m, total, next step).

    Between two waits both products of a step are in flight: the scores of tile j and the output of tile j - 1.
    """
    _q_ready, _q_empty, k_ready, k_empty, v_ready, v_empty = bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    slot = step % STAGES
    mbarrier.wait(k_ready.index(slot), step // STAGES & 1)
    s = gl.zeros([64, 128], gl.float32, s_layout)
    s = warpgroup_mma(q, k_bufs.index(slot).reshape([128, D]).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    columns = gl.arange(0, 128, layout=gl.SliceLayout(0, s_layout))
    s = gl.where(columns[None, :] <= rows[:, None], s, float("-inf"))
    m = gl.max(s, 1) * qk_scale
    s = gl.exp2(s * qk_scale - m[:, None])
    total = gl.sum(s, 1)
    p = gl.convert_layout(s.to(q.dtype), p_layout)
    acc = gl.zeros([64, D], gl.float32, o_layout)
    for _j in range(1, n):
        v_slot = slot
        v_phase = step // STAGES & 1
        step += 1
        slot = step % STAGES
        mbarrier.wait(k_ready.index(slot), step // STAGES & 1)
        s_next = gl.zeros([64, 128], gl.float32, s_layout)
        k = k_bufs.index(slot).reshape([128, D]).permute((1, 0))
        s_next = warpgroup_mma(q, k, s_next, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(v_slot), v_phase)
        acc_next = warpgroup_mma(p, v_bufs.index(v_slot).reshape([128, D]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_next])
        mbarrier.arrive(k_empty.index(slot), count=1)
        m_next = gl.maximum(m, gl.max(s, 1) * qk_scale)
        alpha = gl.exp2(m - m_next)
        s = gl.exp2(s * qk_scale - m_next[:, None])
        total = total * alpha + gl.sum(s, 1)
        m = m_next
        acc, p = warpgroup_mma_wait(0, deps=[acc_next, p])  # p: its registers are read until here
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        p = gl.convert_layout(s.to(q.dtype), p_layout)
    mbarrier.wait(v_ready.index(slot), step // STAGES & 1)
    acc = warpgroup_mma(p, v_bufs.index(slot).reshape([128, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc, m, total, step + 1


@gluon.jit
def _store_before_start(out, out_desc, acc, first_row, b, h, layout: gl.constexpr):
    """Write a tile that starts before row 0, where the copy engine cannot."""
    rows = first_row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    out += b.to(gl.int64) * out_desc.strides[0] + h.to(gl.int64) * out_desc.strides[1]
    pointers = out + rows.to(gl.int64)[:, None] * out_desc.strides[2] + columns[None, :]
    inside = ((rows >= 0) & (rows < out_desc.shape[2]))[:, None] & (columns < out_desc.shape[3])[None, :]
    gl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _consumer(
    descs, bufs, bars, tables, sizes, out, lse, TILES: gl.constexpr, STAGES: gl.constexpr, WARP_GROUP: gl.constexpr
):
    """64 rows of every row tile: attend, then write out and lse. The output leaves through the rows' query buffer."""
    q_desc, k_desc, _v_desc, out_desc = descs
    q_bufs, k_bufs, v_bufs = bufs
    counts, _blocks, _key_blocks = tables
    section, _block_size, _window_blocks, _sink_span, qk_scale = sizes
    D: gl.constexpr = q_desc.block_type.shape[3]
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
    L = q_desc.shape[2]
    row_tiles = _row_tiles(q_desc, k_desc)
    step = 0
    turn = 0
    for index in range(gl.program_id(0), row_tiles * q_desc.shape[0] * q_desc.shape[1], gl.num_programs(0)):
        bh, row_tile, first_q = _tile(index, q_desc, k_desc, section)
        b = bh // q_desc.shape[1]
        h = bh % q_desc.shape[1]
        n, _n_local = _key_tiles(first_q, b, bh * row_tiles + row_tile, counts, sizes, TILES)
        q_slot = turn % 2
        q_buf = q_bufs.index(2 * q_slot + WARP_GROUP)
        q = q_buf.reshape([64, D])
        mbarrier.wait(bars[0].index(q_slot), turn // 2 & 1)
        acc, m, total, step = _attend(q, k_bufs, v_bufs, bars, step, n, qk_scale, D, STAGES, WARP_GROUP)
        turn += 1  # noqa: SIM113 (no enumerate in a kernel)
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout))[:, None]
        first_row = first_q - (k_desc.shape[2] - L) + WARP_GROUP * 64
        if first_row >= 0:
            q.store(acc.to(q.dtype))
            fence_async_shared()
            tma_store(out_desc, [b, h, first_row, 0], q_buf)
        else:
            _store_before_start(out, out_desc, acc, first_row, b, h, o_layout)
        rows = first_row + gl.arange(0, 64, layout=row_layout)
        gl.store(
            lse + bh.to(gl.int64) * L + rows, (m + gl.log2(total)) * 0.6931471805599453, mask=(rows >= 0) & (rows < L)
        )
        tma.store_wait(0)
        mbarrier.arrive(bars[1].index(q_slot), count=1)


@gluon.jit
def _barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """N barriers, each of which completes after ARRIVALS arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def _attend_tiles(descs, tables, sizes, out, lse, TILES: gl.constexpr, STAGES: gl.constexpr):
    """Allocate buffers and barriers (ready: filled by the copy engine; empty: read by both groups), then split up."""
    q_desc, k_desc, v_desc, _out_desc = descs
    D: gl.constexpr = q_desc.block_type.shape[3]
    bufs = (
        gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, 64, D], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 128, D], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, 128, D], v_desc.layout),
    )
    bars = (
        _barriers(2, 1), _barriers(2, 2), _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(STAGES, 1),
        _barriers(STAGES, 2),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (descs, bufs, bars, tables, sizes, out, lse, TILES, STAGES, 0)),
            (_consumer, (descs, bufs, bars, tables, sizes, out, lse, TILES, STAGES, 1)),
            (_producer, (descs, bufs, bars, tables, sizes, TILES, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def prefill_kernel(
    q_desc, k_desc, v_desc, out_desc, out, lse, counts, blocks, key_blocks, section, block_size, window_blocks,
    sink_span, qk_scale, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention through descriptors that the host made."""
    descs = (q_desc, k_desc, v_desc, out_desc)
    sizes = (section, block_size, window_blocks, sink_span, qk_scale)
    _attend_tiles(descs, (counts, blocks, key_blocks), sizes, out, lse, TILES, STAGES)


@gluon.jit
def routed_kernel(
    q, k, v, route, out, lse, B, HQ, HKV, L, S, capacity, section, block_size, window_blocks, sink_span, qk_scale,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Full or streaming attention by the route of each batch row, int32 `[B]`.

    q, out dense [B, L, HQ, D], the layout that projections leave; k, v dense [B, HKV, capacity, D], of whose rows S
    are in use. Each block makes its descriptors in 512 bytes of scratch.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    row = HQ.to(gl.int64) * D
    head = capacity.to(gl.int64) * D
    descs = (
        tma.make_tensor_descriptor(q, [B, HQ, L, D], [L * row, D, row, 1], [1, 1, 64, D], layout),
        tma.make_tensor_descriptor(k, [B, HKV, S, D], [HKV * head, head, D, 1], [1, 1, 128, D], layout),
        tma.make_tensor_descriptor(v, [B, HKV, S, D], [HKV * head, head, D, 1], [1, 1, 128, D], layout),
        tma.make_tensor_descriptor(out, [B, HQ, L, D], [L * row, D, row, 1], [1, 1, 64, D], layout),
    )
    sizes = (section, block_size, window_blocks, sink_span, qk_scale)
    _attend_tiles(descs, (route, route, 0), sizes, out, lse, "route", STAGES)


@cache
def _device(device: torch.device) -> tuple[bool, int, int]:
    """(is it Hopper, multiprocessors, bytes of L2 cache) of a CUDA device."""
    facts = torch.cuda.get_device_properties(device)
    return (facts.major, facts.minor) == (9, 0), facts.multi_processor_count, facts.L2_cache_size


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_size: int) -> bool:
    """Whether this kernel can run the call: a Hopper GPU, half precision, D <= 128, whole tiles, copyable layouts."""
    if not (q.is_cuda and _device(q.device)[0]) or q.element_size() != 2 or q.shape[3] > 128 or block_size % TILE:
        return False
    return all(x.data_ptr() % 16 == 0 and all(step * 2 % 16 == 0 for step in x.stride()[:3]) for x in (q, k, v))


def supports_table(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: BlockTable) -> bool:
    """`supports`, for blocks of exactly one tile."""
    return table.block_size == TILE and supports(q, k, v, table.block_size)


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """x `[B, H, T, D]` in boxes of `rows` tokens and D rounded up to a power of two; what lies outside reads as 0."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor.from_tensor(x, [1, 1, rows, max(64, triton.next_power_of_2(x.shape[3]))], layout)


def _section(q: torch.Tensor, k: torch.Tensor, live_tokens: int) -> int:
    """Query heads whose live keys and values fit in three quarters of the L2 cache together; whole KV heads."""
    kv_heads = k.shape[0] * k.shape[1]
    fit = max(1, _device(q.device)[2] * 3 // 4 // (live_tokens * q.shape[3] * 4))
    sections = triton.cdiv(kv_heads, fit)
    return triton.cdiv(kv_heads, sections) * (q.shape[1] // k.shape[1])


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, section: int, sizes: tuple[int, int, int], table:
    BlockTable | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run `prefill_kernel`; `sizes` is (block_size, window_blocks, sink_span)."""
    out, lse = outputs(q)
    row_tiles = triton.cdiv(k.shape[2], TILE) - (k.shape[2] - q.shape[2]) // TILE
    blocks = (lse, lse, 0)  # not read
    if table is not None:
        blocks = (table.full_kv_num_blocks, table.full_kv_indices, table.full_kv_indices.shape[-1])
    prefill_kernel[(min(_device(q.device)[1], row_tiles * q.shape[0] * q.shape[1]),)](
        _descriptor(q, 64), _descriptor(k, TILE), _descriptor(v, TILE), _descriptor(out, 64), out, lse, *blocks,
        section, *sizes, scale * LOG2_E, TILES="span" if table is None else "table", STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return out, lse


def streaming(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block_size: int, window_blocks: int, sink_span: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_prefill.streaming` on Hopper, for what `supports` allows."""
    live = min(k.shape[2], window_blocks * block_size + sink_span)
    return _launch(q, k, v, scale, _section(q, k, live), (block_size, window_blocks, sink_span), None)


def block_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, table: BlockTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_prefill.block_sparse` on Hopper, for what `supports_table` allows, with every diagonal block kept."""
    return _launch(q, k, v, scale, _section(q, k, k.shape[2]), (table.block_size, 1, 0), table)
