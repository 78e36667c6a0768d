"""The router on every backend: pools and logits within budget, decisions equal, near-ties reported."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import strategies as st

from flux_mlx import spec
from flux_mlx.spec import Route, RouterConfig
from parity_tests.backends import NUMPY, Backend
from parity_tests.properties import Decisions, for_all
from parity_tests.tolerances import NEAR_TIE, Reference, network_reference, round_to


@dataclass(frozen=True)
class RouterCase:
    """Queries `[B, L, HQ, D]` of one layer and a random router."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    pool_tokens: int
    dtype: str
    seed: int

    def queries(self) -> np.ndarray:
        """float32 values that `dtype` has, of another mean in every channel."""
        rng = np.random.default_rng(self.seed)
        shape = self.batch, self.tokens, self.heads, self.head_dim
        return round_to(rng.standard_normal(shape) + rng.standard_normal(self.head_dim), self.dtype)

    def weights(self) -> dict[str, np.ndarray]:
        """Parameters of the size that training reaches."""
        rng = np.random.default_rng(self.seed + 1)
        shapes = RouterConfig.parameter_shapes(self.head_dim)
        return {
            name: np.float32(1.5 * shape[-1] ** -0.5 * rng.standard_normal(shape)) for name, shape in shapes.items()
        }


@st.composite
def router_cases(draw: st.DrawFn, backend: Backend) -> RouterCase:
    pool = draw(st.sampled_from([1, 3, 10, 100]))
    ends = [n for n in (1, pool - 1, pool, pool + 1, 2 * pool - 1, 2 * pool, 2 * pool + 1) if n > 0]
    return RouterCase(
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.sampled_from(ends) | st.integers(1, 3 * pool)),
        heads=draw(st.sampled_from([1, 4, 9])),
        head_dim=draw(st.sampled_from(backend.head_dims)),
        pool_tokens=pool,
        dtype=draw(st.sampled_from(backend.dtypes)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def pool_within_budget(backend: Backend, case: RouterCase) -> None:
    """Pooled queries keep within the error budget."""
    queries = case.queries()
    oracle = spec.pool_queries(queries, case.pool_tokens)
    baseline = NUMPY.router.pool_queries(queries, case.dtype, case.pool_tokens)
    actual = backend.router.pool_queries(queries, case.dtype, case.pool_tokens)
    Reference(oracle, baseline, "float32").check("pooled queries", actual)


def logits_within_budget(backend: Backend, case: RouterCase) -> None:
    """Route logits of the same pooled queries keep within the error budget."""
    weights, pooled = case.weights(), np.float32(spec.pool_queries(case.queries(), case.pool_tokens))
    oracle, baseline = spec.route_logits(weights, pooled), NUMPY.router.route_logits(weights, pooled)
    network_reference(oracle, baseline).check("route logits", backend.router.route_logits(weights, pooled))


def decisions_are_the_oracle_s(backend: Backend, case: RouterCase) -> Decisions:
    """From queries to routes: the oracle's, but for margins below `NEAR_TIE`, which are reported."""
    queries, weights = case.queries(), case.weights()
    oracle = spec.route_logits(weights, spec.pool_queries(queries, case.pool_tokens))
    pooled = backend.router.pool_queries(queries, case.dtype, case.pool_tokens)
    actual = backend.router.decide(backend.router.route_logits(weights, pooled))
    margins = oracle[:, 1] - oracle[:, 0]
    for margin, got, expected in zip(margins, actual, spec.decide(oracle), strict=True):
        assert got == expected or abs(margin) < NEAR_TIE, f"margin {margin:.3g}: expected {expected!r}, got {got!r}"
    return Decisions(len(margins), [f"margin {margin:.1e}" for margin in margins if abs(margin) < NEAR_TIE])


def tokens_between_the_ends_do_not_matter(backend: Backend, case: RouterCase) -> None:
    """Only the first and the last P tokens are pooled: the rest keeps every bit of the result."""
    queries = case.queries()
    changed = queries.copy()
    changed[:, case.pool_tokens : max(case.pool_tokens, case.tokens - case.pool_tokens)] = 99.0
    pools = [backend.router.pool_queries(x, case.dtype, case.pool_tokens) for x in (queries, changed)]
    np.testing.assert_array_equal(*pools)


def padding_does_not_matter(backend: Backend, case: RouterCase) -> None:
    """Right-padded rows pool as each row alone."""
    if backend.router.pool_rows is None:
        return
    queries = case.queries()
    lengths = [1 + (case.seed + 7 * b) % case.tokens for b in range(case.batch)]
    inside = np.arange(case.tokens) < np.array(lengths)[:, None]
    padded = np.where(inside[:, :, None, None], queries, 99.0)
    actual = backend.router.pool_rows(padded, case.dtype, case.pool_tokens, lengths)
    oracle = [spec.pool_queries(queries[b : b + 1, :n], case.pool_tokens) for b, n in enumerate(lengths)]
    baseline = NUMPY.router.pool_rows(queries, case.dtype, case.pool_tokens, lengths)
    Reference(np.concatenate(oracle), baseline, "float32").check("pooled rows", actual)


def ties_are_sparse(backend: Backend, case: RouterCase) -> None:
    """FULL needs the larger logit, by one ulp at least."""
    low, high = np.float32(case.seed % 7), np.nextafter(np.float32(case.seed % 7), np.float32(9))
    decisions = backend.router.decide(np.array([[low, low], [low, high], [high, low], [high, high]]))
    assert decisions == [Route.SPARSE, Route.FULL, Route.SPARSE, Route.SPARSE]


def not_numbers_are_full(backend: Backend, case: RouterCase) -> None:
    """Logits that are not numbers never leave keys out."""
    nan, some = np.float32(np.nan), np.float32(case.seed % 7)
    assert backend.router.decide(np.array([[nan, some], [some, nan], [nan, nan]])) == [Route.FULL] * 3


ROUTER_PROPERTIES = {
    check.__name__: check
    for check in (
        pool_within_budget,
        logits_within_budget,
        decisions_are_the_oracle_s,
        tokens_between_the_ends_do_not_matter,
        padding_does_not_matter,
        ties_are_sparse,
        not_numbers_are_full,
    )
}


@pytest.mark.parametrize("name", ROUTER_PROPERTIES)
def test_router_property(backend, name, record_property):
    if backend.router is None:
        pytest.skip(f"backend {backend.name} has no router of its own")
    for_all(backend, router_cases(backend), ROUTER_PROPERTIES[name]).report(record_property)
