"""XAttention on every backend: block mass within budget, the same blocks chosen, attention inside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st

from flux_mlx import spec
from flux_mlx.spec import PatternConfig
from parity_tests.backends import NUMPY, Backend
from parity_tests.properties import Decisions, attend_within_budget, for_all
from parity_tests.strategies import Case
from parity_tests.tolerances import NEAR_TIE, Reference, score_slack


@st.composite
def block_cases(draw: st.DrawFn, backend: Backend) -> Case:
    """Exact prefill under xattention, with any offset; every row's keys differ in size, so that choices differ."""
    stride = draw(st.sampled_from(backend.strides))
    block = stride * draw(st.sampled_from([1, 2, 4]))
    kv_tokens = draw(st.integers(1, min(150, 7 * block + 5)))
    return Case(
        batch=draw(st.integers(1, 1 if backend.is_slow else 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2] if backend.is_slow else [1, 2, 3])),
        q_tokens=draw(st.just(kv_tokens) | st.integers(1, kv_tokens)),
        kv_tokens=kv_tokens,
        head_dim=draw(st.sampled_from(backend.head_dims)),
        pattern=PatternConfig(
            name="xattention",
            block_size=block,
            stride=stride,
            sink_tokens=block,
            window_tokens=2 * block,
            threshold=draw(st.sampled_from([0.3, 0.7, 0.9])),
            top_k_blocks=draw(st.none() | st.integers(1, 5)),
        ),
        prompt_tokens=kv_tokens + draw(st.integers(0, 1)),
        dtype=draw(st.sampled_from(backend.dtypes)),
        values="uneven keys",
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def oracle_mass(case: Case) -> np.ndarray:
    q, k, _ = case.tensors()
    return spec.block_mass(q, k, case.pattern.block_size, case.pattern.stride)


def choice_margin(mass: np.ndarray, first: int, pattern: PatternConfig) -> np.ndarray:
    """How far each row of `mass` is from another choice, `[..., M]`: relative to the row's total.

    The smaller of two distances: between the masses of the last block kept and the first one dropped, and between the
    threshold and the kept mass with and without the last block.
    """
    kept = spec.choose_blocks(mass, first, pattern.threshold, pattern.top_k_blocks)
    n, m = np.arange(mass.shape[-1]), first + np.arange(mass.shape[-2])[:, None]
    free = (n > 0) & (n < m)
    smallest_kept = np.where(kept & free, mass, np.inf).min(-1)
    largest_dropped = np.where(~kept & free, mass, -np.inf).max(-1)
    total = mass.sum(-1)
    gap = smallest_kept - largest_dropped  # infinite where there is no choice
    if pattern.top_k_blocks is not None:
        return gap / total
    kept_mass = np.where(kept, mass, 0.0).sum(-1)
    wanted = pattern.threshold * total
    with_last = np.where(np.isfinite(largest_dropped), np.abs(kept_mass - wanted), np.inf)
    without_last = np.where(np.isfinite(smallest_kept), np.abs(kept_mass - smallest_kept - wanted), np.inf)
    return np.minimum(gap, np.minimum(with_last, without_last)) / total


def mass_within_budget(backend: Backend, case: Case) -> None:
    """Block mass keeps within the error budget."""
    q, k, _ = case.tensors()
    oracle = oracle_mass(case)
    baseline = NUMPY.blocks.block_mass(q, k, case.dtype, case.pattern)
    slack = score_slack(q, k, case.head_dim**-0.5, "float32") * oracle.max()
    actual = backend.blocks.block_mass(q, k, case.dtype, case.pattern)
    Reference(oracle, baseline, "float32", slack).check("block mass", actual)


def choices_are_the_oracle_s(backend: Backend, case: Case) -> Decisions:
    """From queries and keys to blocks: the oracle's, but for rows closer than `NEAR_TIE`, which are reported."""
    q, k, _ = case.tensors()
    mass, first = oracle_mass(case), (case.kv_tokens - case.q_tokens) // case.pattern.block_size
    expected = spec.choose_blocks(mass, first, case.pattern.threshold, case.pattern.top_k_blocks)
    actual = backend.blocks.select_blocks(q, k, case.dtype, case.pattern)
    margins = choice_margin(mass, first, case.pattern)
    wrong = (actual != expected).any(-1) & (margins >= NEAR_TIE)
    assert not wrong.any(), f"rows {np.argwhere(wrong).tolist()} chose other blocks, margins {margins[wrong]}"
    return Decisions(margins.size, [f"margin {margin:.1e}" for margin in margins[margins < NEAR_TIE]])


def choices_of_exact_masses_are_equal(backend: Backend, case: Case) -> None:
    """Masses that are small multiples of 1/64 leave no room for rounding: ties included, the choice is exact."""
    rng = np.random.default_rng(case.seed)
    n = -(-case.kv_tokens // case.pattern.block_size)
    first = (case.kv_tokens - case.q_tokens) // case.pattern.block_size
    mass = rng.integers(0, 5, (2, 3, n - first, n)) / 64
    mass = np.where(np.arange(n) <= first + np.arange(n - first)[:, None], mass, 0.0)
    pattern = replace(case.pattern, threshold=rng.choice([0.25, 0.5, 0.75, 1.0]))
    expected = spec.choose_blocks(mass, first, pattern.threshold, pattern.top_k_blocks)
    np.testing.assert_array_equal(backend.blocks.choose_blocks(np.float32(mass), first, pattern), expected)


def attention_inside_the_chosen_blocks(backend: Backend, case: Case) -> None:
    """Prefill under xattention keeps within the error budget of attention inside the backend's own blocks."""
    q, k, _ = case.tensors()
    kept = (backend.blocks or NUMPY.blocks).select_blocks(q, k, case.dtype, case.pattern)
    mask = spec.expand_blocks(kept, case.pattern.block_size, case.q_tokens, case.kv_tokens)
    attend_within_budget(backend, case, case.tensors(), mask=mask)


BLOCK_PROPERTIES = {
    check.__name__: check
    for check in (
        mass_within_budget,
        choices_are_the_oracle_s,
        choices_of_exact_masses_are_equal,
        attention_inside_the_chosen_blocks,
    )
}


@pytest.mark.parametrize("name", BLOCK_PROPERTIES)
def test_xattention_property(backend, name, record_property):
    if backend.blocks is None:
        pytest.skip(f"backend {backend.name} chooses no blocks of its own")
    drawn = block_cases(backend).filter(backend.supports)
    for_all(backend, drawn, BLOCK_PROPERTIES[name]).report(record_property)
