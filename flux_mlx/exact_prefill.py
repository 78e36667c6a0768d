"""Exact prefill, layer by layer: every layer sees the whole prompt's ends before it is routed.

Stock mlx-lm runs all layers over one chunk of the prompt, then the next chunk; a router would have to decide before
the prompt's end has reached its layer. Here each layer in turn is decided from the pooled queries of the whole
prompt, then runs over all chunks. That costs one buffer of hidden states `[L, hidden]`. The chunks are stock's, and
each is computed by the stock model's own forward pass in which all other layers are skipped; but where they may (see
`flux_mlx.keys_first`) the keys of all chunks are written first, and the router reads the queries that attention
projects anyway.

The device is kept busy: chunks are handed to it ahead of time, a few at once, and a layer's route is first waited for
where it matters, behind the chunks that sink and window hold as a whole. The router's small kernels run behind the
keys, beside the first chunk's work. Where kernels take the route from the device nobody waits for it: all routes are
read at once, behind the last chunk of the last layer. A prompt of one chunk is stock's own call.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache

from flux_mlx.cache import CacheList, tokens_held
from flux_mlx.families import inner_model
from flux_mlx.keys_first import keys_in_place, keys_may_come_first, project_kept, write_keys
from flux_mlx.late_decisions import LateDecisions
from flux_mlx.models import routed_layers
from flux_mlx.one_layer import OneLayer, attention_input, embed
from flux_mlx.prompt_ends import prompt_ends
from flux_mlx.routed_attention import RoutedAttention
from flux_mlx.routed_block import RoutedBlock
from flux_mlx.spec import FluxConfig, Route

DEFAULT_STEP_TOKENS = 2048
CHUNKS_AHEAD = (
    2  # chunks of a layer that wait for the device while it computes: one would do, if none took long to build
)


def _route_layer(layer: nn.Module, entry: CacheList, chunks: list[mx.array]) -> None:
    """Have the layer's route decided, unless it is forced."""
    if layer.self_attn.forced is None:
        decide_layer(layer, entry, chunks)


def decide_layer(layer: nn.Module, entry: CacheList, chunks: list[mx.array]) -> None:
    """Have the layer's router decide for `entry` from both ends of the prompt, hidden states `[1, ., hidden]`.

    Where `entry` knows the projections of the chunks that hold the ends, their queries serve; else the router makes its
    own, of few tokens.
    """
    attn: Any = layer.self_attn
    tokens, P = sum(chunk.shape[1] for chunk in chunks), attn.flux.router.pool_tokens
    if entry.projected:
        attn.feed_queries([q for q, _, _ in entry.projected.values()], tokens, entry)
    else:
        attn.feed(attention_input(layer, prompt_ends(chunks, P)), tokens, entry)
    attn.decide(entry, [True])


def _settings(attns: Iterable[RoutedAttention]) -> list[FluxConfig]:
    """The settings of routed layers, alike ones once: mostly all layers share them."""
    return list({id(attn.flux): attn.flux for attn in attns}.values())


def _chunks(settings: list[FluxConfig], tokens: mx.array, offset: int, step: int) -> list[mx.array]:
    """The tokens in chunks `[1, .]` of `step`, as stock cuts them.

    xattention chooses blocks for whole query blocks: its chunks end at block boundaries, so that the choice does not
    depend on the step.
    """
    block = max((flux.pattern.block_size for flux in settings if flux.pattern.name == "xattention"), default=1)
    step = -(-step // block) * block
    cuts = [0, *range(step - offset % block, tokens.size, step), tokens.size]
    return [tokens[None, start:stop] for start, stop in itertools.pairwise(cuts) if start < stop]


def _is_one_stock_call(settings: list[FluxConfig], chunks: list[mx.array]) -> bool:
    """Whether stock's call of the whole prompt routes and computes as exact prefill does."""
    shortest = max((flux.router.min_prefill_tokens for flux in settings), default=1)
    is_streaming = all(flux.pattern.name == "streaming" for flux in settings)
    return len(chunks) == 1 and is_streaming and chunks[0].shape[1] >= shortest


def _reserve(entry: Any, tokens: int) -> None:
    """Let a stock cache grow by `tokens` at once when it grows next, instead of being copied for every chunk."""
    kv = entry.kv if isinstance(entry, CacheList) else entry
    if type(kv) is KVCache:
        kv.step = -(-tokens // KVCache.step) * KVCache.step


def _unreserve(entry: Any) -> None:
    """Stock's steps from now on."""
    kv = entry.kv if isinstance(entry, CacheList) else entry
    vars(kv).pop("step", None)


def _restore_routed(entry: CacheList, kv: Any, snapshot: Any) -> None:
    """Bring a routed layer's entry back, also if its prefill was interrupted where nothing could clean up."""
    vars(kv).pop("update_and_fetch", None)
    _unreserve(entry)
    entry.restore(snapshot)


def _restorer(entry: Any) -> Callable[[], None]:
    """A function that brings a cache entry back to what it is now."""
    if isinstance(entry, CacheList):
        return partial(_restore_routed, entry, entry.caches[0], entry.snapshot())
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
        prefill_step_size: Tokens of a chunk. But for rounding, the routes do not depend on it.
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
    prompt = prompt if isinstance(prompt, mx.array) else mx.array(prompt)
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
    attns = routed_layers(model)  # once: Python walks the model as long as it builds a layer
    if kv_bits is not None and any(attn.evicts for attn in attns.values()):
        raise ValueError("[prefill] the KV policy evict does not go with kv_bits: keep all keys, or do not quantise.")
    report = prompt_progress_callback or (lambda done, total: None)
    report(0, len(cache))
    settings = _settings(attns.values())
    chunks = _chunks(settings, prompt[:-1], tokens_held(cache), prefill_step_size)
    entries, restorers = list(cache), [_restorer(entry) for entry in cache]
    try:
        if not chunks:
            layers: Iterable[int] = range(len(cache))
        elif _is_one_stock_call(settings, chunks):
            layers = _one_call(model, attns, cache, chunks[0])
        else:
            layers = _layer_by_layer(model, cache, chunks, LateDecisions(may_wait=kv_bits is None))
        for index in layers:
            layer_cache = cache[index : index + 1]
            maybe_quantize_kv_cache(layer_cache, quantized_kv_start, kv_group_size, kv_bits)
            if layer_cache[0] is not cache[index]:
                cache[index] = layer_cache[0]
                mx.async_eval(cache[index].state)
            report(index + 1, len(cache))
    except BaseException:
        cache[:] = entries
        for restore in restorers:
            restore()
        raise
    return prompt[-1:]


def _one_call(model: nn.Module, attns: dict[int, RoutedAttention], cache: list[Any], tokens: mx.array) -> Iterator[int]:
    """Run a prompt of one chunk `[1, L]`; yields the layers that are done.

    A prompt that sink and window hold needs no route: what the routers will want is kept while the device computes.
    """
    offset = tokens_held(cache)
    hearing = [(cache[i], attn) for i, attn in attns.items() if isinstance(cache[i], CacheList)]
    if not _is_dense_and_plain(hearing, tokens.shape[1]):
        hearing = []
    for entry, _ in hearing:
        entry.is_listening = True
    inner_model(model)(tokens, cache)
    mx.async_eval([_new_state(entry) for entry in cache])
    if not hearing:  # the last layer's decision, which no keys depend on: another thread could not compute it
        mx.async_eval([entry.undecided() for entry in cache if isinstance(entry, CacheList)])
    for entry, attn in hearing:
        x, entry.is_listening, entry.heard = entry.heard, False, None
        attn.settle(x, entry, offset)
    for layer in model.layers if hearing else ():
        if isinstance(layer, RoutedBlock):
            layer.token_steps.drop_old()
    yield from range(len(cache))


def _is_dense_and_plain(layers: list[tuple[CacheList, RoutedAttention]], tokens: int) -> bool:
    """Whether a call is full attention in all layers, of one row without padding; of alike layers one is asked."""
    asked = None
    for entry, attn in layers:
        if attn.group is not None or not entry.is_alone():
            return False
        alike = (attn.flux, entry.caches[0].offset)
        if alike != asked and not attn.is_dense(entry, tokens):
            return False
        asked = alike
    return True


def _new_state(entry: Any) -> Any:
    """What a chunk adds to a cache entry, but for what can wait: the pools, of which only the inputs are kept."""
    return [entry.kv.state, entry.inputs] if isinstance(entry, CacheList) else entry.state


def _layer_by_layer(model: nn.Module, cache: list[Any], chunks: list[mx.array], late: LateDecisions) -> Iterator[int]:
    """Run each layer over all chunks; yields the layers that are done. `late` holds those not decided until then."""
    hidden: list[mx.array | None] = [embed(inner_model(model), chunk, cache) for chunk in chunks]
    device = _Ahead(len(cache))
    for index in range(len(cache)):
        _prefill_layer(model, index, cache, chunks, hidden, device, late)
        if index == len(cache) - 1:
            late.read()
        yield index


class _Ahead:
    """Hands work to the device, and waits only when it is `CHUNKS_AHEAD` chunks behind: that bounds memory."""

    def __init__(self, n_layers: int):
        self._n_layers = n_layers
        self._handed_over = 0
        self._under_way: deque[mx.array] = deque()
        self._keys_under_way: deque[mx.array] = deque()

    def start_keys(self, entry: CacheList, beside: list[mx.array]) -> None:
        """Start writing keys into a cache entry; `beside` is computed with them, and holds no reference to them."""
        mx.async_eval(entry.kv.state, beside)
        self._keys_under_way.append(beside[-1])
        if len(self._keys_under_way) > CHUNKS_AHEAD:
            mx.eval(self._keys_under_way.popleft())

    def hand_over(self, entry: Any, out: mx.array | None, beside: mx.array | None = None) -> None:
        """Start the work of one layer on one chunk: what its cache entry then holds, and what it puts out.

        Only `out` is waited for: a reference to keys would have the next chunk copy them.
        """
        mx.async_eval(beside, _new_state(entry), out)
        if out is not None:
            self._under_way.append(out)
        if len(self._under_way) > CHUNKS_AHEAD:
            mx.eval(self._under_way.popleft())
        self._handed_over += 1
        if self._handed_over % self._n_layers == 0:  # as often as stock does: after one chunk's work in all layers
            mx.clear_cache()


@contextmanager
def _keys_first(
    layer: nn.Module, entry: CacheList, hidden: list[mx.array], device: _Ahead, beside: list[mx.array]
) -> Iterator[None]:
    """Write the layer's keys of the whole prompt, and compute `beside`; within it calls find the keys there."""
    offset = entry.offset
    _reserve(entry, sum(chunk.shape[1] for chunk in hidden))
    write_keys(layer, entry, hidden, lambda parts: device.start_keys(entry, [*beside, *parts]))
    with keys_in_place(entry.kv, offset):
        yield


def _prefill_layer(
    model: nn.Module,
    index: int,
    cache: list[Any],
    chunks: list[mx.array],
    hidden: list[mx.array | None],
    device: _Ahead,
    late: LateDecisions,
) -> None:
    """One layer over all chunks; `hidden`, the hidden states that it gets, become those that it puts out."""
    layer, entry, is_last = model.layers[index], cache[index], index == len(model.layers) - 1
    attn, run = getattr(layer, "self_attn", None), OneLayer(inner_model(model), index, cache)
    routed = isinstance(entry, CacheList) and isinstance(attn, RoutedAttention)
    evicts = routed and attn.evicts and entry.offset == 0  # an interrupted prefill must find older keys again
    left = sum(chunk.shape[1] for chunk in chunks)
    if routed:
        entry.wake()
        entry.pinned, entry.drops_early = entry.offset + left + 1, evicts and attn.flux.pattern.name == "streaming"
        entry.stays_undecided = late.may_wait and not attn.evicts
    needs_route = routed and not attn.is_dense(entry, left)
    follows = needs_route and entry.stays_undecided and bool(late.entries)  # it will go as the layers before it went
    keys_first = routed and keys_may_come_first(attn, entry)
    if keys_first and not is_last:
        entry.projected = project_kept(layer, entry, hidden)
    if routed:
        _route_layer(layer, entry, hidden)
    if follows and is_last:
        late.add(entry)
    joined = late.join() if is_last else []
    try:
        with _keys_first(layer, entry, hidden, device, joined) if keys_first else nullcontext():
            for i, chunk in enumerate(chunks):
                if i == int(evicts) and not keys_first:  # evict: the first chunk does not know yet what will be kept
                    _reserve(entry, left)
                out = run(chunk, hidden[i])
                hidden[i] = None if is_last else out  # of the last layer only keys and values are needed
                if i == 0 and needs_route and not follows:  # keys: independent of the router's work
                    entry.start_decision(_new_state(entry))
                if i == 0 and is_last:
                    mx.async_eval(joined, _new_state(entry))
                device.hand_over(entry, hidden[i], entry.undecided() if i == 0 and follows else None)
                left -= chunk.shape[1]
        if needs_route and not is_last:
            late.add(entry)
        if routed and not needs_route:  # nothing waited for its decision: another thread could not compute it
            entry.compute()
        if evicts and not attn.is_dense(entry, 0) and Route.SPARSE in entry.routes:
            entry.evict(attn.flux.pattern)
    finally:
        _unreserve(entry)
        if routed:
            entry.pinned, entry.drops_early, entry.stays_undecided, entry.projected = None, False, False, None
