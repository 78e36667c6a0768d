"""The suite's own tools: rounding, budgets, NaN-filled memory, examples, and backends that are absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.backends import NUMPY
from parity_tests.frameworks import torch_nan_fill
from parity_tests.properties import EXAMPLES, NEAR_TIES, Decisions, for_all
from parity_tests.strategies import Case, cases
from parity_tests.tolerances import DTYPES, NEAR_TIE, Reference, baseline_attention, round_to, ulp

ROOT = Path(__file__).parent.parent


@given(x=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=8), dtype=st.sampled_from(DTYPES))
def test_rounding_is_torch_s(x, dtype):
    x = np.clip(np.float32(x), -6e4, 6e4) if dtype == "float16" else np.float32(x)
    expected = torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(round_to(x, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, 1.99, 2.0, 300.0])
def test_ulp_is_the_step_to_the_next_value(dtype, value):
    step = ulp(np.array([value, -0.5, np.inf]), dtype)
    low = float(round_to(np.float32(value), dtype))
    assert round_to(np.float32(low + step), dtype) > low
    assert round_to(np.float32(low + 0.4 * step), dtype) == low


ORACLE = np.array([[1.0, -1.5], [0.25, 0.5]])


@pytest.mark.parametrize("ulps", [0.0, 1.9])
def test_reference_takes_two_ulps(ulps):
    Reference(ORACLE, np.float32(ORACLE), "float16").check("x", ORACLE + ulps * 2**-10)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (ORACLE + np.array([[0, 2.1 * 2**-10], [0, 0]]), r"x: error 0.00205 at \(0, 1\), over the budget 0.00195"),
        (np.where(ORACLE == 0.5, np.nan, ORACLE), r"x: error nan at \(1, 1\), over the budget"),
        (ORACLE[:1], r"x: expected shape \(2, 2\), got \(1, 2\)"),
    ],
)
def test_reference_refuses(candidate, message):
    with pytest.raises(AssertionError, match=message):
        Reference(ORACLE, np.float32(ORACLE), "float16").check("x", candidate)


def test_reference_refuses_many_small_errors():
    """Below the largest error of a bad baseline everywhere, and still too much on average."""
    oracle = np.ones(1000)
    baseline = np.float32(oracle)
    baseline[0] += 0.1
    with pytest.raises(AssertionError, match=r"RMS error 0\.02"):
        Reference(oracle, baseline, "float16").check("x", oracle + 0.02)


def test_reference_compares_a_part_with_the_budget_of_the_whole():
    baseline = np.float32(ORACLE)
    baseline[0, 0] += 0.01
    Reference(ORACLE, baseline, "float32").check("x", ORACLE[1] + 0.009, np.s_[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_baseline_is_near_the_oracle_and_rounded(dtype):
    q, k, v = Case(dtype=dtype).tensors()
    mask = Case().mask()
    out, _ = baseline_attention(q, k, v, mask, 0.125, dtype)
    np.testing.assert_array_equal(round_to(out, dtype), out)
    exact, _ = baseline_attention(q, k, v, mask, 0.125, "float32")
    assert 0 < np.abs(out - exact).max() < 0.03 or dtype == "float32"


def test_fresh_torch_memory_is_nan_filled():
    with torch_nan_fill():
        assert torch.empty(7).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_examples_are_counted_and_near_ties_kept():
    seen = []

    def check(backend, case):
        seen.append(case)
        return Decisions(2, ["margin 1e-5"] if len(seen) == 1 else [])

    decisions = for_all(NUMPY, cases(NUMPY), check)
    assert decisions.count == 2 * len(seen) >= 6
    noted = []
    decisions.report(lambda name, value: noted.append((name, value)))
    assert noted == [(EXAMPLES, len(seen)), (NEAR_TIES, f"1 of {decisions.count} (margin 1e-5)")]
    Decisions(5).report(lambda name, value: noted.append((name, value)))
    assert noted[2:] == [(EXAMPLES, 0)]
    assert 0 < NEAR_TIE < 1e-3


@given(case=cases(NUMPY))
def test_drawn_cases_are_calls_of_different_sizes(case):
    q, k, v = case.tensors()
    assert q.shape == (case.batch, case.kv_heads * case.group, case.q_tokens, case.head_dim)
    assert k.shape == v.shape == (case.batch, case.kv_heads, case.kv_tokens, case.head_dim)
    assert case.mask().shape == (case.q_tokens, case.kv_tokens)
    assert case.mask().any(-1).all()
    assert case.batch == 1 or case.batch not in (case.q_heads, case.q_tokens, case.kv_tokens)
    for x in (q, k, v):
        np.testing.assert_array_equal(round_to(x, case.dtype), x)


def run_suite(*options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "-p",
        "no:cacheprovider",
        "parity_tests/test_xattention_parity.py",
    ]
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_an_absent_backend_fails_if_required_and_is_skipped_aloud_if_not():
    absent = {"TRITON_INTERPRET": "0"}  # on a CPU the Triton kernels cannot run without their interpreter
    chosen = ("-k", "triton and choices")
    required = run_suite(*chosen, **absent)
    assert required.returncode == 1
    assert "backend triton is required: on a CPU Triton needs TRITON_INTERPRET=1" in required.stdout
    allowed = run_suite(*chosen, "--require-backends=numpy", **absent)
    assert allowed.returncode == 0
    assert "backend triton: on a CPU Triton needs TRITON_INTERPRET=1" in allowed.stdout


def test_an_unknown_backend_is_refused():
    result = run_suite("--require-backends=numpy,tritn")
    assert result.returncode == 4
    assert "got ['tritn']" in result.stderr


def test_a_journal_lets_a_run_go_on_where_it_ended(tmp_path):
    """The second run passes over what passed; a line that was cut short counts for nothing."""
    journal = tmp_path / "journal.jsonl"
    arguments = ["parity_tests/test_router_parity.py", "-k", "numpy and (ties or not_numbers)", f"--journal={journal}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    runs = []
    for _ in range(2):
        runs.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout)
        lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
        journal.write_text(lines[0] + lines[1][:20], encoding="utf-8")
    assert "2 passed" in runs[0]
    assert "1 passed" in runs[1]
    assert json.loads(lines[0])["examples"] == 30
