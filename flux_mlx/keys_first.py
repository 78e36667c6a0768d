"""A layer's keys and values of a whole prompt, written before any of its attention.

MLX writes into a buffer in place only where no work that is still to be done reads it, and copies it otherwise. Chunk
by chunk, handed over ahead of time, the attention of one chunk is still to come when the keys of the next are written:
all keys so far would be copied for every chunk, at 128K tokens for a tenth of the whole time. Layer by layer there is
another order: all keys, then all attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from flux_mlx.one_layer import attention_input
from flux_mlx.token_buffers import keys_in_use

CHUNKS_AT_ONCE = 4  # whose keys are handed over together


def may_come_first(attn: Any, entry: Any) -> bool:
    """Whether all keys of a prompt can be written at once: into a stock cache of one row that keeps them.

    Where one product makes queries, keys and values it would run twice.
    """
    return type(entry.kv) is KVCache and entry.is_alone() and not attn.evicts and "qkv_proj" not in attn


def write_keys(layer: Any, entry: Any, chunks: list[mx.array], written: Callable[[mx.array], None]) -> None:
    """Add keys and values of a prompt's chunks to the KV cache of `entry`.

    Args:
        layer: The block around its attention module.
        entry: Of the cache.
        chunks: The prompt's hidden states, `[1, ., hidden]`.
        written: Called behind every few chunks with an array that is computed when they are, and is not the cache's.
    """
    attn, kv = layer.self_attn, entry.kv
    for i, chunk in enumerate(chunks, 1):
        known = entry.projected.get(kv.offset) if entry.projected else None
        k, v = (
            attn.keys_at(attention_input(layer, chunk), kv.offset)
            if known is None
            else attn.rotated(known, kv.offset)[1:]
        )
        kv.update_and_fetch(k, v)
        if i % CHUNKS_AT_ONCE == 0 or i == len(chunks):
            written(v)


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
