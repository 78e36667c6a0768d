"""A layer's keys and values of a whole prompt, written before any of its attention.

MLX writes into a buffer in place only where no work that is still to be done reads it, and copies it otherwise. Chunk
by chunk, handed over ahead of time, the attention of one chunk is still to come when the keys of the next are written:
all keys so far would be copied for every chunk, at 128K tokens for a tenth of the whole time. Layer by layer there is
another order: all keys, then all attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from flux_mlx.families import Projected, project
from flux_mlx.one_layer import attention_input
from flux_mlx.prompt_ends import chunks_of_ends
from flux_mlx.token_buffers import keys_in_use

CHUNKS_AT_ONCE = 4  # whose keys are handed over together
CHUNKS_KEPT = 4  # of a prompt of at most so many chunks, all projections are kept until attention takes them


def keys_may_come_first(attn: Any, entry: Any) -> bool:
    """Whether all keys of a prompt can be written at once: into a stock cache of one row that keeps them.

    Where one product makes queries, keys and values it would run twice. Ranks that share heads go chunk by chunk.
    """
    is_plain = type(entry.kv) is KVCache and entry.is_alone() and attn.group is None
    return is_plain and not attn.evicts and "qkv_proj" not in attn


def project_kept(layer: Any, entry: Any, chunks: list[mx.array]) -> dict[int, Projected]:
    """What `families.project` gives of the chunks whose projections are kept for attention, by the offset of each.

    Those are all of a short prompt, and of a longer one those that hold the ends, whose queries the router reads.

    Args:
        layer: The block around its attention module.
        entry: Of the cache.
        chunks: The prompt's hidden states, `[1, ., hidden]`.
    """
    attn, sizes = layer.self_attn, [chunk.shape[1] for chunk in chunks]
    kept = range(len(chunks))
    if len(chunks) > CHUNKS_KEPT:
        kept = chunks_of_ends(sizes, attn.flux.router.pool_tokens) if attn.forced is None else ()
    offsets = list(itertools.accumulate(sizes, initial=entry.offset))
    return {offsets[i]: project(attn, attention_input(layer, chunks[i])) for i in kept}


def write_keys(layer: Any, entry: Any, chunks: list[mx.array], start: Callable[[list[mx.array]], None]) -> None:
    """Add keys and values of a prompt's chunks to the KV cache of `entry`.

    Args:
        layer, entry, chunks: As in `project_kept`.
        start: Called behind every few chunks, with arrays that are to be computed beside.
    """
    attn, kv = layer.self_attn, entry.kv
    beside = []
    for i, chunk in enumerate(chunks, 1):
        parts = entry.projected.get(kv.offset) if entry.projected else None
        if parts is None:
            k, v = attn.keys_at(attention_input(layer, chunk), kv.offset)
        else:
            q, k, v = parts
            k, v = attn.rotated_keys(k, v, kv.offset)
            beside.append(q)
        kv.update_and_fetch(k, v)
        if i % CHUNKS_AT_ONCE == 0 or i == len(chunks):
            start([*beside, v])
            beside.clear()


@contextmanager
def keys_in_place(kv: KVCache, offset: int) -> Iterator[None]:
    """Within it calls from `offset` on find their keys in `kv`; what they have to add is not computed."""
    kv.offset = offset
    kv.update_and_fetch = partial(_advance, kv)
    try:
        yield
    finally:
        del kv.update_and_fetch


def _advance(kv: KVCache, keys: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    kv.offset += keys.shape[2]
    return keys_in_use(kv)
