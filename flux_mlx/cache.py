"""The cache of a routed layer: all keys and values, the route, and the pool that the router reads.

Stock mlx-lm merges, splits, trims, copies, quantises and saves caches. What survives all of it is a `CacheList` of a
KV cache and an `ArraysCache`; so everything that the router remembers of a row are rows of arrays: see
`flux_mlx.router_state`.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.models.cache import CacheList as StockCacheList

from flux_mlx.callers import only_evaluates
from flux_mlx.families import Projected
from flux_mlx.noted_calls import NEVER
from flux_mlx.router_counters import Counter
from flux_mlx.router_state import RouterState
from flux_mlx.spec import PatternConfig, Route
from flux_mlx.window_cache import WindowKVCache


@lru_cache
def _blank(head_dim: int, pool_tokens: int) -> tuple[mx.array, ...]:
    """The arrays of a row of which nothing is known. Caches share them: arrays are replaced, not written."""
    pool = mx.zeros((1, pool_tokens, head_dim), mx.float32)
    arrays = (mx.zeros((1, len(Counter)), mx.int32), pool, pool)
    mx.eval(arrays)
    return arrays


class CacheList(RouterState, StockCacheList):
    """Routed cache of one layer. Named as its stock base, because saved caches are loaded by class name."""

    _padding: list[int] | None = None  # left padding of a batch's rows on the host; None: read it again
    pinned: int | None = None  # prompt tokens of the exact prefill under way: no call routes anew
    short_calls: Any = None  # `flux_mlx.short_calls.ShortCalls` of this cache, once there was one
    token_step: Any = None  # `flux_mlx.token_steps.StepSeen`, while tokens are decoded one by one
    drops_early = False  # in it, keys that a sparse layer sees no more may go at once
    projected: dict[int, Projected] | None = None  # in it, by their offset, what calls to come need not project anew

    @classmethod
    def new(cls, head_dim: int, pool_tokens: int) -> CacheList:
        """An empty cache for one row."""
        state = ArraysCache(3)
        state.cache = list(_blank(head_dim, pool_tokens))
        return cls(KVCache(), state)

    @staticmethod
    def adopt(cache: object) -> None:
        """Turn a stock CacheList of our layout, as stock code loads it from a file, into ours, in place."""
        if type(cache) is StockCacheList and len(cache.caches) == 2 and _is_router_state(cache.caches[1]):
            cache.__class__ = CacheList

    # What stock code asks of a KV cache

    @property
    def kv(self):
        """The KV cache inside."""
        return self.caches[0]

    @property
    def offset(self):
        """Tokens held: int, or int32 `[B]` of a batch (its rows' real tokens)."""
        return self.kv.offset

    def make_mask(self, *args, **kwargs):
        """As the KV cache inside."""
        return self.kv.make_mask(*args, **kwargs)

    def size(self) -> int:
        """Tokens held; in a batch those of the longest row, as padding makes every row that long."""
        kv = self.caches[0]
        return kv.offset if isinstance(kv.offset, int) else kv.size()

    def keys_and_values(self):
        """As the KV cache inside."""
        return self.kv.keys_and_values()

    def is_trimmable(self) -> bool:
        """As the KV cache inside."""
        return self.kv.is_trimmable()

    def trim(self, n: int) -> int:
        """Drop the newest `n` tokens. A cut below the pooled tokens makes the route stale: UNSET, decided anew.

        A turn of fewer than P tokens after it leaves a layer FULL that was; a cut that leaves no token forgets that.

        Raises:
            DroppedKeysError: Under the KV policy evict, where `can_trim` says no.
        """
        n = self.kv.trim(n)
        if n and any(end > offset for end, offset in zip(self._rows[:, Counter.END], self.offsets(), strict=True)):
            self._rewind()
        return n

    def can_trim(self, n: int) -> bool:
        """Whether `trim(n)` is possible."""
        return self.kv.can_trim(n) if self.is_evicted else self.is_trimmable()

    def snapshot(self) -> tuple[int, Any, list[mx.array], dict[str, Any]]:
        """What `restore` needs, to come back here after more tokens of one row."""
        kv, state = self.caches
        kept = copy.deepcopy(kv) if self.is_evicted else None  # small; other caches are cut back instead
        return kv.offset, kept, list(state.cache), self._copied()

    def restore(self, snapshot: tuple[int, Any, list[mx.array], dict[str, Any]]) -> None:
        """Come back to `snapshot`: later tokens are dropped, the router's state and the route are those of then."""
        offset, kv, arrays, known = snapshot
        if self.is_evicted:
            kv = kv or KVCache()  # keys are dropped within a prefill only if it began with none
        else:
            self.kv.trim(self.offset - offset)
        caches = (kv or self.kv, self.caches[1])
        self._restored(known)
        self.caches = caches
        self.caches[1].cache = list(arrays)

    @property
    def is_evicted(self) -> bool:
        """Whether only sink and window are held, so that the row is sparse for good."""
        return isinstance(self.kv, WindowKVCache)

    def evict(self, pattern: PatternConfig) -> None:
        """Keep the keys of sink and window only, now and from now on, if there are more in a stock cache of one row."""
        if type(self.kv) is KVCache and self.kv.offset > pattern.dense_tokens and self.rows_held == 1:
            self.caches = (WindowKVCache.of(self.kv, pattern), self.caches[1])

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> CacheList:
        """The same cache with quantised keys and values; a KV cache that cannot be quantised stays as it is."""
        if not hasattr(self.kv, "to_quantized"):
            return self
        self._flush()
        quantized = type(self)(self.kv.to_quantized(group_size=group_size, bits=bits), self.caches[1])
        quantized.pinned = self.pinned
        return quantized

    def take_projected(self) -> Projected | None:
        """What `families.project` gave for the call at hand, if it is known."""
        return self.projected.pop(self.offset, None) if self.projected else None

    def left_padding(self) -> list[int]:
        """The rows' left padding on the host; zeros for a KV cache without padding."""
        if self._padding is None:
            padding = getattr(self.kv, "left_padding", None)
            self._padding = [0] * self.rows_held if padding is None else padding.tolist()
        return self._padding

    def widen(self, rows: int) -> None:
        """Make a cache of one row serve a batch: stock code (`mlx_lm.evaluate`) feeds one to a cache made for one.

        Raises:
            ValueError: The cache holds another number of rows than `rows`, and more than one.
        """
        held = self.rows_held
        if rows == held:
            return
        if self.is_evicted:
            raise ValueError(f"[CacheList] a cache under the KV policy evict serves one row, got a call of {rows}.")
        if held != 1:
            raise ValueError(f"[CacheList] the cache holds {held} rows, the call {rows}.")
        self._flush()
        self.caches[1].cache = [mx.repeat(array, rows, axis=0) for array in self.caches[1].cache]
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: what a file holds, so nothing of the model. Noted calls are looked at."""
        self._flush()
        return {"caches": self.caches}

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheList:
        """A copy shares the noted calls, which nobody has to look at for it."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def state(self):
        """What stock code evaluates and saves. To be evaluated alone, calls that were noted may stay so."""
        if only_evaluates():
            return self.kv.state, self.pending()
        self._flush()
        return StockCacheList.state.fget(self)

    @property
    def nbytes(self):
        """As the stock cache counts. Who asks keeps the cache: noted calls would keep model and inputs with it."""
        if self.noted:
            self.compute()
        return StockCacheList.nbytes.fget(self)

    @state.setter
    def state(self, value):
        StockCacheList.state.fset(self, value)
        self._forget()

    @classmethod
    def merge(cls, caches: list[CacheList]) -> CacheList:
        """One batch of single-row caches.

        Raises:
            ValueError: One of them holds sink and window only.
        """
        for cache in caches:
            if cache.is_evicted:
                raise ValueError("[merge] caches under the KV policy evict serve one row each; batches need keep.")
            cache._flush()
        return super().merge(caches)

    def extract(self, idx: int) -> CacheList:
        """Row `idx` of a batch as a cache of its own."""
        self._flush()
        return type(self)(*(c.extract(idx) for c in self.caches))

    def filter(self, batch_indices) -> None:
        """Keep these rows of a batch, in place."""
        self._flush()
        super().filter(batch_indices)
        self._forget()

    def extend(self, other: CacheList) -> None:
        """Append the rows of another batch, in place."""
        self._flush()
        other._flush()
        super().extend(other)
        self._forget()

    def prepare(self, **kwargs) -> None:
        """Announce right padding: short calls are to be looked at again."""
        self.catch_up()
        super().prepare(**kwargs)
        self.wake()

    def finalize(self) -> None:
        """End the right padding that `prepare` announced."""
        super().finalize()
        self._padding = None


def _is_router_state(cache: object) -> bool:
    """Whether a cache is the second half of ours. Other families keep arrays of their own beside keys and values."""
    if not isinstance(cache, ArraysCache) or len(cache.cache) != 3:
        return False
    counters = cache[0]
    return isinstance(counters, mx.array) and counters.dtype == mx.int32 and counters.shape[1:] == (len(Counter),)


def routes(cache: list[object]) -> list[Route | list[Route] | None]:
    """The route of every layer of a prompt cache: a Route, one for each row of a batch, or None if not routed."""
    found = []
    for entry in cache:
        CacheList.adopt(entry)
        taken = entry.routes if isinstance(entry, CacheList) else None
        found.append(taken[0] if taken is not None and len(taken) == 1 else taken)
    return found


def trim_noted(cache: list[object]) -> None:
    """Have the layers' noted inputs cut down to what routers read, all at once, when the first token is out."""
    due = [entry for entry in cache if isinstance(entry, CacheList) and entry.trim_at != NEVER]
    if due and due[0].trim_at <= due[0].offset:
        mx.async_eval([entry.trim_noted() for entry in due])


def tokens_held(cache: list[object]) -> int:
    """Tokens that a prompt cache of one row holds; entries of some layers (states, convolutions) do not count them."""
    return next((entry.offset for entry in cache if isinstance(getattr(entry, "offset", None), int)), 0)


def can_trim(cache: list[object], tokens: int) -> bool:
    """Whether the newest `tokens` of a prompt cache can be dropped."""
    return all(entry.can_trim(tokens) if isinstance(entry, CacheList) else entry.is_trimmable() for entry in cache)


def describe_routes(cache: list[object], row: int = 0) -> str:
    """One line for people: how many layers of a row are sparse, and which are full and which sparse."""
    taken = [route[row] if isinstance(route, list) else route for route in routes(cache)]
    full = [str(i) for i, route in enumerate(taken) if route in (Route.FULL, Route.UNSET)]
    sparse = [str(i) for i, route in enumerate(taken) if route == Route.SPARSE]
    routed = len(full) + len(sparse)
    words = f"{len(sparse)} of {routed} routed layers sparse; full: {','.join(full) or 'none'}"
    return f"{words}; sparse: {','.join(sparse) or 'none'}"
