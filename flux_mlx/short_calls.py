"""Sparse attention of a few new tokens over a KV cache, prepared once for all calls of a shape.

A decoding step is bound by the host where layers are small or the GPU is fast: what can be decided once is not decided
in every layer for every token.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from flux_mlx import cuda_kernels, kernel_policy, kernels
from flux_mlx.attention import sparse_attention
from flux_mlx.spec import PatternConfig, Route

Decoder = Callable[[mx.array, mx.array, mx.array, int], mx.array]


class ShortCalls:
    """The short calls of one cache and one pattern."""

    __slots__ = ("_decoder", "_shape")

    def __init__(self) -> None:
        self._shape: tuple[int, int] | None = None  # (L, capacity) that `_decoder` is for
        self._decoder: Decoder | None = None

    def __call__(self, q: mx.array, kv: KVCache, pattern: PatternConfig, scale: float) -> mx.array:
        """Attention of the newest L tokens, which `kv` holds already.

        Args:
            q: `[B, HQ, L, D]`.
            kv: Their keys and values, `[B, HKV, capacity, D]`, the first `kv.offset` in use.
            pattern: Which keys a query sees.
            scale: Multiplier of the scores.

        Returns:
            `[B, L, HQ * D]`.
        """
        shape = (q.shape[2], kv.keys.shape[2])
        if shape != self._shape:
            self._shape, self._decoder = shape, _prepared(q, kv, pattern, scale)
        if self._decoder is not None:
            return self._decoder(q, kv.keys, kv.values, kv.offset)
        out = sparse_attention(q, kv.keys, kv.values, pattern, scale=scale, kv_tokens=kv.offset)
        return out.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)


def _prepared(q: mx.array, kv: KVCache, pattern: PatternConfig, scale: float) -> Decoder | None:
    """A kernel for such calls; None: `sparse_attention` decides each time."""
    if kernel_policy.choose(q, *kv.keys_and_values(), pattern) != "cuda":
        return None
    return cuda_kernels.decoder(q.shape, kv.keys.shape, kernels.dtype_name(q), pattern, scale, Route.SPARSE)
