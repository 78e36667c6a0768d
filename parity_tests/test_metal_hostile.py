"""Hostile inputs: refused in Python with a message, and bounded in the kernels when they get there all the same."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flux_mlx import kernels, spec
from flux_mlx.spec import PatternConfig, Route
from metal_kernels import launches, operations
from parity_tests.host_shim.run import HostRun, as_array
from parity_tests.strategies import Case

PATTERN = PatternConfig(block_size=16, sink_tokens=16, window_tokens=32)
CASE = Case(1, 1, 2, 40, 70, 64, None)
SANITIZED = HostRun("shuffled", sanitize=True)
BIG = 2**31 - 1


def tensors(case: Case = CASE) -> list[mx.array]:
    return [mx.array(x) for x in case.tensors()]


def table(**changes: np.ndarray) -> spec.BlockTable:
    kept = spec.kept_blocks(PATTERN, 40, 70)[None, None]
    return replace(spec.block_table(16, kept, 40, 70), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_indices": np.full((1, 1, 4, 5), 5)},
        {"kv_indices": np.full((1, 1, 4, 5), -1)},
        {"full_kv_indices": np.full((1, 1, 4, 5), BIG)},
        {"kv_num_blocks": np.full((1, 1, 4), 6)},
        {"full_kv_num_blocks": np.full((1, 1, 4), -2)},
        {"kv_num_blocks": np.ones((1, 1, 3), int)},
        {"kv_indices": np.zeros((1, 1, 4, 4), int)},
        {"kv_num_blocks": np.ones((1, 3, 4), int)},
        {"block_size": 15},
        {"first_q_block": 0},
    ],
)
def test_bad_tables_are_refused(changes):
    with pytest.raises(ValueError, match="table_attention"):
        kernels.table_attention(*tensors(), table(**changes), run=SANITIZED)


@pytest.mark.parametrize("kv_tokens", [-1, 0, 39, 71, BIG])
def test_bad_lengths_are_refused(kv_tokens):
    with pytest.raises(ValueError, match="kv_tokens"):
        kernels.full_attention(*tensors(), kv_tokens=kv_tokens, run=SANITIZED)


@pytest.mark.parametrize(
    ("q", "k", "v", "dtype"),
    [
        ((1, 2, 40, 72), (1, 1, 70, 72), (1, 1, 70, 72), mx.float32),
        ((1, 3, 40, 64), (1, 2, 70, 64), (1, 2, 70, 64), mx.float32),
        ((1, 2, 40, 64), (1, 1, 70, 64), (1, 1, 69, 64), mx.float32),
        ((1, 2, 40, 64), (2, 1, 70, 64), (2, 1, 70, 64), mx.float32),
        ((1, 2, 40, 64), (1, 1, 70, 80), (1, 1, 70, 80), mx.float32),
        ((1, 2, 0, 64), (1, 1, 70, 64), (1, 1, 70, 64), mx.float32),
        ((2, 40, 64), (1, 70, 64), (1, 70, 64), mx.float32),
        ((64,), (64,), (64,), mx.float32),
        ((1, 2, 40, 64), (1, 1, 70, 64), (1, 1, 70, 64), mx.int32),
    ],
)
def test_bad_shapes_are_refused(q, k, v, dtype):
    with pytest.raises(ValueError, match="attention"):
        kernels.full_attention(*(mx.zeros(shape, dtype) for shape in (q, k, v)), run=SANITIZED)


def test_mixed_dtypes_are_refused():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="share a dtype"):
        kernels.full_attention(q, k.astype(mx.float16), v, run=SANITIZED)


def test_bad_routes_and_rules_are_refused():
    with pytest.raises(ValueError, match="route of shape"):
        kernels.routed_attention(*tensors(), (1, 1), PATTERN, run=SANITIZED)
    for words in ((0, 0, 1), (16, -1, 1), (16, 0, 0), (16, 0, 2**31)):
        with pytest.raises(ValueError, match="Rule"):
            operations.Rule(*words)
    with pytest.raises(ValueError, match="stride"):
        operations.block_mass(SANITIZED, *tensors()[:2], 16, 5, dtype="float32")


def test_named_impl_without_a_metal_device_is_an_error():
    if kernels.is_available():
        pytest.skip("there is a Metal device")
    with pytest.raises(RuntimeError, match="needs a Metal device"):
        kernels.full_attention(*tensors())


def launch_table(parts: list[np.ndarray], block_size: int, kv_tokens: int) -> np.ndarray:
    """The table kernel, past every check."""
    q, k, v = tensors()
    launch = launches.prefill_table(q.shape, "float32", 4, 16)
    arrays = [mx.array(part.astype(np.int32)) for part in parts]
    route = (int(Route.SPARSE),)
    return np.array(SANITIZED(launch, [q, k, v, route, *arrays, block_size, kv_tokens, 0.125])[0])


HOSTILE = [-BIG - 1, -1, 4, 5, 2**20, 2**27, BIG]


@pytest.mark.parametrize("index", HOSTILE)
@pytest.mark.parametrize("counts", [-5, 5, BIG])
def test_hostile_tables_stay_in_bounds(index, counts):
    parts = [np.full((1, 1, 4), counts), np.full((1, 1, 4, 5), index)] * 2
    out = launch_table(parts, 16, 70)
    assert np.isfinite(out).all()
    if counts < 0 or not 0 <= index < 5:
        assert not out.any(), "no block of the table exists"


@pytest.mark.parametrize("block_size", [-BIG, -1, 0, 1, 3, 1000, BIG])
def test_hostile_block_sizes_stay_in_bounds(block_size):
    launch_table([np.ones((1, 1, 4)), np.zeros((1, 1, 4, 5))] * 2, block_size, 70)


@pytest.mark.parametrize("kv_tokens", [-BIG, -1, 0, 1, 39, 71, BIG])
@pytest.mark.parametrize("q_tokens", [1, 5, 40])
@pytest.mark.parametrize("route", [Route.SPARSE, Route.FULL])
def test_hostile_lengths_stay_in_bounds(kv_tokens, q_tokens, route):
    q, k, v = tensors(replace(CASE, q_tokens=q_tokens))
    launch = launches.prefill(q.shape, "float32") if q_tokens > 8 else launches.decode(q.shape, 1, "float32", 1)
    SANITIZED(launch, [q, k, v, (int(route),), (16, 1, 2, 0, 0), kv_tokens, 0.125])
    if q_tokens > 8:
        launch_table([np.ones((1, 1, 4)), np.zeros((1, 1, 4, 5))] * 2, 16, kv_tokens)


@pytest.mark.parametrize("word", range(5))
@pytest.mark.parametrize("value", [-BIG - 1, -1, 0, 2**20, BIG])
@pytest.mark.parametrize("q_tokens", [2, 40])
def test_hostile_rules_stay_in_bounds(word, value, q_tokens):
    words = [16, 1, 2, 0, 0]
    words[word] = value
    q, k, v = tensors(replace(CASE, q_tokens=q_tokens))
    launch = launches.prefill(q.shape, "float32") if q_tokens > 8 else launches.decode(q.shape, 1, "float32", 1)
    out, _ = SANITIZED(launch, [q, k, v, (int(Route.SPARSE),), tuple(words), 70, 0.125])
    assert np.isfinite(np.array(out)).all()


@pytest.mark.parametrize("pool_tokens", [-BIG, 0, 1, 37, 1000, BIG])
def test_hostile_pools_stay_in_bounds(pool_tokens):
    queries = mx.array(np.ones((2, 37, 3, 64), np.float32))
    launch = launches.router_pool(queries.shape, "float32", 37)
    SANITIZED(launch, [queries, as_array(pool_tokens)])
