"""What attention must satisfy, as functions of (backend, case). The suite runs them; the mutation list names them.

Where two calls have the same shapes the results must agree bit for bit, if the backend can; elsewhere the error budget
decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

from flux_mlx import spec
from parity_tests.backends import Arrays, Backend
from parity_tests.strategies import Case
from parity_tests.tolerances import Reference, baseline_attention, round_to, score_slack

Property = Callable[[Backend, Case], None]
NEAR_TIES = "near-ties"  # the user property under which a test reports decisions that it did not compare
EXAMPLES = "examples"  # the user property that counts the examples of a test


def attention_references(case: Case, mask: np.ndarray, score_dtype: str) -> tuple[Reference, Reference]:
    """References of out and lse; `mask` broadcasts to `[B, HQ, L, S]`, `score_dtype` is what scores are rounded to."""
    (q, k, v), scale = case.tensors(), case.score_scale
    (out, lse), (squares, _) = (spec.masked_attention(q, k, x, mask, scale) for x in (v, np.square(v, dtype=float)))
    deviation = float(np.sqrt(np.maximum(squares - out**2, 0.0)).max())
    baseline = baseline_attention(q, k, v, mask, scale, case.dtype, score_dtype)
    slack = score_slack(q, k, scale, score_dtype)
    return Reference(out, baseline[0], case.dtype, slack * deviation), Reference(lse, baseline[1], "float32", slack)


@lru_cache(maxsize=8)
def _references(case: Case, score_dtype: str) -> tuple[Reference, Reference]:
    return attention_references(case, case.mask(), score_dtype)


def _score_dtype(backend: Backend, case: Case) -> str:
    return case.dtype if backend.rounds_scores else "float32"


def attend_within_budget(
    backend: Backend, case: Case, call: Arrays, part: Any = ..., mask: np.ndarray | None = None
) -> None:
    """Attend over the arrays of `call`: the result must be this part of the whole case's, within the budget.

    Args:
        part: Index into `[B, HQ, L, ...]`.
        mask: What the queries see, if not `case.mask()`.
    """
    scores = _score_dtype(backend, case)
    references = _references(case, scores) if mask is None else attention_references(case, mask, scores)
    for what, actual, reference in zip(("out", "lse"), backend.attend(call, case), references, strict=True):
        if actual is not None:
            reference.check(what, actual, part)


def assert_same(backend: Backend, case: Case, calls: tuple[Arrays, Arrays], part: Any = ...) -> None:
    """Two calls of a case's shapes must give the same output in `part`, bit for bit where the backend can."""
    before, after = (backend.attend(call, case)[0][part] for call in calls)
    if backend.same_bits:
        np.testing.assert_array_equal(after, before)
        return
    difference, budget = np.abs(after - before).max(), _references(case, _score_dtype(backend, case))[0].budget
    if not difference <= budget:
        raise AssertionError(f"outputs that must be the same differ by {difference:.3g}, over the budget {budget:.3g}.")


def within_budget(backend: Backend, case: Case) -> None:
    """Output and lse keep within the error budget against the float64 oracle."""
    attend_within_budget(backend, case, case.tensors())


def repeats_are_equal(backend: Backend, case: Case) -> None:
    """A call repeated gives the same."""
    assert_same(backend, case, (case.tensors(), case.tensors()))


def _disturbed(x: np.ndarray, tokens: np.ndarray, case: Case) -> np.ndarray:
    """`x` with other, larger values at `tokens`, bool over its token axis."""
    noise = round_to(np.random.default_rng(case.seed + 1).standard_normal(x.shape) * 20, case.dtype)
    return np.where(tokens[:, None], noise, x)


def _some_row(case: Case) -> int:
    return case.seed % case.q_tokens


def future_tokens_do_not_matter(backend: Backend, case: Case) -> None:
    """Rows up to some query stay the same when every later token changes."""
    row = _some_row(case)
    q, k, v = case.tensors()
    later_q = np.arange(case.q_tokens) > row
    later_k = np.arange(case.kv_tokens) > case.kv_tokens - case.q_tokens + row
    changed = _disturbed(q, later_q, case), _disturbed(k, later_k, case), _disturbed(v, later_k, case)
    assert_same(backend, case, ((q, k, v), changed), np.s_[:, :, : row + 1])


def hidden_keys_do_not_matter(backend: Backend, case: Case) -> None:
    """A row stays the same when every key and value that it does not see changes."""
    row = _some_row(case)
    q, k, v = case.tensors()
    hidden = ~case.mask()[row]
    changed = q, _disturbed(k, hidden, case), _disturbed(v, hidden, case)
    assert_same(backend, case, ((q, k, v), changed), np.s_[:, :, row])


def _rows(qkv: Arrays, case: Case, start: int, stop: int) -> Arrays:
    """The call of the query rows [start, stop) alone, with the keys up to its last query."""
    q, k, v = qkv
    kv_stop = case.kv_tokens - case.q_tokens + stop
    return q[:, :, start:stop], k[:, :, :kv_stop], v[:, :, :kv_stop]


def chunked_equals_whole(backend: Backend, case: Case) -> None:
    """Prefill in two chunks is prefill at once."""
    cut = 1 + case.seed % case.q_tokens
    qkv = case.tensors()
    for start, stop in ((0, cut), (cut, case.q_tokens)):
        if start < stop:
            attend_within_budget(backend, case, _rows(qkv, case, start, stop), np.s_[:, :, start:stop])


def decode_equals_last_row(backend: Backend, case: Case) -> None:
    """A call with the last query alone gives the last row of the whole call."""
    last = case.q_tokens - 1
    part = _rows(case.tensors(), case, last, last + 1)
    attend_within_budget(backend, case, part, np.s_[:, :, last:])


def batch_rows_are_independent(backend: Backend, case: Case) -> None:
    """A sample stays the same when the others change, and keeps within the budget when it is alone."""
    sample = case.seed % case.batch
    qkv = case.tensors()
    others = (np.arange(case.batch) != sample)[:, None, None, None]
    noise = [round_to(np.random.default_rng(case.seed + 1).standard_normal(x.shape) * 20, case.dtype) for x in qkv]
    changed = tuple(np.where(others, n, x) for n, x in zip(noise, qkv, strict=True))
    assert_same(backend, case, (qkv, changed), np.s_[sample])
    alone = tuple(x[sample : sample + 1] for x in qkv)
    attend_within_budget(backend, case, alone, part=np.s_[sample : sample + 1])


def gqa_equals_repeated_heads(backend: Backend, case: Case) -> None:
    """Grouped heads give what repeated keys and values give."""
    q, k, v = case.tensors()
    repeated = q, np.repeat(k, case.group, axis=1), np.repeat(v, case.group, axis=1)
    attend_within_budget(backend, case, repeated)


def every_output_is_written(backend: Backend, case: Case) -> None:
    """Within the budget again where fresh memory is full of NaN, so that an element that nothing wrote shows."""
    with (backend.nan_fill or contextlib.nullcontext)():
        attend_within_budget(backend, case, case.tensors())


PROPERTIES: dict[str, Property] = {
    check.__name__: check
    for check in (
        within_budget,
        repeats_are_equal,
        future_tokens_do_not_matter,
        hidden_keys_do_not_matter,
        chunked_equals_whole,
        decode_equals_last_row,
        batch_rows_are_independent,
        gqa_equals_repeated_heads,
        every_output_is_written,
    )
}


@dataclass
class Decisions:
    """Decisions that a property compared, those too close to compare, in words, and the examples they come from."""

    count: int = 0
    ties: list[str] = field(default_factory=list)
    examples: int = 0

    def report(self, record_property: Callable[[str, object], None]) -> None:
        """Hand examples and near-ties to pytest's fixture `record_property`; the run's summary lists near-ties."""
        record_property(EXAMPLES, self.examples)
        if self.ties:
            examples = ", ".join(sorted(set(self.ties))[:3])
            record_property(NEAR_TIES, f"{len(self.ties)} of {self.count} ({examples})")


def for_all(backend: Backend, strategy: SearchStrategy, check: Callable[[Backend, Any], Decisions | None]) -> Decisions:
    """Run `check(backend, example)` over the backend's share of the profile's examples, at least three.

    Returns:
        The decisions of all examples together.
    """
    examples = max(3, int(settings().max_examples * backend.share))
    everything = Decisions()

    def run(example: Any) -> None:
        decisions = check(backend, example) or Decisions()
        everything.count += decisions.count
        everything.ties += decisions.ties
        everything.examples += 1

    run.__name__ = run.__qualname__ = f"{check.__name__}_{backend.name}"  # names the examples' seed and database key
    settings(max_examples=examples)(given(example=strategy)(run))()
    return everything
