"""The length from which on routing pays on a machine, found by measuring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

GAIN = 0.02  # a length pays if Flux is this much faster: below, it is noise
RESOLUTION = 0.1  # the search ends when the bracket is this share of its upper end
TOLERATED_LOSS = 0.01  # what the default may cost at any length


def lengths_between(shortest: int, longest: int) -> list[int]:
    """`shortest`, doubled as often as it stays below `longest`, and `longest`."""
    lengths = [shortest]
    while 2 * lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return [*lengths, longest] if longest > shortest else lengths


def bracket(speedups: dict[int, float]) -> tuple[int | None, int | None]:
    """(longest length that does not pay, shortest from which on every measured one pays); None where there is none."""
    pays = None
    for tokens in sorted(speedups, reverse=True):
        if speedups[tokens] < 1 + GAIN:
            return tokens, pays
        pays = tokens
    return None, pays


def find_crossover(measure: Callable[[int], dict[str, Any]], shortest: int, longest: int) -> dict[str, Any]:
    """Measure lengths until the crossover of prefill is known within `RESOLUTION`.

    Args:
        measure: Row of `compare` for a length.
        shortest: First length to measure, 2 tokens or more.
        longest: Last one, at least `shortest`.

    Returns:
        JSON values: the rows; for prefill and decode the length from which on routing pays (None: nowhere measured),
        the longest that does not (None: pays everywhere), and the least speed-up that was seen.

    Raises:
        ValueError: The lengths are in the wrong order.
    """
    if not 2 <= shortest <= longest:
        raise ValueError(f"[find_crossover] expected 2 <= shortest <= longest, got {shortest} and {longest}.")
    rows = {tokens: measure(tokens) for tokens in lengths_between(shortest, longest)}
    while True:
        low, high = bracket(_speedups(rows, "prefill"))
        if low is None or high is None or high - low <= max(1, RESOLUTION * high):
            break
        rows[(low + high) // 2] = measure((low + high) // 2)
    ordered = [rows[tokens] for tokens in sorted(rows)]
    return {"rows": ordered, "crossover": crossover_of(ordered)}


def crossover_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For prefill and decode what `find_crossover` says of rows of `compare`, also of those of a search cut short."""
    by_tokens = {row["prompt_tokens"]: row for row in rows}
    return {phase: _phase(_speedups(by_tokens, phase)) for phase in ("prefill", "decode")}


def _speedups(rows: dict[int, dict[str, Any]], phase: str) -> dict[int, float]:
    return {tokens: row[phase]["speedup"] for tokens, row in rows.items()}


def _phase(speedups: dict[int, float]) -> dict[str, Any]:
    low, high = bracket(speedups)
    least = min(speedups, key=lambda tokens: speedups[tokens])
    return {
        "pays_from_tokens": high,
        "does_not_pay_at_tokens": low,
        "least_speedup": speedups[least],
        "least_speedup_at_tokens": least,
        "costs_too_much": speedups[least] < 1 - TOLERATED_LOSS,
    }
