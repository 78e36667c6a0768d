"""Keys and values of one row, sink and window only: what a sparse layer holds under the KV policy `evict`.

Sink and window lie side by side in one buffer, so that decode attends to a view of it and copies nothing:

    [ dropped | sink | positions first..offset-1 | room ]

The window begins at block boundaries. When it moves on by a block, the sink is written again in front of it, over what
was dropped; when the room is used up, everything moves to a fresh buffer. Streaming attention over the view is the same
function as over all keys: behind the sink, block indices all shift by the same number (`streaming.compact`).
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import KVCache, create_attention_mask

from flux_mlx.spec import PatternConfig
from flux_mlx.token_buffers import span

ROOM_TOKENS = 256  # as many as stock's KVCache grows by; moving 2,176 keys every 256 tokens is 8.5 a token

WHY_NOT_SAVED = "expected all keys, but the KV policy evict has dropped some: use keep."

Pair = tuple[mx.array, mx.array]


class DroppedKeysError(ValueError):
    """A cut would need keys that are gone."""


class _NotSaved:
    """A leaf of a cache's state that evaluation passes by and mlx-lm's `save_prompt_cache` refuses, by its words.

    It would write the class's name, by which `load_prompt_cache` knows its own classes only: a file for nobody.
    """

    def __str__(self) -> str:
        return WHY_NOT_SAVED


class WindowKVCache:
    """KV cache of one row with the sink and the window of `pattern`; `offset` counts all tokens.

    Args:
        keys, values: `[1, HKV, S, D]`, all of the first `offset` <= S tokens.
        offset: Tokens held; more than sink and window.
        pattern: Their sizes.
    """

    def __init__(self, keys: mx.array, values: mx.array, offset: int, pattern: PatternConfig):
        sink = pattern.sink_span
        self.pattern = pattern
        self.offset = offset
        self.first = max(sink, pattern.window_start(offset - 1))
        self._sink: Pair = tuple(mx.contiguous(x[..., :sink, :]) for x in (keys, values))
        self._spare: Pair | None = None  # the block that was dropped last, should a cut need it
        self._move(*(x[..., self.first : offset, :] for x in (keys, values)))
        mx.async_eval(self._arrays())  # else the graph would hold on to all keys

    @classmethod
    def of(cls, kv: KVCache, pattern: PatternConfig) -> WindowKVCache:
        """What a KV cache of one row holds of sink and window."""
        return cls(kv.keys, kv.values, kv.offset, pattern)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        """Append `[1, HKV, L, D]`; returns the keys and values that the L queries can see, `[1, HKV, S', D]`."""
        self._drop(self.pattern.window_start(self.offset))
        tokens = keys.shape[2]
        if tokens > ROOM_TOKENS:
            return self._append_many(keys, values)
        if self._stop + tokens > self.keys.shape[2]:
            self._move(*self._local())
        newest = span(self._stop, self._stop + tokens)
        self.keys[newest] = keys
        self.values[newest] = values
        self._stop += tokens
        self.offset += tokens
        return self.keys_and_values()

    def keys_and_values(self) -> Pair:
        """[sink | positions first..offset-1] of both, views of the buffers."""
        used = span(self._start, self._stop)
        return self.keys[used], self.values[used]

    def _local(self) -> Pair:
        """Positions first..offset-1 of both."""
        low = self._start + self.pattern.sink_span
        return self.keys[..., low : self._stop, :], self.values[..., low : self._stop, :]

    def _move(self, keys: mx.array, values: mx.array) -> None:
        """Fresh buffers with the sink, these local keys and values, and room."""
        self._start, self._stop = 0, self.pattern.sink_span + keys.shape[2]
        room = (*keys.shape[:2], ROOM_TOKENS)
        self.keys, self.values = (
            mx.concatenate([sink, local, mx.zeros((*room, local.shape[-1]), local.dtype)], axis=2)
            for sink, local in zip(self._sink, (keys, values), strict=True)
        )

    def _append_many(self, keys: mx.array, values: mx.array) -> Pair:
        """`update_and_fetch` of a chunk of a prompt: its queries get buffers of their own."""
        whole = [mx.concatenate(parts, axis=2) for parts in zip(self.keys_and_values(), (keys, values), strict=True)]
        self.offset += keys.shape[2]
        first = max(self.first, self.pattern.window_start(self.offset - 1))
        low = self.pattern.sink_span + first - self.first
        self.first, self._spare = first, None
        self._move(*(x[..., low:, :] for x in whole))
        return tuple(whole)

    def _drop(self, low: int) -> None:
        """Drop the positions from `first` to `low`, the first that the window holds."""
        if low <= self.first:
            return
        sink, dropped = self.pattern.sink_span, low - self.first
        spare = slice(max(0, dropped - self.pattern.block_size), dropped)
        self._spare = tuple(mx.contiguous(x[..., spare, :]) for x in self._local())
        mx.async_eval(self._spare)  # before the sink is written over it
        self._start += dropped
        self.first = low
        for buffer, rows in zip((self.keys, self.values), self._sink, strict=True):
            if sink:
                buffer[..., self._start : self._start + sink, :] = rows

    def can_trim(self, tokens: int) -> bool:
        """Whether what the window then needs is still there."""
        spare = self._spare[0].shape[2] if self._spare is not None else 0
        low = max(self.pattern.sink_span, self.pattern.window_start(max(0, self.offset - tokens)))
        return low >= self.first - spare

    def trim(self, tokens: int) -> int:
        """Drop the newest tokens.

        Raises:
            DroppedKeysError: The window would need keys that are gone; nothing has changed then.
        """
        tokens = min(self.offset, tokens)
        if not self.can_trim(tokens):
            raise DroppedKeysError(
                "[trim] under the KV policy evict a sparse layer keeps its sink and window only: expected a cut of the "
                f"last block's tokens, got {tokens} of {self.offset}."
            )
        if self.pattern.window_start(self.offset - tokens) < self.first and self._spare is not None:
            pairs = zip(self._spare, self._local(), strict=True)
            self.first -= self._spare[0].shape[2]
            self._spare = None
            self._move(*(mx.concatenate(pair, axis=2) for pair in pairs))
        self.offset -= tokens
        self._stop -= tokens
        return tokens

    # What stock code asks of a KV cache

    def is_trimmable(self) -> bool:
        """Within limits: see `can_trim`."""
        return True

    def make_mask(self, *args, **kwargs):
        """As stock's KVCache: for layers that keep all keys."""
        return create_attention_mask(*args, offset=self.offset, **kwargs)

    def size(self) -> int:
        """Tokens so far."""
        return self.offset

    def empty(self) -> bool:
        """Never."""
        return False

    @property
    def state(self) -> list[mx.array | _NotSaved]:
        """What stock code evaluates. What would save it gets a ValueError, before anything is written."""
        return [*self._arrays(), _NotSaved()]

    def _arrays(self) -> list[mx.array]:
        return [self.keys, self.values, *self._sink, *(self._spare or ())]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(x.nbytes for x in self._arrays())
