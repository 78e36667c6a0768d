"""One layer of a stock model within the stock forward pass, all others skipped: the family makes masks and scalings."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn


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

    hidden: mx.array

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.out = self._layer(self.hidden, *args, **kwargs)
        return h


class _AttentionReached(Exception):  # noqa: N818 (no error: it ends the pass)
    """Ends a block's forward pass at its attention module, whose input it carries."""

    def __init__(self, x: mx.array):
        self.x = x


def _stop(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    raise _AttentionReached(x)


def attention_input(layer: nn.Module, hidden: mx.array) -> mx.array:
    """What the layer's attention module would get: `[1, L, hidden]`, norms of the family included."""
    view = copy.copy(layer)
    view.self_attn = _stop
    try:
        view(hidden, None, None)
    except _AttentionReached as reached:
        return reached.x
    raise ValueError(f"[attention_input] {type(layer).__name__} does not call its self_attn.")


def _entries(cache: list[Any], index: int) -> list[Any]:
    """`cache` with layer `index`'s entry in every place of its kind.

    A family makes one mask for all layers of a kind, from the first one's entry: it must be made for this offset.
    """
    return [cache[index] if type(entry) is type(cache[index]) else entry for entry in cache]


class OneLayer:
    """One layer within the stock forward pass, which makes the masks."""

    def __init__(self, inner: nn.Module, index: int, cache: list[Any]):
        self._view = copy.copy(inner)
        self._layer = _Active(inner.layers[index])
        self._view.layers = [self._layer if i == index else _Skipped(other) for i, other in enumerate(inner.layers)]
        self._cache = cache
        self._index = index

    def __call__(self, tokens: mx.array, hidden: mx.array) -> mx.array:
        """The layer over one chunk: `[1, L, hidden]` to the same."""
        self._layer.hidden = hidden
        self._view(tokens, _entries(self._cache, self._index))
        return self._layer.out


def embed(inner: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
    """Hidden states that the first layer gets: `[1, L, hidden]`, the family's scaling included."""
    view = copy.copy(inner)
    probe = _Receiver(inner.layers[0])
    view.layers = [probe] + [_Skipped(layer) for layer in inner.layers[1:]]
    view(tokens, _entries(cache, 0))
    return probe.hidden
