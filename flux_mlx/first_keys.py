"""The first call over an empty KV cache: it is filled by padding the call's keys and values.

Stock's cache writes them into a buffer of zeros, in more and slower steps of Python, in every layer; and a short prompt
takes as long as the host needs to hand its operations over.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from flux_mlx.token_buffers import keys_in_use


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
        """Hold `[B, HKV, L, D]` in buffers of whole steps, zeros behind them; returns what of these is in use.

        Values as given would do for attention, but then nothing needs the buffer of values: in every layer it waits
        until it is evaluated by itself, holds all that the projection made, and only this thread can compute it.
        """
        kv, tokens = self.kv, keys.shape[2]
        if missing := -tokens % kv.step:
            kv.keys, kv.values = _padded(keys, missing), _padded(values, missing)
        else:
            kv.keys, kv.values = mx.contiguous(keys), mx.contiguous(values)
        kv.offset = self.offset = tokens
        return keys_in_use(kv)


def _padded(x: mx.array, tokens: int) -> mx.array:
    """`x` `[B, HKV, L, D]` with so many tokens of zeros behind it."""
    return mx.pad(x, ((0, 0), (0, 0), (0, tokens), (0, 0)), constant_values=_zero(x.dtype))


@lru_cache
def _zero(dtype: mx.Dtype) -> mx.array:
    """Zero, made once: MLX would make an array of its own for every buffer."""
    return mx.array(0, dtype)
