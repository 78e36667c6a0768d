"""A new token's place in the buffers of a KV cache, as MLX takes it fastest, and made once for all layers of a step."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
from mlx_lm.models.cache import KVCache

Index = tuple[slice, slice, slice, slice]
_ALL = slice(None)


@lru_cache(maxsize=4)
def position_array(offset: int) -> mx.array:
    """A token's position as int32 `[]`: an array of its own in every layer would be memory to be had and filled."""
    return mx.array(offset, mx.int32)


@lru_cache(maxsize=8)
def span(start: int, stop: int) -> Index:
    """The tokens from `start` to `stop` of `[B, HKV, S, D]`; an ellipsis would take MLX's bindings twice the time."""
    return _ALL, _ALL, slice(start, stop), _ALL


def append_token(kv: KVCache, k: mx.array, v: mx.array) -> None:
    """What `update_and_fetch` of stock's KV cache does for one token, but for the slices that it returns.

    Args:
        kv: Of one row.
        k, v: `[1, HKV, 1, D]`.
    """
    offset = kv.offset
    if kv.keys is None or offset >= kv.keys.shape[2]:
        kv.update_and_fetch(k, v)
        return
    newest = span(offset, offset + 1)
    kv.offset = offset + 1
    kv.keys[newest] = k
    kv.values[newest] = v


def keys_in_use(kv: KVCache) -> tuple[mx.array, mx.array]:
    """What `keys_and_values` of stock's KV cache returns."""
    if kv.offset >= kv.keys.shape[2]:
        return kv.keys, kv.values
    used = span(0, kv.offset)
    return kv.keys[used], kv.values[used]
