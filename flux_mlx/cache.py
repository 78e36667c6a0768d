"""The cache of a routed layer: all keys and values, the route, and the pool that the router reads.

Stock mlx-lm merges, splits, trims, copies, quantises and saves caches. What survives all of it is a `CacheList` of a
KV cache and an `ArraysCache`; so everything that the router remembers of a row are rows of arrays, batch first:

    slot 0  counters  int32 [B, 9]        see `Counter`
    slot 1  prefix    float32 [B, P, D]   pooled queries of the first P prompt tokens, one row a token
    slot 2  recent    float32 [B, P, D]   those of the last P prompt tokens, the newest last

A row of zeros, as stock code makes for new rows, means: nothing known, compute full attention.
"""

from __future__ import annotations

from enum import IntEnum

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.models.cache import CacheList as StockCacheList

from flux_mlx.spec import Route


class Counter(IntEnum):
    """Columns of a row's counters."""

    ROUTE = 0  # a Route
    PREFIX = 1  # valid rows of `prefix`
    RECENT = 2  # valid rows of `recent`
    END = 3  # position after the newest pooled token
    PREFIX_END = 4  # position after the newest token in `prefix`
    TURN = 5  # prompt tokens pooled in this turn
    BOUND = 6  # 1: this turn began with a route, which a short turn may only take to FULL
    SHORT_CALLS = 7  # calls since the newest pooled token that were too short to be pooled, at most 2
    SHORT_TOKENS = 8  # tokens of the first of them


class CacheList(StockCacheList):
    """Routed cache of one layer. Named as its stock base, because saved caches are loaded by class name."""

    _host: np.ndarray | None = None  # counters on the host; None: read them again
    _dirty = False  # slot 0 is older than `_host`
    _padding: list[int] | None = None  # left padding of a batch's rows on the host; None: read it again
    pinned: int | None = None  # prompt tokens of the exact prefill under way: no call routes anew

    @classmethod
    def new(cls, head_dim: int, pool_tokens: int) -> CacheList:
        """An empty cache for one row."""
        state = ArraysCache(3)
        state[0] = mx.zeros((1, len(Counter)), mx.int32)
        state[1] = mx.zeros((1, pool_tokens, head_dim), mx.float32)
        state[2] = mx.zeros((1, pool_tokens, head_dim), mx.float32)
        mx.eval(state.cache)
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
        return self.offset if isinstance(self.offset, int) else self.kv.size()

    def keys_and_values(self):
        """As the KV cache inside."""
        return self.kv.keys_and_values()

    def is_trimmable(self) -> bool:
        """As the KV cache inside."""
        return self.kv.is_trimmable()

    def trim(self, n: int) -> int:
        """Drop the newest `n` tokens. A cut below the pooled tokens makes the route stale: UNSET, decided anew."""
        n = self.kv.trim(n)
        if n and any(end > offset for end, offset in zip(self.counters[:, Counter.END], self.offsets(), strict=True)):
            self._rewind()
        return n

    def snapshot(self) -> tuple[int, list[mx.array]]:
        """What `restore` needs, to come back here after more tokens of one row."""
        self._flush()
        return self.offset, list(self.caches[1].cache)

    def restore(self, snapshot: tuple[int, list[mx.array]]) -> None:
        """Come back to `snapshot`: later tokens are dropped, the router's state and the route are those of then."""
        offset, arrays = snapshot
        self.kv.trim(self.offset - offset)
        self.caches[1].cache = list(arrays)
        self._host, self._dirty, self.pinned = None, False, None

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> CacheList:
        """The same cache with quantised keys and values; a KV cache that cannot be quantised stays as it is."""
        if not hasattr(self.kv, "to_quantized"):
            return self
        self._flush()
        quantized = type(self)(self.kv.to_quantized(group_size=group_size, bits=bits), self.caches[1])
        quantized.pinned = self.pinned
        return quantized

    @property
    def state(self):
        """What stock code evaluates and saves."""
        self._flush()
        return StockCacheList.state.fget(self)

    @state.setter
    def state(self, value):
        StockCacheList.state.fset(self, value)
        self._host, self._dirty, self._padding = None, False, None

    @classmethod
    def merge(cls, caches: list[CacheList]) -> CacheList:
        """One batch of single-row caches."""
        for cache in caches:
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
        self._host = self._padding = None

    def extend(self, other: CacheList) -> None:
        """Append the rows of another batch, in place."""
        self._flush()
        other._flush()
        super().extend(other)
        self._host = self._padding = None

    def finalize(self) -> None:
        """End the right padding that `prepare` announced."""
        super().finalize()
        self._padding = None

    def _flush(self) -> None:
        """Bring slot 0 up to the counters on the host, before stock code reads it."""
        if self._dirty:
            self.caches[1][0] = mx.array(self._host)
            self._dirty = False

    # What the router remembers

    def widen(self, rows: int) -> None:
        """Make a cache of one row serve a batch: stock code (`mlx_lm.evaluate`) feeds one to a cache made for one.

        Raises:
            ValueError: The cache holds another number of rows than `rows`, and more than one.
        """
        held = len(self.counters)
        if rows == held:
            return
        if held != 1:
            raise ValueError(f"[CacheList] the cache holds {held} rows, the call {rows}.")
        self._flush()
        self.caches[1].cache = [mx.repeat(array, rows, axis=0) for array in self.caches[1].cache]
        self._host = self._padding = None

    @property
    def counters(self) -> np.ndarray:
        """The rows' counters on the host, int32 `[B, 9]`. Waits for the device once after stock code changed them."""
        if self._host is None:
            self._host = np.array(self.caches[1][0])
        return self._host

    @property
    def routes(self) -> list[Route]:
        """The rows' routes."""
        return [Route(code) for code in self.counters[:, Counter.ROUTE].tolist()]

    def set_routes(self, routes: list[Route]) -> None:
        """Store the rows' routes."""
        if routes != self.routes:
            self.counters[:, Counter.ROUTE] = routes
            self._dirty = True

    def offsets(self) -> list[int]:
        """The rows' real tokens so far, on the host."""
        return [self.offset] * len(self.counters) if isinstance(self.offset, int) else self.offset.tolist()

    def left_padding(self) -> list[int]:
        """The rows' left padding on the host; zeros for a KV cache without padding."""
        if self._padding is None:
            padding = getattr(self.kv, "left_padding", None)
            self._padding = [0] * len(self.counters) if padding is None else padding.tolist()
        return self._padding

    def row_lengths(self, tokens: int) -> list[int]:
        """How many of a call's `tokens` are real in each row; the rest is right padding."""
        lengths = self.caches[1].lengths
        if lengths is None:
            return [tokens] * len(self.counters)
        return [max(0, min(tokens, left)) for left in lengths.tolist()]

    def resume(self, routes: list[Route]) -> None:
        """After a cut within a conversation: the next turn starts from these routes, as if there had been no cut."""
        self.set_routes(routes)
        self.counters[:, Counter.BOUND] = [route != Route.UNSET for route in routes]
        self._dirty = True

    def skip(self, lengths: list[int]) -> None:
        """Note a call of `lengths` tokens a row, for the rows where they are too few to be pooled (0: none)."""
        counters = self.counters
        if (counters[:, Counter.SHORT_CALLS] >= 2).all():
            return
        for row, tokens in zip(counters, lengths, strict=True):
            if tokens and row[Counter.SHORT_CALLS] < 2:
                row[Counter.SHORT_CALLS] += 1
                row[Counter.SHORT_TOKENS] = tokens
        self._dirty = True

    def feed(self, row: int, head: mx.array, tail: mx.array, tokens: int) -> None:
        """Pool `tokens` new prompt tokens of a row, which follow its offset.

        Args:
            row: Index in the batch.
            head: float32 `[min(P, tokens), D]`, queries of the first of them, averaged over heads.
            tail: float32 `[min(P, tokens), D]`, of the last of them.
            tokens: Their number, 1 or more.
        """
        prefix, recent = self.caches[1][1], self.caches[1][2]
        pool_tokens = prefix.shape[1]
        counters = self.counters[row]
        self._begin_turn(counters, self.offsets()[row])
        start = counters[Counter.END]
        if (room := min(pool_tokens - int(counters[Counter.PREFIX]), tokens)) > 0:
            used = int(counters[Counter.PREFIX])
            grown = mx.concatenate([prefix[row, :used], head[:room], prefix[row, used + room :]])
            self.caches[1][1] = _with_row(prefix, row, grown)
            counters[Counter.PREFIX] += room
            counters[Counter.PREFIX_END] = start + room
        self.caches[1][2] = _with_row(recent, row, mx.concatenate([recent[row], tail])[-pool_tokens:])
        counters[Counter.RECENT] = min(pool_tokens, counters[Counter.RECENT] + tokens)
        counters[Counter.END] = start + tokens
        counters[Counter.TURN] += tokens
        self._dirty = True

    def _begin_turn(self, counters: np.ndarray, offset: int) -> None:
        """Start a new turn if tokens that are not of this prompt lie between the newest pooled token and `offset`.

        One short call in between is the prompt's own: stock code cuts prompts anywhere, an answer takes two calls.
        """
        gap = offset - int(counters[Counter.END])
        own = counters[Counter.SHORT_CALLS] == 1 and counters[Counter.SHORT_TOKENS] == gap
        if gap and not own:
            counters[Counter.TURN] = 0
            counters[Counter.BOUND] = counters[Counter.ROUTE] != Route.UNSET
        counters[Counter.END] = offset
        counters[[Counter.SHORT_CALLS, Counter.SHORT_TOKENS]] = 0

    def pooled(self) -> mx.array:
        """Mean of the prefix and of the recent rows: the router's input, float32 `[B, D]`."""
        rows = []
        for row, counters in enumerate(self.counters.tolist()):
            used, recent = counters[Counter.PREFIX], counters[Counter.RECENT]
            tail = self.caches[1][2][row]
            ends = mx.concatenate([self.caches[1][1][row, :used], tail[tail.shape[0] - recent :]])
            rows.append(ends.sum(0) / max(1, used + recent))
        return mx.stack(rows)

    def decide(self, routes: list[Route], fed: list[bool]) -> None:
        """Take the router's decisions for the rows that were fed; a short later turn only ever goes to FULL."""
        pool_tokens = self.caches[1][1].shape[1]
        taken = []
        for counters, route, current, is_fed in zip(self.counters, routes, self.routes, fed, strict=True):
            held = counters[Counter.BOUND] and counters[Counter.TURN] < pool_tokens and current == Route.FULL
            taken.append(route if is_fed and not held else current)
        self.set_routes(taken)

    def _rewind(self) -> None:
        """Forget what was pooled of tokens that are gone."""
        for counters, offset in zip(self.counters, self.offsets(), strict=True):
            if counters[Counter.END] <= offset:
                continue
            if counters[Counter.PREFIX_END] > offset:
                contiguous = counters[Counter.PREFIX_END] == counters[Counter.PREFIX]
                counters[Counter.PREFIX] = counters[Counter.PREFIX_END] = max(0, offset) if contiguous else 0
            counters[Counter.END] = max(0, offset)
            counters[[Counter.ROUTE, Counter.RECENT, Counter.TURN, Counter.BOUND, Counter.SHORT_CALLS]] = 0
        self._dirty = True


def _is_router_state(cache: object) -> bool:
    """Whether a cache is the second half of ours. Other families keep arrays of their own beside keys and values."""
    if not isinstance(cache, ArraysCache) or len(cache.cache) != 3:
        return False
    counters = cache[0]
    return isinstance(counters, mx.array) and counters.dtype == mx.int32 and counters.shape[1:] == (len(Counter),)


def _with_row(x: mx.array, row: int, value: mx.array) -> mx.array:
    """`x` with row `row` replaced; never in place, because copies of a cache share arrays."""
    if x.shape[0] == 1:
        return value[None]
    return mx.concatenate([x[:row], value[None], x[row + 1 :]])


def routes(cache: list[object]) -> list[Route | list[Route] | None]:
    """The route of every layer of a prompt cache: a Route, one for each row of a batch, or None if not routed."""
    found = []
    for entry in cache:
        CacheList.adopt(entry)
        taken = entry.routes if isinstance(entry, CacheList) else None
        found.append(taken[0] if taken is not None and len(taken) == 1 else taken)
    return found


def tokens_held(cache: list[object]) -> int:
    """Tokens that a prompt cache of one row holds; entries of some layers (states, convolutions) do not count them."""
    return next((entry.offset for entry in cache if isinstance(getattr(entry, "offset", None), int)), 0)


def describe_routes(cache: list[object], row: int = 0) -> str:
    """One line for people: how many layers of a row are sparse, and which are full and which sparse."""
    taken = [route[row] if isinstance(route, list) else route for route in routes(cache)]
    full = [str(i) for i, route in enumerate(taken) if route in (Route.FULL, Route.UNSET)]
    sparse = [str(i) for i, route in enumerate(taken) if route == Route.SPARSE]
    routed = len(full) + len(sparse)
    words = f"{len(sparse)} of {routed} routed layers sparse; full: {','.join(full) or 'none'}"
    return f"{words}; sparse: {','.join(sparse) or 'none'}"
