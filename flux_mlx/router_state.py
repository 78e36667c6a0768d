"""What the router remembers of a prompt, row by row: the pools it reads, counters, the route.

All of it is in the three arrays of an `ArraysCache`, batch first:

    slot 0  counters  int32 [B, 9]        see `Counter`
    slot 1  prefix    float32 [B, P, D]   pooled queries of the first P prompt tokens, one row a token
    slot 2  recent    float32 [B, P, D]   those of the last P prompt tokens, the newest last

A row of zeros, as stock code makes for new rows, means: nothing known, compute full attention.

The counters are kept on the host; the one thing that only the device knows is a decision just made. It stays there
until somebody asks for the route. Kernels that take a route from the device do not ask: see `RouterState.undecided`.
The calls of a single row are only noted until then: see `flux_mlx.noted_calls`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from flux_mlx.noted_calls import RESTLESS, NotedCalls
from flux_mlx.router_counters import Bound, Counter, begin_turn, rewind
from flux_mlx.router_decision import Decision
from flux_mlx.spec import Route


class RouterState(NotedCalls):
    """Mixed into the routed cache: the second half of it, and what the host knows of that."""

    caches: tuple[Any, Any]  # the KV cache, and the arrays
    offset: Any
    is_evicted: bool
    is_listening = False  # the next call is dense, and only its input is kept: in `heard`
    heard: mx.array | None = None
    _host: np.ndarray | None = None  # counters on the host; None: read them again
    _dirty = False  # slot 0 is older than `_host` and `decision`
    decision: Decision | None = None  # newer than the host's routes
    _routes: list[Route] | None = None  # the routes, read
    inputs: mx.array | None = None  # what the newest pooled queries are computed from, until they are
    stays_undecided = False  # of the exact prefill under way, the decision may stay on the device until its end

    @property
    def rows_held(self) -> int:
        """B: rows of the batch."""
        return self.caches[1].cache[0].shape[0]

    def is_alone(self) -> bool:
        """Whether there is one row and no padding, so that calls can be noted."""
        kv, arrays = self.caches
        is_plain = arrays.lengths is None and arrays.left_padding is None
        return is_plain and isinstance(kv.offset, int) and arrays.cache[0].shape[0] == 1

    def pending(self) -> list[Any]:
        """All that is not computed yet of what was pooled, decided and noted; of noted calls what the router reads."""
        self.inputs = None  # the arrays hold on to them, until these are evaluated
        codes = None if self.decision is None else self.decision.codes
        return [self.caches[1].cache, codes, self.trim_noted()]

    def _flush(self) -> None:
        """Bring slot 0 up to the counters on the host and the newest decision, before stock code reads it."""
        self.catch_up()
        self.inputs = None  # the arrays hold on to them, until these are evaluated
        if not self._dirty:
            return
        if self.decision is None:
            self.caches[1][0] = mx.array(self._host)
        else:
            codes, fed = self.decision.codes, self.decision.fed
            if not all(fed):
                codes = mx.where(mx.array(fed), codes, mx.array(self._host[:, Counter.ROUTE]))
            others = _behind_routes(len(fed), self._host[:, Counter.ROUTE + 1 :].tobytes())
            self.caches[1][0] = mx.concatenate([codes[:, None], others], axis=1)
        self._dirty = False

    def compute(self) -> None:
        """Start computing what is pooled and decided. Stock code evaluates keys alone while it decodes."""
        self._flush()
        mx.async_eval(self.caches[1].cache)

    def _forget(self) -> None:
        """Drop what was read or is newer than the arrays, after stock code changed them."""
        self._host = self.decision = self._routes = self._padding = self.inputs = None
        self.is_listening, self.heard, self._dirty = False, None, False
        self.drop_noted()
        self.wake()

    def _copied(self) -> dict[str, Any]:
        """What the host knows, for `_restored`."""
        known = self.__dict__.copy()
        if self._host is not None:
            known["_host"] = self._host.copy()
        return known

    def _restored(self, known: dict[str, Any]) -> None:
        """Know again what `_copied` gave, and no more."""
        self.__dict__.clear()
        self.__dict__.update(known)
        self.wake()

    @property
    def _rows(self) -> np.ndarray:
        """The counters on the host but for a decision not read. Waits for the device after stock code changed them."""
        if self.noted:
            self.catch_up()
        if self._host is None:
            self._host = np.array(self.caches[1][0])
        return self._host

    @property
    def counters(self) -> np.ndarray:
        """The rows' counters on the host, int32 `[B, 9]`. Waits for the device, for a decision just made too."""
        self.catch_up()
        if self.decision is not None:
            self.learn(self.decision.read())
        return self._rows

    def learn(self, routes: list[Route | None]) -> None:
        """Take what the newest decision says, of each row, once somebody has read it."""
        for row, route in zip(self._rows, routes, strict=True):
            row[Counter.ROUTE] = row[Counter.ROUTE] if route is None else route
        self.decision = self.inputs = None  # now: who interrupts the wait can ask again

    def undecided(self) -> mx.array | None:
        """The rows' routes as codes, int32 `[B]`, while they are a decision of all rows that nobody read; else None.

        Does not wait for the device.
        """
        is_new = self.decision is not None and all(self.decision.fed) and not self.noted
        return self.decision.codes if is_new else None

    def lend(self) -> mx.array:
        """`undecided`, where it is not None, for a kernel to read."""
        self.decision = self.decision._replace(is_lent=True)
        return self.decision.codes

    @property
    def routes(self) -> list[Route]:
        """The rows' routes. Waits for a decision just made."""
        if self._routes is None or self.noted:
            self._routes = [Route(code) for code in self.counters[:, Counter.ROUTE].tolist()]
        return self._routes

    def set_routes(self, routes: list[Route]) -> None:
        """Store the rows' routes.

        Raises:
            ValueError: A layer that holds sink and window only would not be sparse.
        """
        if routes == self.routes:
            return
        if self.is_evicted:
            raise ValueError(
                "[CacheList] this cache dropped keys under the KV policy evict: its sparse layers stay sparse, "
                f"got {[route.name for route in routes]}. Begin with a new cache."
            )
        self.counters[:, Counter.ROUTE] = routes
        self._dirty, self._routes, self.calm = True, None, RESTLESS

    def offsets(self) -> list[int]:
        """The rows' real tokens so far, on the host."""
        return [self.offset] * self.rows_held if isinstance(self.offset, int) else self.offset.tolist()

    def row_lengths(self, tokens: int) -> list[int]:
        """How many of a call's `tokens` are real in each row; the rest is right padding."""
        lengths = self.caches[1].lengths
        if lengths is None:
            return [tokens] * self.rows_held
        return [max(0, min(tokens, left)) for left in lengths.tolist()]

    def resume(self, routes: list[Route]) -> None:
        """After a cut within a conversation: the next turn starts from these routes, as if there had been no cut."""
        self.set_routes(routes)
        self.counters[:, Counter.BOUND] = [Bound.FREE if route == Route.UNSET else Bound.ROUTED for route in routes]
        self._dirty = True

    def skip(self, lengths: list[int]) -> None:
        """Note a call of `lengths` tokens a row, for the rows where they are too few to be pooled (0: none)."""
        for row, tokens in zip(self._rows, lengths, strict=True):
            if tokens and row[Counter.SHORT_CALLS] < 2:
                row[Counter.SHORT_CALLS] += 1
                row[Counter.SHORT_TOKENS] = tokens
                self._dirty = True
        if self.caches[1].lengths is None and (self._rows[:, Counter.SHORT_CALLS] >= 2).all():
            self.is_idle = True
            if len(self._rows) > 1:
                self.compute()  # behind the first token

    def feed(self, row: int, head: mx.array, tail: mx.array, tokens: int, offset: int | None = None) -> None:
        """Pool `tokens` new prompt tokens of a row.

        Args:
            row: Index in the batch.
            head: float32 `[min(P, tokens), D]`, queries of the first of them, averaged over heads.
            tail: float32 `[min(P, tokens), D]`, of the last of them.
            tokens: Their number, 1 or more.
            offset: Position of the first of them; None: the row's offset.
        """
        counters = self._rows[row]  # first: it looks at noted calls, which replaces the arrays
        prefix, recent = self.caches[1][1], self.caches[1][2]
        pool_tokens = prefix.shape[1]
        begin_turn(counters, self.offsets()[row] if offset is None else offset, self.decision is not None)
        start = counters[Counter.END]
        if (room := min(pool_tokens - int(counters[Counter.PREFIX]), tokens)) > 0:
            used = int(counters[Counter.PREFIX])
            parts = [part for part in (prefix[row, :used], head[:room], prefix[row, used + room :]) if part.size]
            self.caches[1][1] = _with_row(prefix, row, mx.concatenate(parts) if len(parts) > 1 else parts[0])
            counters[Counter.PREFIX] += room
            counters[Counter.PREFIX_END] = start + room
        kept = recent[row, min(tokens, pool_tokens) :]
        self.caches[1][2] = _with_row(recent, row, mx.concatenate([kept, tail]) if kept.size else tail)
        counters[Counter.RECENT] = min(pool_tokens, counters[Counter.RECENT] + tokens)
        counters[Counter.END] = start + tokens
        counters[Counter.TURN] += tokens
        self._dirty = True
        self.wake()

    def pool_rows(self) -> tuple[mx.array, mx.array, tuple[tuple[int, int], ...]]:
        """What the router pools: prefix and recent, float32 `[B, P, D]`, and how many rows of each count."""
        counts = tuple((row[Counter.PREFIX], row[Counter.RECENT]) for row in self._rows.tolist())
        return self.caches[1][1], self.caches[1][2], counts

    def pooled(self) -> mx.array:
        """Mean of the prefix and of the recent rows: the router's input, float32 `[B, D]`."""
        prefix, tail, counts = self.pool_rows()
        rows = []
        for row, (used, recent) in enumerate(counts):
            ends = mx.concatenate([prefix[row, :used], tail[row, tail.shape[1] - recent :]])
            rows.append(ends.sum(0) / max(1, used + recent))
        return rows[0][None] if len(rows) == 1 else mx.stack(rows)

    def decide(self, codes: mx.array, fed: list[bool]) -> None:
        """Take the router's decisions for the rows that were fed; a short later turn only ever goes to FULL.

        Args:
            codes: int32 `[B]`: the router's, of `Route`. Not waited for, unless a row's own route matters too.
            fed: The rows that it counts for.
        """
        if self.is_evicted:  # sparse for good: no decision that is waited for has the pools computed
            self.compute()
            return
        short = self._rows[:, Counter.TURN] < self.caches[1][1].shape[1]
        bound = (self._rows[:, Counter.BOUND] != Bound.FREE) & short
        self._dirty, self._routes = True, None
        if bound.any():
            fed = self._hold_full(bound, fed)
            if not any(fed):  # all are FULL, as the host knows
                self.compute()
                return
        elif not all(fed) and self.decision is not None:
            self.counters  # noqa: B018 (reads the last decision, which some rows keep)
        self.decision = Decision(codes, fed)

    def _hold_full(self, bound: np.ndarray, fed: list[bool]) -> list[bool]:
        """The fed rows without those that are to be FULL whatever the router says. These are FULL from now on.

        Args:
            bound: bool `[B]`: the rows that a short turn must not take from FULL.
            fed: The rows that are decided now.
        """
        counters = self.counters
        was_full = (counters[:, Counter.ROUTE] == Route.FULL) | (counters[:, Counter.BOUND] == Bound.STALE_FULL)
        held = bound & was_full
        counters[held & fed, Counter.ROUTE] = Route.FULL
        return (np.array(fed) & ~held).tolist()

    def start_decision(self, beside: Any = ()) -> None:
        """Start computing a decision just made, in one piece of work with arrays that do not depend on it."""
        if self.decision is not None:
            mx.async_eval(self.decision.codes, beside)

    def _rewind(self) -> None:
        """Bring the counters to the offsets after a cut: see `router_counters.rewind`."""
        self._routes = None
        self.wake()
        for counters, offset in zip(self.counters, self.offsets(), strict=True):
            rewind(counters, offset, self.is_evicted)
        self._dirty = True


@lru_cache(maxsize=64)
def _behind_routes(rows: int, counters: bytes) -> mx.array:
    """Counters but for the routes, int32 `[B, 8]`. A model's layers share them: a GPU fetches host memory by pages."""
    return mx.array(np.frombuffer(counters, np.int32).reshape(rows, -1))


def _with_row(x: mx.array, row: int, value: mx.array) -> mx.array:
    """`x` with row `row` replaced; never in place, because copies of a cache share arrays."""
    if x.shape[0] == 1:
        return value[None]
    return mx.concatenate([x[:row], value[None], x[row + 1 :]])
