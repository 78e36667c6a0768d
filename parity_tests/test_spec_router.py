"""The router by hand: pooling token by token, the network neuron by neuron, the decision at and around a tie."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_mlx.spec import Route, RouterConfig, decide, init_weights, p_full, pool_queries, route_logits


@given(tokens=st.integers(1, 9), pool=st.integers(1, 7), seed=st.integers(0, 999))
def test_pool_counts_an_overlap_twice(tokens, pool, seed):
    x = np.random.default_rng(seed).standard_normal((2, tokens, 3, 4))
    picked = [*range(min(pool, tokens)), *range(max(0, tokens - pool), tokens)]
    for b in range(2):
        total = sum(x[b, t, h] for t in picked for h in range(3))
        np.testing.assert_allclose(pool_queries(x, pool)[b], total / (3 * len(picked)), rtol=1e-13, atol=1e-14)


def loop_logits(weights, pooled):
    """One sample through the network in Python floats."""

    def linear(name, x):
        rows = zip(weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
        return [math.fsum(float(w) * v for w, v in zip(row, x, strict=True)) + float(bias) for row, bias in rows]

    def silu(x):
        return [v / (1.0 + math.exp(-v)) for v in x]

    x = linear("encoder.2", silu(linear("encoder.0", list(pooled))))
    return linear("head.4", silu(linear("head.2", silu(linear("head.0", x)))))


def random_weights(head_dim, rng):
    shapes = RouterConfig.parameter_shapes(head_dim)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@given(seed=st.integers(0, 999))
def test_logits_neuron_by_neuron(seed):
    rng = np.random.default_rng(seed)
    weights, pooled = random_weights(3, rng), rng.standard_normal((2, 3))
    expected = [loop_logits(weights, row) for row in pooled]
    np.testing.assert_allclose(route_logits(weights, pooled), expected, rtol=1e-11, atol=1e-12)


def test_large_inputs_do_not_overflow():
    weights = random_weights(3, np.random.default_rng(0))
    with np.errstate(over="raise"):
        assert np.isfinite(route_logits(weights, np.full((1, 3), 1e4))).all()


def test_sizes():
    shapes = RouterConfig.parameter_shapes(128)
    assert sum(math.prod(shape) for shape in shapes.values()) == 592_002
    assert shapes["encoder.0.weight"] == (1024, 128)
    assert shapes["head.4.bias"] == (2,)
    assert len(shapes) == 10


def test_full_needs_the_larger_logit():
    assert decide(np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])) == [Route.FULL, Route.SPARSE, Route.SPARSE]


def test_probability_of_full():
    np.testing.assert_allclose(p_full(np.array([[0.0, math.log(3)], [5.0, 5.0]])), [0.75, 0.5])


@pytest.mark.parametrize(("bias", "route"), [(4.5, Route.FULL), (-1.0, Route.SPARSE)])
def test_fresh_router_decides_by_its_bias_alone(bias, route):
    weights = init_weights(8, RouterConfig(init_bias=bias), np.random.default_rng(3))
    assert {name: w.shape for name, w in weights.items()} == RouterConfig.parameter_shapes(8)
    logits = route_logits(weights, np.random.default_rng(4).standard_normal((3, 8)))
    np.testing.assert_allclose(logits, [[0.0, bias]] * 3)
    assert decide(logits) == [route] * 3
    assert 0.3 < np.abs(weights["encoder.0.weight"]).max() <= 8**-0.5
