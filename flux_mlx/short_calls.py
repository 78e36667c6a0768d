"""Attention of a few new tokens over a KV cache, prepared once for all calls of a shape.

A decoding step is bound by the host where layers are small or the GPU is fast: what can be decided once is not decided
in every layer for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from flux_mlx import cuda_kernels, kernel_policy, kernels
from flux_mlx.attention import sparse_attention
from flux_mlx.spec import PatternConfig, Route

Decoder = Callable[[mx.array, mx.array, mx.array, int], mx.array]
ALL_SPARSE = (Route.SPARSE,)


class ShortCalls:
    """The short calls of one cache and one pattern."""

    __slots__ = ("_decoder", "_key")

    def __init__(self) -> None:
        self._key: tuple[int, int, tuple[Route, ...]] | None = None  # L, capacity and routes that `_decoder` is for
        self._decoder: Decoder | None = None

    @classmethod
    def of(cls, cache: Any) -> ShortCalls:
        """Those of a routed cache (`flux_mlx.cache.CacheList`), made when they are first asked for."""
        if cache.short_calls is None:
            cache.short_calls = cls()
        return cache.short_calls

    def __call__(self, q: mx.array, kv: KVCache, pattern: PatternConfig, scale: float) -> mx.array:
        """Sparse attention of the newest L tokens, which `kv` holds already.

        Args:
            q: `[B, HQ, L, D]`.
            kv: Their keys and values, `[B, HKV, capacity, D]`, the first `kv.offset` in use.
            pattern: Which keys a query sees.
            scale: Multiplier of the scores.

        Returns:
            `[B, L, HQ * D]`.
        """
        self._prepare(q, kv, pattern, scale, ALL_SPARSE)
        if self._decoder is not None:
            return self._decoder(q, kv.keys, kv.values, kv.offset)
        out = sparse_attention(q, kv.keys, kv.values, pattern, scale=scale, kv_tokens=kv.offset)
        return out.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)

    def batch(
        self, q: mx.array, kv: BatchKVCache, pattern: PatternConfig, scale: float, routes: list[Route]
    ) -> mx.array | None:
        """Full or sparse attention by the route of each row of a batch without padding, in one launch.

        Returns:
            `[B, L, HQ * D]`; None where no kernel does it.
        """
        codes = tuple(Route.SPARSE if route == Route.SPARSE else Route.FULL for route in routes)
        self._prepare(q, kv, pattern, scale, codes)
        return None if self._decoder is None else self._decoder(q, kv.keys, kv.values, kv._idx)

    def _prepare(
        self, q: mx.array, kv: KVCache | BatchKVCache, pattern: PatternConfig, scale: float, routes: tuple[Route, ...]
    ) -> None:
        key = (q.shape[2], kv.keys.shape[2], routes)
        if key != self._key:
            self._key, self._decoder = key, _prepared(q, kv, pattern, scale, routes)


def _prepared(
    q: mx.array, kv: KVCache | BatchKVCache, pattern: PatternConfig, scale: float, routes: tuple[Route, ...]
) -> Decoder | None:
    """A kernel for such calls, if the policy trusts it."""
    if kernel_policy.choose(q, *kv.keys_and_values(), pattern) != "cuda":
        return None
    all_alike = routes[0] if len(set(routes)) == 1 else routes
    return cuda_kernels.decoder(q.shape, kv.keys.shape, kernels.dtype_name(q), pattern, scale, all_alike)
