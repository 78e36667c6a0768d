"""The first call over an empty KV cache: attention takes its keys and values as they come, the cache gets a copy.

Stock's cache writes them into a buffer of zeros and has attention read slices of that: a few small operations more in
every layer, and a short prompt takes as long as the host needs to hand its operations over.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from flux_mlx.token_buffers import span


class FirstKeys:
    """Stands in for an empty stock KV cache in one call of a stock attention module; else use `of`'s cache as it is.

    Args:
        kv: The cache: it comes to hold what stock's `update_and_fetch` would have it hold.
    """

    __slots__ = ("kv", "offset")

    def __init__(self, kv: KVCache):
        self.kv, self.offset = kv, kv.offset

    @classmethod
    def of(cls, kv: Any) -> Any:
        """What a call is to be given in place of `kv`: `kv` itself unless it is stock's and empty."""
        return cls(kv) if type(kv) is KVCache and kv.keys is None else kv

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kv, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Hold `[B, HKV, L, D]` in buffers of whole steps, zeros behind them; returns what holds the same.

        The keys are those of the buffer, as stock's: where a family does not rotate them they come in another order of
        memory, and products over that round otherwise.
        """
        kv, tokens = self.kv, keys.shape[2]
        if missing := -tokens % kv.step:
            widths = ((0, 0), (0, 0), (0, missing), (0, 0))
            kv.keys, kv.values = mx.pad(keys, widths), mx.pad(values, widths)
        else:
            kv.keys, kv.values = mx.contiguous(keys), mx.contiguous(values)
        kv.offset = self.offset = tokens
        return kv.keys[span(0, tokens)] if missing else kv.keys, values
