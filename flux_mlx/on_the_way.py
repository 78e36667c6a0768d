"""A prompt's call of a stock model, handed to the device while Python builds it.

mlx-lm hands over a whole call: the device is idle until Python has built the last layer, for every chunk of a prompt
anew. Stock's loop asks the cache for one layer's entry after the other, so the cache knows which layers are built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from flux_mlx.cache import CacheList

EARLY_TOKENS = 768  # of a call that is worth it; a shorter one's work is done sooner than Python's
FIRST_LAYERS = 1  # handed over as soon as they are built: the device waits for nothing else
LAYERS_AT_ONCE = 4  # from then on: about a graph of MLX's CUDA backend


class OnTheWay(list):
    """A cache for one call of a model, which hands the device every few layers as soon as they are built.

    The operations and their order are the same. A call of fewer than `EARLY_TOKENS` is left to be handed over whole.

    Args:
        cache: One entry a layer.
        tokens: Of the call.
    """

    def __init__(self, cache: list[Any], tokens: int):
        super().__init__(cache)
        self._is_long = tokens >= EARLY_TOKENS
        counting = next((entry for entry in cache if isinstance(entry, CacheList)), cache[0])
        self._held, self._handed_over = _held(counting), 0

    def __iter__(self) -> Iterator[Any]:
        entries = super().__iter__()
        if not self._is_long:
            yield from entries
            return
        for index, entry in enumerate(entries):
            few = LAYERS_AT_ONCE if self._handed_over else FIRST_LAYERS
            if index - self._handed_over >= few and _held(self[index - 1]) > self._held:
                self.hand_over(index)
            yield entry

    def hand_over(self, stop: int) -> None:
        """Start the work of the layers before `stop`: all of it ends in what their cache entries then hold."""
        mx.async_eval([new_state(entry) for entry in self[self._handed_over : stop]])
        self._handed_over = stop


def new_state(entry: Any) -> Any:
    """What a call adds to a cache entry, but for what can wait: the pools, of which only the inputs are kept."""
    return [entry.kv.state, entry.inputs] if isinstance(entry, CacheList) else entry.state


def _held(entry: Any) -> int:
    """Tokens of a cache entry, of a batch those of its longest row; 0 of a layer's that does not count them."""
    if isinstance(entry, CacheList):
        return entry.size()
    offset = getattr(entry, "offset", 0)
    return offset if isinstance(offset, int) else 0
