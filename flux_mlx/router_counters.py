"""The counters of one row of a routed cache: what they count, and what a turn's beginning and a cut make of them."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from flux_mlx.spec import Route


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


def begin_turn(counters: np.ndarray, offset: int, is_decided: bool) -> None:
    """Start a new turn if tokens that are not of this prompt came, or were cut, after the newest pooled token.

    One short call in between is the prompt's own: stock code cuts prompts anywhere, an answer takes two calls.

    Args:
        counters: int32 `[9]`, changed in place.
        offset: Position of the first token that is to be pooled.
        is_decided: Whether there is a decision that nobody read, newer than the route in `counters`.
    """
    gap = offset - int(counters[Counter.END])
    own = counters[Counter.SHORT_CALLS] == 1 and counters[Counter.SHORT_TOKENS] == gap
    if (gap or counters[Counter.SHORT_CALLS]) and not own:
        counters[Counter.TURN] = 0
        if is_decided or counters[Counter.ROUTE] != Route.UNSET:
            counters[Counter.BOUND] = Bound.ROUTED
    counters[Counter.END] = offset
    counters[[Counter.SHORT_CALLS, Counter.SHORT_TOKENS]] = 0


def rewind(counters: np.ndarray, offset: int, is_evicted: bool) -> None:
    """Forget what was pooled of tokens that are gone. A layer that dropped keys stays sparse.

    That a row was FULL is remembered for a short turn, unless nothing of the row is left.

    Args:
        counters: int32 `[9]`, changed in place.
        offset: The row's tokens that are left; 0 or less: none.
        is_evicted: Whether the layer dropped keys.
    """
    if counters[Counter.END] <= offset:
        return
    if counters[Counter.PREFIX_END] > offset:
        contiguous = counters[Counter.PREFIX_END] == counters[Counter.PREFIX]
        counters[Counter.PREFIX] = counters[Counter.PREFIX_END] = max(0, offset) if contiguous else 0
    counters[Counter.END] = max(0, offset)
    counters[[Counter.RECENT, Counter.TURN, Counter.SHORT_CALLS]] = 0
    counters[Counter.BOUND] = Bound.STALE_FULL if offset > 0 and _was_full(counters) else Bound.FREE
    counters[Counter.ROUTE] = Route.SPARSE if is_evicted else Route.UNSET


def _was_full(counters: np.ndarray) -> bool:
    """Whether a row's route is FULL, or was before a cut since which there is none."""
    route = counters[Counter.ROUTE]
    return route == Route.FULL or (route == Route.UNSET and counters[Counter.BOUND] == Bound.STALE_FULL)
