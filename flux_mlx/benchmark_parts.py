"""Attention of one layer by itself, and Amdahl's ceiling: what routing can gain if all else stays as it is.

A layer's attention is timed as it is called in a model: chunk by chunk over a growing mlx-lm cache, or one query over
all keys. Calls are chained, each output being the next query, so that none can run beside another.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from flux_mlx.attention import full_attention, sparse_attention
from flux_mlx.models import routed_layers
from flux_mlx.short_calls import ShortCalls
from flux_mlx.spec import PatternConfig, visible_pairs

_SAMPLE_S = 0.01  # 2n calls last about this long; for one call that does, the host's share does not matter
_GRAPH_NODES = 100  # MLX hands the device so many operations together, of a graph that is evaluated as a whole
_SHORT_CALL_S = 1.5e-4  # one that the host, which needs some 35 us, might not prepare while the device computes another
_SAMPLES = 3
_KEY_BYTES = 1 << 31  # decode goes round among caches of this size in all, so that keys come from memory
_MAX_KEY_SETS = 16

Attend = Callable[[mx.array, KVCache], mx.array]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention of a model's routed layers, which are taken to be alike."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype
    batch: int = 1

    @classmethod
    def of(cls, model: nn.Module, batch: int = 1) -> AttentionShape:
        """That of a Flux model."""
        layers = routed_layers(model)
        attn = next(iter(layers.values()))
        projection = attn.o_proj
        dtype = (projection.scales if "scales" in projection else projection.weight).dtype
        return cls(len(layers), attn.n_heads, attn.n_kv_heads, attn.pooled_dim, dtype, batch)

    def keys(self, tokens: int) -> mx.array:
        """Random keys or values `[B, HKV, tokens, D]`."""
        x = mx.random.normal((self.batch, self.kv_heads, tokens, self.head_dim), self.dtype)
        mx.eval(x)
        return x

    def queries(self, tokens: int) -> mx.array:
        """Random queries `[B, HQ, tokens, D]`, laid out in memory as projection and RoPE leave them in a model."""
        x = mx.random.normal((self.batch, tokens, self.q_heads, self.head_dim), self.dtype).swapaxes(1, 2)
        q = mx.fast.rope(x, self.head_dim, traditional=False, base=1e4, scale=1.0, offset=0)
        mx.eval(q)
        return q

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of one layer's keys and values."""
        return 2 * self.batch * self.kv_heads * tokens * self.head_dim * self.dtype.size


def dense(q: mx.array, kv: KVCache) -> mx.array:
    """Causal attention as stock mlx-lm calls it."""
    return full_attention(q, *kv.keys_and_values(), impl="ops")


def sparse(pattern: PatternConfig, prompt_tokens: int) -> Attend:
    """Sparse attention as a routed layer calls it in prefill."""

    def attend(q: mx.array, kv: KVCache) -> mx.array:
        return sparse_attention(q, kv.keys, kv.values, pattern, prompt_tokens=prompt_tokens, kv_tokens=kv.offset)

    return attend


def sparse_decode(pattern: PatternConfig) -> Attend:
    """Sparse attention as a routed layer calls it for a new token."""
    short_calls = ShortCalls()
    return lambda q, kv: short_calls(q, kv, pattern, q.shape[-1] ** -0.5).reshape(q.shape)


def seconds_a_call(call: Callable[[mx.array, int], mx.array], q: mx.array) -> float:
    """Median time of one more call (query, index of the call) in a row of them, after two that are not counted.

    It is the time of 2n calls less that of n, over n. The device begins only when the host has prepared its first
    piece of work; that start, and the wait at the end, are in both times and do not count. So that the host is ahead
    from then on, n short calls are a piece of work or more, and of longer ones the first are handed over early. A call
    that takes long by itself is timed by itself: there the start is next to nothing.

    Args:
        call: From a query (or the last call's output, of the same shape) and an index from 0 on to an output.
        q: The first query.

    Returns:
        Seconds, above 0: where noise leaves nothing of the difference, the mean over 2n calls.
    """
    _seconds(call, q, 1)
    once = _seconds(call, q, 1)
    if once >= 20 * _SAMPLE_S:
        return once
    calls = _GRAPH_NODES if once < _SHORT_CALL_S else round(_SAMPLE_S / 2 / once)
    if calls == 0:
        return statistics.median(_seconds(call, q, 1) for _ in range(_SAMPLES))
    pairs = [(_seconds(call, q, calls), _seconds(call, q, 2 * calls)) for _ in range(_SAMPLES)]
    marginal = statistics.median(longer - shorter for shorter, longer in pairs) / calls
    return marginal if marginal > 0 else statistics.median(longer for _, longer in pairs) / (2 * calls)


def _seconds(call: Callable[[mx.array, int], mx.array], q: mx.array, calls: int) -> float:
    """Time of some calls, each on the last one's output, of which nothing but the newest is held."""
    is_early = calls < _GRAPH_NODES
    start = time.perf_counter()
    x = q
    for index in range(calls):
        x = call(x, index)
        if is_early and index & (index + 1) == 0:  # behind 1, 2, 4, ... calls: the device has half as many to do
            mx.async_eval(x)
    mx.eval(x)
    return time.perf_counter() - start


def prefill_seconds(shape: AttentionShape, tokens: int, step: int, attends: dict[str, Attend]) -> dict[str, float]:
    """Time of each kind of attention in one layer over a prompt of `tokens`, whose last one is fed later.

    Args:
        shape: Sizes.
        tokens: Of the prompt, 2 or more.
        step: Tokens of a chunk.
        attends: The kinds, by name; they are timed in turn on every chunk. "dense" reads stock's growing cache, others
            one that has room for the prompt, as exact prefill makes it.
    """
    cuts = [*range(0, tokens - 1, step), tokens - 1]
    reserved, grown = KVCache(), KVCache()
    reserved.update_and_fetch(shape.keys(tokens - 1), shape.keys(tokens - 1))
    total = dict.fromkeys(attends, 0.0)
    for start, stop in itertools.pairwise(cuts):
        q = shape.queries(stop - start)
        reserved.offset = stop
        new = (x[:, :, start:stop] for x in (reserved.keys, reserved.values))
        grown.update_and_fetch(*new)
        mx.eval(grown.state)
        for name, attend in attends.items():
            kv = grown if name == "dense" else reserved
            total[name] += seconds_a_call(lambda x, _, a=attend, kv=kv: a(x, kv), q)
        mx.clear_cache()  # buffers of every chunk's length would be kept
    return total


def grow(kv: Any, shape: AttentionShape, tokens: int) -> None:
    """Fill an empty KV cache with random keys and values, in two steps as a model does.

    MLX's choice of kernel for one query depends on how the buffers came to be.
    """
    for n in (tokens - 1, 1):
        if n:
            kv.update_and_fetch(*(shape.keys(n) for _ in range(2)))
            mx.eval(kv.state)


def decode_seconds(
    shape: AttentionShape, tokens: int, attends: dict[str, Attend], key_bytes: int = _KEY_BYTES
) -> dict[str, float]:
    """Time of each kind of attention in one layer for one query over `tokens` keys, in a row of calls.

    Args:
        shape: Sizes.
        tokens: Keys.
        attends: The kinds, by name.
        key_bytes: The calls go round among as many caches as fit into this, 16 at most, 1 at least. Sparse attention
            reads little of each: with few of them it reads from the chip's own caches, which a model does not.
    """
    sets = max(1, min(_MAX_KEY_SETS, key_bytes // shape.kv_bytes(tokens)))
    caches = []
    for _ in range(sets):
        caches.append(KVCache())
        grow(caches[-1], shape, tokens)
    q = shape.queries(1)
    return {
        name: seconds_a_call(lambda x, index, a=attend: a(x, caches[index % sets]), q)
        for name, attend in attends.items()
    }


@dataclass(frozen=True)
class Ceiling:
    """Amdahl's ceiling of one phase: stock's time in which only the sparse layers' attention shrinks, ideally.

    Args:
        stock_s: Stock's time.
        dense_layer_s: Dense attention of one layer, in the same run.
        visible_share: Visible over all causal pairs of a sparse layer.
        layers: Layers that attend.
        sparse_layers: Of them, sparse; the mean over the rows of a batch.
    """

    stock_s: float
    dense_layer_s: float
    visible_share: float
    layers: int
    sparse_layers: float

    @property
    def ideal_sparse_layer_s(self) -> float:
        """A sparse layer's attention at the efficiency of the dense one."""
        return self.dense_layer_s * self.visible_share

    @property
    def everything_else_s(self) -> float:
        """Stock's time without attention."""
        return self.stock_s - self.layers * self.dense_layer_s

    @property
    def ideal_s(self) -> float | None:
        """The time to aim at. None if attention by itself took longer than stock's whole run: too noisy to say."""
        if self.everything_else_s < 0:
            return None
        return self.stock_s - self.sparse_layers * (self.dense_layer_s - self.ideal_sparse_layer_s)

    def columns(self, flux_s: float, sparse_layer_s: float, speedup: float | None = None) -> dict[str, Any]:
        """The ceiling beside what was reached.

        Args:
            flux_s: Flux's time.
            sparse_layer_s: Measured attention of one sparse layer.
            speedup: Stock's time over Flux's, if better known than by the two times: from runs side by side.
        """
        speedup = self.stock_s / flux_s if speedup is None else speedup
        ideal_s = self.ideal_s
        lost_s = self.sparse_layers * (sparse_layer_s - self.ideal_sparse_layer_s)
        return {
            "speedup": speedup,
            "ceiling": None if ideal_s is None else self.stock_s / ideal_s,
            "fraction_of_ceiling": None if ideal_s is None else speedup * ideal_s / self.stock_s,
            "everything_else_s": self.everything_else_s,
            "dense_layer_s": self.dense_layer_s,
            "sparse_layer_s": sparse_layer_s,
            "ideal_sparse_layer_s": self.ideal_sparse_layer_s,
            "sparse_fraction_of_ideal": self.ideal_sparse_layer_s / sparse_layer_s,
            "lost_in_sparse_attention_s": lost_s,
            "lost_elsewhere_s": None if ideal_s is None else flux_s - ideal_s - lost_s,
            "visible_share": self.visible_share,
        }


def visible_share(pattern: PatternConfig, q_tokens: int, kv_tokens: int) -> float:
    """Pairs that streaming sees over those that causal attention sees, the queries being the last."""
    return visible_pairs(pattern, q_tokens, kv_tokens) / visible_pairs(None, q_tokens, kv_tokens)
