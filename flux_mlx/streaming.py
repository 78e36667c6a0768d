"""Streaming attention as a composition of stock attention calls over sliced keys, without array masks.

Once the window has left the sink, a query block sees [sink | earlier local blocks | own block], and the lower-right
causal rule over exactly these keys is the streaming pattern. So a block is one batch item of a stock causal call.

A few queries (decode, verification of drafts) are another matter: copying sink and window side by side costs more than
attending to them. Where MLX composes attention itself, on a CPU, the scores of both are joined instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from flux_mlx.spec import PatternConfig, visible

BLOCKS_PER_CALL = 32  # bounds the copy of the gathered keys: 32 * (sink + window) of them
MIN_TILE_TOKENS = 32  # smaller blocks make poor batch items: their queries go by masked tiles of
MASKED_TILE_TOKENS = 256  # this many
FEW_QUERIES = 16  # up to so many queries read sink and window where they lie, on a CPU


def dense(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention of the last L of S positions."""
    mask = "causal" if q.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


class Piece(NamedTuple):
    """Consecutive queries that one kind of call serves: positions [start, stop)."""

    kind: str  # "dense", "part" of a block, whole "blocks", or a masked "tile"
    start: int
    stop: int


def plan(pattern: PatternConfig, start: int, stop: int) -> Iterator[Piece]:
    """Cut the query positions [start, stop) into pieces, in order."""
    block = pattern.block_size
    dense_stop = min(stop, pattern.dense_tokens)
    if start < dense_stop:
        yield Piece("dense", start, dense_stop)
        start = dense_stop
    if block < MIN_TILE_TOKENS and stop - start > 1:
        for low in range(start, stop, MASKED_TILE_TOKENS):
            yield Piece("tile", low, min(stop, low + MASKED_TILE_TOKENS))
        return
    whole_start, whole_stop = min(stop, -(-start // block) * block), stop // block * block
    if start < whole_start:
        yield Piece("part", start, whole_start)
    for low in range(whole_start, whole_stop, BLOCKS_PER_CALL * block):
        yield Piece("blocks", low, min(whole_stop, low + BLOCKS_PER_CALL * block))
    if max(start, whole_start) < stop and whole_stop < stop and whole_start <= whole_stop:
        yield Piece("part", whole_stop, stop)


def attend(q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, scale: float) -> mx.array:
    """Streaming attention. Shapes as in `flux_mlx.attention.sparse_attention`."""
    offset = k.shape[2] - q.shape[2]
    outputs = []
    for kind, start, stop in plan(pattern, offset, k.shape[2]):
        rows = q[:, :, start - offset : stop - offset]
        if kind == "dense":
            outputs.append(dense(rows, k[:, :, :stop], v[:, :, :stop], scale))
        elif kind == "part":
            attend_part = _attend_in_place if reads_in_place(rows, pattern) else _attend_gathered
            outputs.append(attend_part(rows, k, v, pattern, start, stop, scale))
        elif kind == "blocks":
            outputs.append(_attend_blocks(rows, k, v, pattern, start, stop, scale))
        else:
            outputs.append(_attend_tile(rows, k, v, pattern, start, stop, scale))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def reads_in_place(q: mx.array, pattern: PatternConfig) -> bool:
    """Whether queries of one block `[B, HQ, L, D]` go to `_attend_in_place` rather than to a copy of their keys.

    Two products more, which on a GPU are four launches, must cost less than copying sink and window: on a CPU they do
    (benchmarks/cpu_decode.json). A GPU copies about 9 MB a layer at 2,176 keys, 8 heads and D 128 in 16 bits, less time
    than the launches; there kernels read in place (`kernel_policy`).
    """
    return pattern.sink_span > 0 and q.shape[2] <= FEW_QUERIES and mx.default_device() == mx.Device(mx.cpu)


def _attend_gathered(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, start: int, stop: int, scale: float
) -> mx.array:
    """The queries [start, stop) of one block, by a stock call over [sink | local keys]."""
    low = pattern.window_start(start)
    keys, values = k[:, :, low:stop], v[:, :, low:stop]
    if pattern.sink_span:
        keys = mx.concatenate([k[:, :, : pattern.sink_span], keys], axis=2)
        values = mx.concatenate([v[:, :, : pattern.sink_span], values], axis=2)
    return dense(q, keys, values, scale)


def _attend_in_place(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, start: int, stop: int, scale: float
) -> mx.array:
    """The same without a copy: scores of sink and window apart, one softmax over both, two sums of values."""
    B, HQ, L, D = q.shape
    HKV, sink, local = k.shape[1], slice(0, pattern.sink_span), slice(pattern.window_start(start), stop)
    rows = (q * scale).reshape(B, HKV, -1, D)  # the queries of a KV head, head by head: [B, HKV, G * L, D]
    near = rows @ k[:, :, local].swapaxes(-1, -2)
    if L > 1:
        hidden = mx.arange(start, stop)[:, None] < mx.arange(local.start, stop)
        near = mx.where(hidden, -mx.inf, near.reshape(B, HKV, -1, *hidden.shape)).reshape(near.shape)
    far = rows @ k[:, :, sink].swapaxes(-1, -2)
    weights = mx.softmax(mx.concatenate([far, near], axis=-1), axis=-1, precise=True)
    out = weights[..., sink] @ v[:, :, sink] + weights[..., sink.stop :] @ v[:, :, local]
    return out.reshape(B, HQ, L, -1)


def _gather_blocks(x: mx.array, pattern: PatternConfig, start: int, stop: int) -> mx.array:
    """[sink | local blocks] of each query block in [start, stop): `[B * blocks, HKV, sink + window, D]`."""
    block, span = pattern.block_size, pattern.window_span
    B, H, _, D = x.shape
    count = (stop - start) // block
    local = x[:, :, pattern.window_start(start) : stop]  # [B, H, T, D]
    tokens = local.shape[2]
    strides = (H * tokens * D, block * D, tokens * D, D, 1)
    windows = mx.as_strided(mx.contiguous(local), (B, count, H, span, D), strides)
    if pattern.sink_span:
        sink = mx.broadcast_to(x[:, None, :, : pattern.sink_span], (B, count, H, pattern.sink_span, D))
        windows = mx.concatenate([sink, windows], axis=3)
    return windows.reshape(B * count, H, -1, D)


def _attend_blocks(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, start: int, stop: int, scale: float
) -> mx.array:
    B, HQ, L, D = q.shape
    block = pattern.block_size
    rows = q.reshape(B, HQ, L // block, block, D).swapaxes(1, 2).reshape(-1, HQ, block, D)
    keys, values = (_gather_blocks(x, pattern, start, stop) for x in (k, v))
    out = dense(rows, keys, values, scale)
    return out.reshape(B, L // block, HQ, block, -1).swapaxes(1, 2).reshape(B, HQ, L, -1)


def _attend_tile(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, start: int, stop: int, scale: float
) -> mx.array:
    """One masked call: the mask is [rows, sink + window + rows] at most."""
    low = max(pattern.sink_span, pattern.window_start(start))
    keys, values = (mx.concatenate([x[:, :, : pattern.sink_span], x[:, :, low:stop]], axis=2) for x in (k, v))
    k_pos = mx.concatenate([mx.arange(pattern.sink_span), mx.arange(low, stop)])
    mask = visible(pattern, mx.arange(start, stop)[:, None], k_pos[None, :])
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)


def triangle(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int, scale: float
) -> mx.array:
    """Streaming, but the last `last_tokens` queries of the prompt see every earlier key."""
    offset, kv_tokens = k.shape[2] - q.shape[2], k.shape[2]
    low = min(max(prompt_tokens - pattern.last_tokens, offset), kv_tokens)
    high = max(min(prompt_tokens, kv_tokens), low)
    outputs = []
    for call, start, stop in ((attend, offset, low), (dense, low, high), (attend, high, kv_tokens)):
        if start < stop:
            extra = (pattern, scale) if call is attend else (scale,)
            rows = q[:, :, start - offset : stop - offset]
            outputs.append(call(rows, k[:, :, :stop], v[:, :, :stop], *extra))
    return mx.concatenate(outputs, axis=2)


def compact(x: mx.array, pattern: PatternConfig, q_tokens: int) -> mx.array:
    """Only the keys that the last `q_tokens` positions can see: `[..., S, D]` to `[..., S', D]`.

    Both cuts lie on block boundaries, so streaming attention over the compact keys is the same function: block
    indices behind the sink all shift by the same number.
    """
    low = pattern.window_start(x.shape[-2] - q_tokens)
    if low <= pattern.sink_span:
        return x
    return mx.concatenate([x[..., : pattern.sink_span, :], x[..., low:, :]], axis=-2)
