"""The first call over an empty KV cache: attention takes its keys and values as they come, the cache gets a copy.

Stock's cache writes them into a buffer of zeros and has attention read slices of that: a few small operations more in
every layer, and a short prompt takes as long as the host needs to hand its operations over.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache


class FirstKeys:
    """Stands in for an empty stock KV cache in one call of a stock attention module; else use `of`'s cache as it is.

    Args:
        kv: The cache: it comes to hold what stock's `update_and_fetch` would have it hold.
    """

    __slots__ = ("kv",)

    def __init__(self, kv: KVCache):
        self.kv = kv

    @classmethod
    def of(cls, kv: Any) -> Any:
        """What a call is to be given in place of `kv`: `kv` itself unless it is stock's and empty."""
        return cls(kv) if type(kv) is KVCache and kv.keys is None else kv

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kv, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Hold `[B, HKV, L, D]` in buffers of whole steps, zeros behind them; returns what came."""
        kv, tokens = self.kv, keys.shape[2]
        missing = -tokens % kv.step
        kv.keys, kv.values, kv.offset = _padded(keys, missing), _padded(values, missing), tokens
        return keys, values


def _padded(x: mx.array, tokens: int) -> mx.array:
    """`x` and zeros for so many more tokens, in memory of its own, in its own order."""
    return mx.pad(x, ((0, 0), (0, 0), (0, tokens), (0, 0))) if tokens else mx.contiguous(x)
