"""What the router remembers of a prompt, row by row: the pools it reads, counters, the route.

All of it is in the three arrays of an `ArraysCache`, batch first:

    slot 0  counters  int32 [B, 9]        see `Counter`
    slot 1  prefix    float32 [B, P, D]   pooled queries of the first P prompt tokens, one row a token
    slot 2  recent    float32 [B, P, D]   those of the last P prompt tokens, the newest last

A row of zeros, as stock code makes for new rows, means: nothing known, compute full attention.

The counters are kept on the host; the one thing that only the device knows is a decision just made. It stays there
until somebody asks for the route. Nobody does while sink and window hold every key. So the calls of a single row are
only noted, and looked at when somebody asks: a short prompt pays for no router. Kernels that take a route from the
device do not ask: see `RouterState.undecided`.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from flux_mlx.cuda_kernels import rows_on_device
from flux_mlx.spec import Route

RESTLESS = object()  # `RouterState.calm` of a cache that every call must look at: no layer's `forced`
NEVER = 1 << 62  # an offset that no cache comes to
LOG_CALLS = 8  # calls noted at most: prompts in the log hold on to their inputs


class Counter(IntEnum):
    """Columns of a row's counters."""

    ROUTE = 0  # a Route
    PREFIX = 1  # valid rows of `prefix`
    RECENT = 2  # valid rows of `recent`
    END = 3  # position after the newest pooled token
    PREFIX_END = 4  # position after the newest token in `prefix`
    TURN = 5  # prompt tokens pooled in this turn
    BOUND = 6  # a Bound
    SHORT_CALLS = 7  # calls since the newest pooled token that were too short to be pooled, at most 2
    SHORT_TOKENS = 8  # tokens of the first of them


class Bound(IntEnum):
    """What a turn of fewer than P tokens may do to a row's route."""

    FREE = 0  # anything: the row had no route when the turn began
    ROUTED = 1  # take it to FULL, never from it
    STALE_FULL = 2  # take it to FULL only: it was FULL before a cut made it stale


class Decision(NamedTuple):
    """What the router said, not read yet."""

    codes: mx.array  # int32 [B], of Route
    fed: list[bool]  # rows that it counts for; the others keep their route
    is_lent: bool = False  # kernels under way may read `codes`

    def read(self) -> list[Route | None]:
        """The rows' new routes, None where they keep theirs. Waits for the device."""
        codes = joined_for_host([self.codes]) if self.is_lent else self.codes
        return [Route(code) if fed else None for code, fed in zip(codes.tolist(), self.fed, strict=True)]


def joined_for_host(codes: list[mx.array]) -> mx.array:
    """Decisions of one row or more, joined, in memory that no kernel reads.

    MLX on CUDA moves what the host reads to other memory, and does not wait for kernels that read it where it was.
    """
    repeats = -(-rows_on_device(len(codes), codes[0].itemsize) // len(codes))  # of one alone MLX would make no copy
    return mx.concatenate(codes * repeats)[: sum(part.size for part in codes)]


class Call:
    """A call that was noted. Copies of a cache share it, because the layer is the model's.

    Attributes:
        tokens: Their number.
        offset: Position of the first of them.
        layer: The attention module; None if they are too few to be pooled.
        x: `[1, tokens, hidden]`, its input; after `trim` what the router reads of it.

    Of a call that is too short only the number counts. It holds on to nothing: caches outlive their model in a server.
    """

    __slots__ = ("layer", "offset", "tokens", "x")

    def __init__(self, layer: Any, x: mx.array, offset: int):
        self.tokens, self.offset = x.shape[1], offset
        is_pooled = self.tokens >= layer.flux.router.min_prefill_tokens
        self.layer, self.x = (layer, x) if is_pooled else (None, None)

    def __deepcopy__(self, _: Any) -> Call:
        return self

    def trim(self) -> mx.array | None:
        """Keep of the input what the router reads, and return it."""
        if self.layer is not None:
            self.x = self.layer.router_input(self.x)
        return self.x


class RouterState:
    """Mixed into the routed cache: the second half of it, and what the host knows of that."""

    caches: tuple[Any, Any]  # the KV cache, and the arrays
    offset: Any
    is_evicted: bool
    calm: Any = RESTLESS  # `forced` of the layer whose short calls `RoutedAttention.decode` may take
    is_listening = False  # the next call is dense, and only its input is kept: in `heard`
    heard: mx.array | None = None
    trim_at = NEVER  # offset from which the inputs of noted calls are to be cut down to what the router reads
    noted: tuple[Call, ...] = ()  # calls not looked at yet
    _shorts = 0  # calls since the newest noted prompt that were too short to be pooled
    _host: np.ndarray | None = None  # counters on the host; None: read them again
    _dirty = False  # slot 0 is older than `_host` and `decision`
    decision: Decision | None = None  # newer than the host's routes
    _routes: list[Route] | None = None  # the routes, read
    inputs: mx.array | None = None  # what the newest pooled queries are computed from, until they are
    stays_undecided = False  # of the exact prefill under way, the decision may stay on the device until its end
    is_idle = False  # a further call that is too short to be pooled changes nothing here

    @property
    def rows_held(self) -> int:
        """B: rows of the batch."""
        return self.caches[1].cache[0].shape[0]

    def is_alone(self) -> bool:
        """Whether there is one row and no padding, so that calls can be noted."""
        arrays = self.caches[1]
        is_plain = arrays.lengths is None and arrays.left_padding is None
        return is_plain and isinstance(self.offset, int) and arrays.cache[0].shape[0] == 1

    def note(self, layer: Any, x: mx.array, offset: int) -> None:
        """Remember a call of the one row; what it means for the route is worked out when somebody asks.

        Args:
            layer: Its attention module, which has `take_in`.
            x: `[1, L, hidden]`, the module's input.
            offset: Position of its first token.
        """
        call = Call(layer, x, offset)
        self.noted += (call,)
        if call.layer is None:
            self._shorts += 1
            self.is_idle = self._shorts >= 2
            return
        self._shorts, self.is_idle = 0, False
        if call.tokens > 2 * layer.flux.router.pool_tokens:
            self.trim_at = call.offset + call.tokens + 2  # behind the first token
        if len(self.noted) >= LOG_CALLS:
            self.compute()

    def trim_log(self) -> list[mx.array | None]:
        """Keep of the noted calls' inputs what the router reads, returned to be evaluated: then the rest is free."""
        self.trim_at = NEVER
        return [call.trim() for call in self.noted]

    def pending(self) -> list[Any]:
        """All that is not computed yet of what was pooled, decided and noted; of noted calls what the router reads."""
        self.inputs = None  # the arrays hold on to them, until these are evaluated
        codes = None if self.decision is None else self.decision.codes
        return [self.caches[1].cache, codes, self.trim_log()]

    def catch_up(self) -> None:
        """Look at the noted calls."""
        log, self.noted, self.trim_at = self.noted, (), NEVER
        for call in log:
            if call.layer is None:
                self.skip([call.tokens])
            else:
                call.layer.take_in(self, call.x, call.tokens, call.offset)

    def wake(self) -> None:
        """The next call has to be looked at, however short it is."""
        self.is_idle, self.calm, self._shorts = False, RESTLESS, 0

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
        self.noted, self._dirty, self.trim_at = (), False, NEVER
        self.is_listening, self.heard = False, None
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
        self._begin_turn(counters, self.offsets()[row] if offset is None else offset)
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

    def _begin_turn(self, counters: np.ndarray, offset: int) -> None:
        """Start a new turn if tokens that are not of this prompt came, or were cut, after the newest pooled token.

        One short call in between is the prompt's own: stock code cuts prompts anywhere, an answer takes two calls.
        """
        gap = offset - int(counters[Counter.END])
        own = counters[Counter.SHORT_CALLS] == 1 and counters[Counter.SHORT_TOKENS] == gap
        if (gap or counters[Counter.SHORT_CALLS]) and not own:
            counters[Counter.TURN] = 0
            if self.decision is not None or counters[Counter.ROUTE] != Route.UNSET:
                counters[Counter.BOUND] = Bound.ROUTED
        counters[Counter.END] = offset
        counters[[Counter.SHORT_CALLS, Counter.SHORT_TOKENS]] = 0

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
        """Forget what was pooled of tokens that are gone. A layer that dropped keys stays sparse.

        That a row was FULL is remembered for a short turn, unless nothing of the row is left.
        """
        self._routes = None
        self.wake()
        for counters, offset in zip(self.counters, self.offsets(), strict=True):
            if counters[Counter.END] <= offset:
                continue
            if counters[Counter.PREFIX_END] > offset:
                contiguous = counters[Counter.PREFIX_END] == counters[Counter.PREFIX]
                counters[Counter.PREFIX] = counters[Counter.PREFIX_END] = max(0, offset) if contiguous else 0
            counters[Counter.END] = max(0, offset)
            counters[[Counter.RECENT, Counter.TURN, Counter.SHORT_CALLS]] = 0
            counters[Counter.BOUND] = Bound.STALE_FULL if offset > 0 and _was_full(counters) else Bound.FREE
            counters[Counter.ROUTE] = Route.SPARSE if self.is_evicted else Route.UNSET
        self._dirty = True


@lru_cache(maxsize=64)
def _behind_routes(rows: int, counters: bytes) -> mx.array:
    """Counters but for the routes, int32 `[B, 8]`. A model's layers share them: a GPU fetches host memory by pages."""
    return mx.array(np.frombuffer(counters, np.int32).reshape(rows, -1))


def _was_full(counters: np.ndarray) -> bool:
    """Whether a row's route is FULL, or was before a cut since which there is none."""
    route = counters[Counter.ROUTE]
    return route == Route.FULL or (route == Route.UNSET and counters[Counter.BOUND] == Bound.STALE_FULL)


def _with_row(x: mx.array, row: int, value: mx.array) -> mx.array:
    """`x` with row `row` replaced; never in place, because copies of a cache share arrays."""
    if x.shape[0] == 1:
        return value[None]
    return mx.concatenate([x[:row], value[None], x[row + 1 :]])
