"""Every Metal kernel on the host shim, over a grid of shapes, dtypes, patterns and schedules, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, product

import mlx.core as mx
import numpy as np
import pytest

from flux_mlx import kernels, spec
from flux_mlx.spec import PatternConfig, Route
from metal_kernels import operations
from metal_kernels.catalog import DTYPES, HEAD_DIMS, KERNELS
from metal_kernels.operations import Run
from parity_tests.backends import Arrays, Backend, float32_mass
from parity_tests.host_shim.backend import metal_backend
from parity_tests.host_shim.run import SCHEDULES, HostRun, View
from parity_tests.properties import attend_within_budget, within_budget
from parity_tests.strategies import Case
from parity_tests.tolerances import Reference, round_to

FINE = PatternConfig(block_size=7, sink_tokens=3, window_tokens=20)
COARSE = PatternConfig(block_size=16, sink_tokens=16, window_tokens=32)
WIDE = PatternConfig(block_size=48, sink_tokens=40, window_tokens=90)
TRIANGLE = PatternConfig(name="triangle", block_size=8, sink_tokens=8, window_tokens=16, last_tokens=11)
PATTERNS = {"full": None, "fine": FINE, "coarse": COARSE, "wide": WIDE, "triangle": TRIANGLE}

# batch, kv_heads, group, q_tokens, kv_tokens
PREFILLS = ((1, 1, 1, 9, 9), (2, 1, 3, 33, 34), (1, 2, 2, 64, 65), (1, 1, 2, 40, 139), (1, 2, 1, 11, 96))
DECODES = ((1, 1, 1, 1, 1), (2, 3, 1, 1, 50), (1, 2, 2, 1, 131), (1, 1, 3, 5, 97), (2, 2, 4, 8, 64))

_number = count()


def grid() -> dict[str, Case]:
    """Cases by name. Each draws its tensors from its own seed."""
    cases = {}
    axes = [*product(HEAD_DIMS[:4], DTYPES, PATTERNS, PREFILLS), *product((256,), DTYPES, PATTERNS, PREFILLS[1:2])]
    axes += product(HEAD_DIMS, DTYPES, ("full", "fine", "coarse"), DECODES)
    for head_dim, dtype, name, (batch, kv_heads, group, q_tokens, kv_tokens) in axes:
        case = Case(batch, kv_heads, group, q_tokens, kv_tokens, head_dim, PATTERNS[name], dtype=dtype)
        prompt = kv_tokens if name == "triangle" else None
        case = replace(case, prompt_tokens=prompt, seed=next(_number))
        cases[f"{name}-{dtype}-{head_dim}-{batch}x{kv_heads}x{group}-{q_tokens}of{kv_tokens}"] = case
    return cases


GRID = grid()


def test_the_grid_is_large_enough():
    assert len(GRID) >= 480


@pytest.mark.parametrize("name", GRID)
def test_attention(name):
    case = GRID[name]
    within_budget(metal_backend(HostRun(SCHEDULES[case.seed % 4], seed=case.seed)), case)


def kernels_that_run(launcher: Run) -> set[str]:
    """Names of the kernels that `launcher` was given by calls of every public function; their results are checked."""
    ran = set()

    def run(launch, inputs):
        ran.add(launch.spec.name)
        return launcher(launch, inputs)

    q, k, v = (mx.array(x) for x in Case(1, 1, 2, 20, 40, 64, COARSE).tensors())
    few = q[:, :, :2]
    table = spec.block_table(16, spec.kept_blocks(COARSE, 20, 40)[None, None], 20, 40)
    weights = {name: mx.zeros(shape) for name, shape in spec.RouterConfig.parameter_shapes(64).items()}
    results = [
        kernels.full_attention(q, k, v, run=run),
        kernels.table_attention(q, k, v, table, run=run),
        kernels.sparse_attention(few, k, v, COARSE, run=run),
        kernels.sparse_attention(few, k, v, COARSE, splits=2, run=run),
        kernels.route_layer(q.swapaxes(1, 2), weights, 4, run=run),
        [kernels.block_mass(q, k, PatternConfig(name="xattention", block_size=16, stride=4), run=run)],
    ]
    assert all(not mx.isnan(x).any().item() for result in results for x in result)
    return ran


def test_every_kernel_of_the_catalog_runs_on_the_host():
    assert kernels_that_run(HostRun()) == set(KERNELS)


def by_table(case: Case, splits: tuple[int, int] = (1, 1)) -> Backend:
    """Streaming through a block table of leading axes `splits`."""

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = (mx.array(x).astype(getattr(mx, case.dtype)) for x in qkv)
        kept = spec.kept_blocks(case.pattern, q.shape[2], k.shape[2])
        kept = np.broadcast_to(kept, (*splits, *kept.shape))
        table = spec.block_table(case.pattern.block_size, kept, q.shape[2], k.shape[2])
        run = HostRun(SCHEDULES[case.seed % 4], seed=case.seed)
        out, lse = kernels.table_attention(q, k, v, table, run=run)
        return np.array(out.astype(mx.float32)), np.array(lse)

    return Backend("metal table", attend)


TABLES = {
    name: case for name, case in GRID.items() if name.startswith(("fine", "coarse", "wide")) and "1of" not in name
}


@pytest.mark.parametrize("name", [name for name, case in TABLES.items() if case.q_tokens > 8 and case.seed % 2])
def test_streaming_table_equals_streaming_rule(name):
    case = TABLES[name]
    heads = [(1, 1), (case.batch, 1), (1, case.q_heads), (case.batch, case.q_heads)][case.seed % 4]
    within_budget(by_table(case, heads), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_table_equals_dense(dtype):
    case = Case(1, 2, 2, 50, 91, 64, None, dtype=dtype, seed=5)
    q, k, v = (mx.array(x).astype(getattr(mx, dtype)) for x in case.tensors())
    table = spec.block_table(16, np.ones((1, 1, 4, 6), bool), 50, 91)
    out, lse = kernels.table_attention(q, k, v, table, run=HostRun())

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        return np.array(out.astype(mx.float32)), np.array(lse)

    within_budget(Backend("full table", attend), case)


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = (mx.array(x) for x in Case(1, 1, 2, 40, 40, 64, None).tensors())
    kept = np.ones((3, 3), bool)
    kept[1] = False
    table = spec.block_table(16, kept[None, None], 40, 40)
    out, lse = (np.array(x) for x in kernels.table_attention(q, k, v, table, run=HostRun()))
    assert not out[:, :, 16:32].any()
    assert np.isneginf(lse[:, :, 16:32]).all()
    assert np.isfinite(lse[:, :, :16]).all()


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float32"), (80, "bfloat16"), (128, "float16")])
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_of_a_decode_call(head_dim, dtype, splits):
    case = Case(2, 2, 3, 2, 117, head_dim, COARSE, dtype=dtype, seed=splits)
    rule = kernels.rule_of(COARSE, None)

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        arrays = [mx.array(x).astype(getattr(mx, dtype)) for x in qkv]
        run = HostRun(SCHEDULES[splits % 4])
        route = (int(Route.SPARSE),) * 2
        scale = case.score_scale
        out, lse = operations.attention(run, *arrays, dtype=dtype, route=route, rule=rule, scale=scale, splits=splits)
        return np.array(out.astype(mx.float32)), np.array(lse)

    within_budget(Backend("split decode", attend), case)


@pytest.mark.parametrize("q_tokens", [3, 30])
def test_route_is_read_row_by_row_from_a_buffer(q_tokens):
    case = Case(4, 1, 2, q_tokens, 90, 64, COARSE, seed=q_tokens)
    q, k, v = (mx.array(x) for x in case.tensors())
    route = mx.array([Route.SPARSE, Route.FULL, Route.UNSET, Route.SPARSE], mx.int32)
    routed = [np.array(x) for x in kernels.routed_attention(q, k, v, route, COARSE, run=HostRun())]
    sparse = [np.array(x) for x in kernels.sparse_attention(q, k, v, COARSE, run=HostRun())]
    full = [np.array(x) for x in kernels.full_attention(q, k, v, run=HostRun())]
    for r, s, f in zip(routed, sparse, full, strict=True):
        np.testing.assert_array_equal(r[[0, 3]], s[[0, 3]])
        np.testing.assert_array_equal(r[[1, 2]], f[[1, 2]])
        assert not np.array_equal(s[1], f[1])


def test_the_router_s_decision_routes_attention():
    """From queries to attention with the route in a buffer throughout, as a layer without a host synchronisation."""
    case = Case(6, 1, 2, 20, 90, 64, COARSE, seed=7)
    q, k, v = (mx.array(x) for x in case.tensors())
    rng = np.random.default_rng(7)
    shapes = spec.RouterConfig.parameter_shapes(64)
    weights = {name: mx.array(rng.uniform(-0.3, 0.3, shape).astype(np.float32)) for name, shape in shapes.items()}
    _, route = kernels.route_layer(q.swapaxes(1, 2), weights, 2, run=HostRun())
    routed = [np.array(x) for x in kernels.routed_attention(q, k, v, route, COARSE, run=HostRun())]
    by_hand = kernels.routed_attention(q, k, v, tuple(route.tolist()), COARSE, run=HostRun())
    assert route.tolist() == [Route.SPARSE, Route.FULL] * 3
    for actual, expected in zip(routed, by_hand, strict=True):
        np.testing.assert_array_equal(actual, np.array(expected))


def test_a_route_for_many_rows():
    case = Case(9, 1, 1, 2, 40, 64, FINE)
    q, k, v = (mx.array(x) for x in case.tensors())
    route = mx.array([Route.SPARSE] * 9, mx.int32)
    routed = kernels.routed_attention(q, k, v, route, FINE, run=HostRun())[0]
    np.testing.assert_array_equal(np.array(routed), np.array(kernels.sparse_attention(q, k, v, FINE, run=HostRun())[0]))


@pytest.mark.parametrize("route", [Route.FULL, Route.SPARSE])
def test_route_of_the_table_kernel(route):
    case = Case(1, 1, 2, 40, 70, 64, None, seed=3)
    q, k, v = (mx.array(x) for x in case.tensors())
    pattern = PatternConfig(name="xattention", block_size=8, stride=4, threshold=0.5)
    out, lse = kernels.routed_attention(q, k, v, (int(route),), pattern, prompt_tokens=70, run=HostRun())
    oracle = (
        spec.full_attention if route is Route.FULL else lambda *x: spec.sparse_attention(*x, pattern, prompt_tokens=70)
    )
    expected = oracle(*(np.array(x) for x in (q, k, v)))
    np.testing.assert_allclose(np.array(out), expected[0], atol=3e-6)
    np.testing.assert_allclose(np.array(lse), expected[1], atol=3e-6)


def cache_views(x: np.ndarray, dtype: str, padding: int) -> tuple[mx.array, View]:
    """The rows of `x` `[B, H, S, D]` inside a cache of S + `padding` tokens that holds NaN elsewhere."""
    batch, heads, tokens, head_dim = x.shape
    cache = np.full((batch, heads, tokens + padding, head_dim), np.nan, np.float32)
    cache[:, :, :tokens] = x
    buffer = mx.array(cache).astype(getattr(mx, dtype))
    row = head_dim * (tokens + padding)
    return buffer, View(buffer, x.shape, (heads * row, row, head_dim, 1))


@pytest.mark.parametrize("q_tokens", [1, 6, 45])
@pytest.mark.parametrize("pattern", [None, FINE], ids=["full", "fine"])
@pytest.mark.parametrize("how", ["whole buffer", "strided view"])
def test_cache_longer_than_its_keys_is_read_in_place(q_tokens, pattern, how):
    case = Case(2, 2, 2, q_tokens, 67, 64, pattern, dtype="float16", seed=q_tokens)

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        q = mx.array(qkv[0]).astype(mx.float16)
        (keys, k_view), (values, v_view) = (cache_views(x, case.dtype, 29) for x in qkv[1:])
        k, v = (keys, values) if how == "whole buffer" else (k_view, v_view)
        options = {"kv_tokens": 67, "run": HostRun(sanitize=True)}
        if pattern is None:
            out, lse = kernels.full_attention(q, k, v, **options)
        else:
            out, lse = kernels.sparse_attention(q, k, v, pattern, **options)
        return np.array(out.astype(mx.float32)), np.array(lse)

    within_budget(Backend("cache", attend), case)


@pytest.mark.parametrize("q_tokens", [4, 33])
def test_transposed_queries_and_keys_are_read_in_place(q_tokens):
    case = Case(2, 2, 3, q_tokens, 50, 64, COARSE, seed=q_tokens)

    def swapped(x: np.ndarray) -> View:
        _, heads, tokens, head_dim = x.shape
        buffer = mx.array(np.ascontiguousarray(x.transpose(0, 3, 2, 1)))
        return View(buffer, x.shape, (heads * tokens * head_dim, 1, heads, heads * tokens))

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        out, lse = kernels.sparse_attention(*(swapped(x) for x in qkv), COARSE, run=HostRun())
        return np.array(out), np.array(lse)

    within_budget(Backend("transposed", attend), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["full", "coarse"])
def test_decode_equals_last_rows_of_prefill(dtype, name):
    case = Case(1, 2, 2, 40, 75, 80, PATTERNS[name], dtype=dtype, seed=1)
    q, k, v = case.tensors()
    for rows in (1, 3, 8):
        attend_within_budget(metal_backend(HostRun()), case, (q[:, :, -rows:], k, v), np.s_[:, :, -rows:])


MASSES = [(64, "float32", 16, 4, 70, 133), (80, "float16", 24, 8, 31, 31), (128, "bfloat16", 32, 2, 9, 75)]


@pytest.mark.parametrize(("head_dim", "dtype", "block", "stride", "q_tokens", "kv_tokens"), MASSES)
def test_block_mass(head_dim, dtype, block, stride, q_tokens, kv_tokens):
    q, k, _ = Case(2, 1, 3, q_tokens, kv_tokens, head_dim, None, dtype=dtype, seed=block).tensors()
    pattern = PatternConfig(name="xattention", block_size=block, stride=stride)
    for schedule in SCHEDULES:
        mass = metal_backend(HostRun(schedule)).blocks.block_mass(q, k, dtype, pattern)
        oracle, baseline = spec.block_mass(q, k, block, stride), float32_mass(q, k, dtype, pattern)
        Reference(oracle, baseline, "float32", 1e-5).check("mass", mass)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "tokens", "pool_tokens"), [(64, 37, 10), (80, 9, 100), (128, 230, 100)])
def test_router(dtype, head_dim, tokens, pool_tokens):
    rng = np.random.default_rng(tokens)
    queries = round_to(rng.standard_normal((3, tokens, 5, head_dim)) + 0.3, dtype)
    shapes = spec.RouterConfig.parameter_shapes(head_dim)
    weights = {name: round_to(rng.uniform(-0.3, 0.3, shape), dtype) for name, shape in shapes.items()}
    arrays = {name: mx.array(w).astype(getattr(mx, dtype)) for name, w in weights.items()}
    expected = spec.route_logits(weights, spec.pool_queries(queries, pool_tokens))
    for schedule in SCHEDULES:
        run = HostRun(schedule)
        logits, route = kernels.route_layer(mx.array(queries).astype(getattr(mx, dtype)), arrays, pool_tokens, run=run)
        np.testing.assert_allclose(np.array(logits), expected, rtol=1e-5, atol=1e-5)
        assert route.tolist() == spec.decide(expected)
