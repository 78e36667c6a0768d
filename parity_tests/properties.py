"""What attention must satisfy, as functions of (backend, case). The suite runs them; the mutation list names them.

Where two calls have the same shapes the results must agree bit for bit; elsewhere the error budget decides.
"""

from __future__ import annotations

from collections.abc import Callable
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


@lru_cache(maxsize=8)
def references(case: Case, score_dtype: str) -> tuple[Arrays, Reference, Reference]:
    """(inputs, reference of out, reference of lse) of a case; `score_dtype` as in `Backend`."""
    q, k, v = case.tensors()
    mask, scale = case.mask(), case.score_scale
    (out, lse), (squares, _) = (spec.masked_attention(q, k, x, mask, scale) for x in (v, np.square(v, dtype=float)))
    deviation = float(np.sqrt(np.maximum(squares - out**2, 0.0)).max())
    baseline = baseline_attention(q, k, v, mask, scale, case.dtype, score_dtype)
    slack = score_slack(q, k, scale, score_dtype)
    return (
        (q, k, v),
        Reference(out, baseline[0], case.dtype, slack * deviation),
        Reference(lse, baseline[1], "float32", slack),
    )


def attend_within_budget(backend: Backend, case: Case, call: Arrays, part: Any = ...) -> None:
    """Attend over the arrays of `call`: the result must be this part of the whole case's, within the budget."""
    score_dtype = case.dtype if backend.rounds_scores else "float32"
    _, out, lse = references(case, score_dtype)
    actual = backend.attend(call, case)
    out.check("out", actual[0], part)
    if actual[1] is not None:
        lse.check("lse", actual[1], part)


def same_bits(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Fail unless two results are equal bit for bit."""
    np.testing.assert_array_equal(actual, expected, err_msg=what)


def within_budget(backend: Backend, case: Case) -> None:
    """Output and lse keep within the error budget against the float64 oracle."""
    attend_within_budget(backend, case, case.tensors())


def repeats_are_equal(backend: Backend, case: Case) -> None:
    """The same call gives the same bits."""
    qkv = case.tensors()
    same_bits("second call", backend.attend(qkv, case)[0], backend.attend(qkv, case)[0])


def _disturbed(x: np.ndarray, tokens: np.ndarray, case: Case) -> np.ndarray:
    """`x` with other, larger values at `tokens`, bool over its token axis."""
    noise = round_to(np.random.default_rng(case.seed + 1).standard_normal(x.shape) * 20, case.dtype)
    return np.where(tokens[:, None], noise, x)


def _some_row(case: Case) -> int:
    return case.seed % case.q_tokens


def future_tokens_do_not_matter(backend: Backend, case: Case) -> None:
    """Rows up to some query keep their bits when every later token changes."""
    row = _some_row(case)
    q, k, v = case.tensors()
    later_q = np.arange(case.q_tokens) > row
    later_k = np.arange(case.kv_tokens) > case.kv_tokens - case.q_tokens + row
    changed = _disturbed(q, later_q, case), _disturbed(k, later_k, case), _disturbed(v, later_k, case)
    before, after = backend.attend((q, k, v), case)[0], backend.attend(changed, case)[0]
    same_bits("earlier rows", after[:, :, : row + 1], before[:, :, : row + 1])


def hidden_keys_do_not_matter(backend: Backend, case: Case) -> None:
    """A row keeps its bits when every key and value that it does not see changes."""
    row = _some_row(case)
    q, k, v = case.tensors()
    hidden = ~case.mask()[row]
    before = backend.attend((q, k, v), case)[0]
    after = backend.attend((q, _disturbed(k, hidden, case), _disturbed(v, hidden, case)), case)[0]
    same_bits(f"row {row}", after[:, :, row], before[:, :, row])


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
    """A sample keeps its bits when the others change, and keeps within the budget when it is alone."""
    sample = case.seed % case.batch
    qkv = case.tensors()
    others = (np.arange(case.batch) != sample)[:, None, None, None]
    noise = [round_to(np.random.default_rng(case.seed + 1).standard_normal(x.shape) * 20, case.dtype) for x in qkv]
    changed = tuple(np.where(others, n, x) for n, x in zip(noise, qkv, strict=True))
    before, after = backend.attend(qkv, case)[0], backend.attend(changed, case)[0]
    same_bits(f"sample {sample}", after[sample], before[sample])
    alone = tuple(x[sample : sample + 1] for x in qkv)
    attend_within_budget(backend, case, alone, part=np.s_[sample : sample + 1])


def gqa_equals_repeated_heads(backend: Backend, case: Case) -> None:
    """Grouped heads give what repeated keys and values give."""
    q, k, v = case.tensors()
    repeated = q, np.repeat(k, case.group, axis=1), np.repeat(v, case.group, axis=1)
    attend_within_budget(backend, case, repeated)


def every_output_is_written(backend: Backend, case: Case) -> None:
    """With fresh memory full of NaN, no NaN comes out."""
    if backend.nan_fill is None:
        return
    with backend.nan_fill():
        out, lse = backend.attend(case.tensors(), case)
    assert not np.isnan(out).any(), "out has elements that nothing wrote"
    assert lse is None or not np.isnan(lse).any(), "lse has elements that nothing wrote"


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


def for_all(backend: Backend, strategy: SearchStrategy, check: Callable[[Backend, object], None]) -> None:
    """Run `check(backend, example)` over the backend's share of the profile's examples, at least three."""
    examples = max(3, int(settings().max_examples * backend.share))

    def run(example: object) -> None:
        check(backend, example)

    run.__name__ = run.__qualname__ = f"{check.__name__}_{backend.name}"  # names the examples' seed and database key
    settings(max_examples=examples)(given(example=strategy)(run))()
