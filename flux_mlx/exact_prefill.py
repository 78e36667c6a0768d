"""Exact prefill, layer by layer: every layer sees the whole prompt's ends before it is routed.

Stock mlx-lm runs all layers over one chunk of the prompt, then the next chunk; a router would have to decide before
the prompt's end has reached its layer. Here each layer in turn is decided from the pooled queries of the whole
prompt, then runs over all chunks. That costs one buffer of hidden states `[L, hidden]`, and nothing else changes: the
chunks are stock's, and each is computed by the stock model's own forward pass in which all other layers are skipped.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache

from flux_mlx.cache import CacheList, tokens_held
from flux_mlx.families import inner_model
from flux_mlx.models import RoutedAttention, routed_layers

DEFAULT_STEP_TOKENS = 2048


class _Skipped:
    """A layer that hands the hidden states through. Other attributes are the real layer's."""

    def __init__(self, layer: nn.Module):
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return h


class _Receiver(_Skipped):
    """The first layer's place: keeps the hidden states that it is handed."""

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.hidden = h
        return h


class _Active(_Skipped):
    """The one layer that runs: on `hidden`, whatever the stock loop hands it."""

    def __init__(self, layer: nn.Module, hidden: mx.array):
        super().__init__(layer)
        self._hidden = hidden

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.out = self._layer(self._hidden, *args, **kwargs)
        return h


class _Probe:
    """Stands in for an attention module and keeps its input."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.x = x
        return mx.zeros_like(x)


def _attention_input(layer: nn.Module, hidden: mx.array) -> mx.array:
    """What the layer's attention module would get: `[1, L, hidden]`, norms of the family included."""
    view = copy.copy(layer)
    view.self_attn = probe = _Probe()
    view(hidden, None, None)
    return probe.x


def _entries(cache: list[Any], index: int) -> list[Any]:
    """`cache` with layer `index`'s entry in every place of its kind.

    A family makes one mask for all layers of a kind, from the first one's entry: it must be made for this offset.
    """
    return [cache[index] if type(entry) is type(cache[index]) else entry for entry in cache]


def _run_layer(inner: nn.Module, index: int, tokens: mx.array, hidden: mx.array, cache: list[Any]) -> mx.array:
    """One layer over one chunk, within the stock forward pass, which makes the masks: `[1, L, hidden]`."""
    view = copy.copy(inner)
    active = _Active(inner.layers[index], hidden)
    view.layers = [active if i == index else _Skipped(layer) for i, layer in enumerate(inner.layers)]
    view(tokens, _entries(cache, index))
    return active.out


def _embed(inner: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
    """Hidden states that the first layer gets: `[1, L, hidden]`, the family's scaling included."""
    view = copy.copy(inner)
    probe = _Receiver(inner.layers[0])
    view.layers = [probe] + [_Skipped(layer) for layer in inner.layers[1:]]
    view(tokens, _entries(cache, 0))
    return probe.hidden


def _ends(chunks: list[mx.array], pool_tokens: int) -> tuple[mx.array, mx.array]:
    """First and last `pool_tokens` rows (or all) of the hidden states held in chunks `[1, ., hidden]`."""
    head, tail = [], []
    for rows, ordered in ((head, chunks), (tail, chunks[::-1])):
        for chunk in ordered:
            if sum(part.shape[1] for part in rows) < pool_tokens:
                rows.append(chunk)
    head, tail = mx.concatenate(head, axis=1), mx.concatenate(tail[::-1], axis=1)
    return head[:, :pool_tokens], tail[:, -pool_tokens:]


def _route_layer(layer: nn.Module, entry: CacheList, chunks: list[mx.array]) -> None:
    """Decide the layer's route from both ends of the prompt, unless it is forced."""
    attn: Any = layer.self_attn
    if attn.forced is None:
        head, tail = (_attention_input(layer, end) for end in _ends(chunks, attn.flux.router.pool_tokens))
        entry.feed(0, attn.query_rows(head), attn.query_rows(tail), sum(chunk.shape[1] for chunk in chunks))
        entry.decide(attn.decide(entry.pooled()), [True])


def _chunks(model: nn.Module, tokens: mx.array, offset: int, step: int) -> list[mx.array]:
    """The tokens in chunks `[1, .]` of `step`, as stock cuts them.

    xattention chooses blocks for whole query blocks: its chunks end at block boundaries, so that the choice does not
    depend on the step.
    """
    patterns = [attn.flux.pattern for attn in routed_layers(model).values()]
    block = max((pattern.block_size for pattern in patterns if pattern.name == "xattention"), default=1)
    step = -(-step // block) * block
    cuts = [0, *range(step - offset % block, tokens.size, step), tokens.size]
    return [tokens[None, start:stop] for start, stop in itertools.pairwise(cuts) if start < stop]


def _restorer(entry: Any) -> Callable[[], None]:
    """A function that brings a cache entry back to what it is now."""
    if isinstance(entry, CacheList):
        return partial(entry.restore, entry.snapshot())
    if type(entry) is KVCache:
        return lambda offset=entry.offset: entry.trim(entry.offset - offset)
    saved = copy.deepcopy(entry.__dict__)  # windows and states of other layers, which do not grow with the prompt
    return lambda: entry.__dict__.update(saved)


def prefill(
    model: nn.Module,
    prompt: mx.array,
    cache: list[Any],
    *,
    prefill_step_size: int = DEFAULT_STEP_TOKENS,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
) -> mx.array:
    """Run all of the prompt but its last token through the model, each layer routed on the whole prompt.

    Args:
        model: A Flux model (or a stock one, which is then prefilled layer by layer without routing).
        prompt: int `[L]` or a list, L >= 1: the new tokens, which follow those that `cache` holds.
        cache: From `model.make_cache()`, for one row. Updated in place; its routes are set.
        prefill_step_size: Tokens of a chunk. The routes do not depend on it.
        prompt_progress_callback: Called with (layers done, layers) before the first layer and after each.
        kv_bits: Quantise each layer's keys and values, as soon as the layer is done, to this many bits. Stock does it
            after each chunk, so that its later chunks read quantised keys.
        kv_group_size: Group size of that quantisation.
        quantized_kv_start: Do it only if the cache then holds this many tokens.

    Returns:
        int `[1]`: the last token, to be fed to `mlx_lm.generate_step` with the same cache.

    Raises:
        ValueError: Empty prompt, a batch cache, a step below 1, or a cache of another length than the model.

    An interrupted prefill (an exception in the callback, Ctrl-C) leaves the cache as it was. With several ranks, call
    it within `mx.stream(mlx_lm.generate.generation_stream)`: on one stream ranks exchange their sums in one order.
    """
    prompt = mx.array(prompt)
    if prompt.ndim != 1 or prompt.size < 1:
        raise ValueError(f"[prefill] prompt must be int [L] with L >= 1, got shape {tuple(prompt.shape)}.")
    if prefill_step_size < 1:
        raise ValueError(f"[prefill] prefill_step_size must be 1 or more, got {prefill_step_size}.")
    if len(cache) != len(model.layers):
        raise ValueError(f"[prefill] the cache has {len(cache)} entries, the model {len(model.layers)} layers.")
    for entry in cache:
        CacheList.adopt(entry)
        if not isinstance(getattr(entry, "offset", 0), int):
            raise ValueError("[prefill] the cache must be of one row, got one of a batch.")
    report = prompt_progress_callback or (lambda done, total: None)
    report(0, len(cache))
    chunks = _chunks(model, prompt[:-1], tokens_held(cache), prefill_step_size)
    hidden: list[mx.array | None] = [None] * len(chunks)
    entries, restorers = list(cache), [_restorer(entry) for entry in cache]
    try:
        for index in range(len(cache) if chunks else 0):
            hidden = _prefill_layer(model, index, cache, chunks, hidden)
            layer_cache = cache[index : index + 1]
            maybe_quantize_kv_cache(layer_cache, quantized_kv_start, kv_group_size, kv_bits)
            cache[index] = layer_cache[0]
            report(index + 1, len(cache))
    except BaseException:
        cache[:] = entries
        for restore in restorers:
            restore()
        raise
    return prompt[-1:]


def _prefill_layer(
    model: nn.Module, index: int, cache: list[Any], chunks: list[mx.array], hidden: list[mx.array | None]
) -> list[mx.array | None]:
    """One layer over all chunks: hidden states in (None: the embedding of the tokens), hidden states out."""
    layer, entry, is_last = model.layers[index], cache[index], index == len(model.layers) - 1
    routed = isinstance(entry, CacheList) and isinstance(getattr(layer, "self_attn", None), RoutedAttention)
    if hidden[0] is None:
        hidden = [_embed(inner_model(model), chunk, cache) for chunk in chunks]
    if routed:
        _route_layer(layer, entry, hidden)
        entry.pinned = entry.offset + sum(chunk.shape[1] for chunk in chunks) + 1
    try:
        for i, chunk in enumerate(chunks):
            out = _run_layer(inner_model(model), index, chunk, hidden[i], cache)
            if is_last:  # only keys and values are needed; an output kept unevaluated would keep old ones alive
                out = None
            mx.eval(entry.state, out)
            hidden[i] = out
        mx.clear_cache()
    finally:
        if routed:
            entry.pinned = None
    return hidden
