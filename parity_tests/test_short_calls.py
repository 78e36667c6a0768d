"""Decoding by the prepared CUDA kernel, which runs on the host here, within models: the same as by MLX operations."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

import flux_mlx
from flux_mlx import cuda_kernels, kernel_policy, short_calls
from flux_mlx.cache import CacheList
from flux_mlx.spec import PatternConfig
from parity_tests.cuda_cases import AMPERE
from parity_tests.host_shim.cuda_source import HostCuda
from parity_tests.tiny_models import flux_model, prompt

PATTERN = PatternConfig(block_size=16, sink_tokens=16, window_tokens=32)
CLOSE = {"rtol": 0, "atol": 0.03}


@pytest.fixture
def decoders(monkeypatch) -> list:
    """The routes of every kernel that was prepared; prefill stays with operations."""
    made, decoder = [], cuda_kernels.decoder

    def counted(*args):
        made.append(args[5])
        return decoder(*args, run=HostCuda())

    def choose(q, *_):
        return "cuda" if q.shape[2] <= 8 else "ops"

    monkeypatch.setattr(cuda_kernels, "device", lambda: AMPERE)
    monkeypatch.setitem(cuda_kernels.routed_attention.__kwdefaults__, "run", HostCuda())
    monkeypatch.setattr(short_calls.cuda_kernels, "decoder", counted)
    monkeypatch.setattr(short_calls.kernel_policy, "choose", choose)
    return made


def wide_model(route):
    """Head dim 64, float16: what the kernels take."""
    model = flux_model("qwen3", route=route, pattern=PATTERN, hidden_size=64, head_dim=64)
    model.update(_half(model.parameters()))
    return model


def _half(tree):
    if isinstance(tree, dict):
        return {name: value if name == "router" else _half(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_half(value) for value in tree]
    return tree.astype(mx.float16)


def decoded(model, cache: list, tokens: list[list[int]]) -> np.ndarray:
    """Logits of tokens fed in calls of one and of three."""
    fed = mx.array(tokens)
    outs = [model(fed[:, start:stop], cache=cache) for start, stop in ((0, 1), (1, 2), (2, 5), (5, 6))]
    return np.array(mx.concatenate(outs, axis=1).astype(mx.float32))


def prefilled(model, rows: list[list[int]]) -> list[list]:
    caches = []
    for row in rows:
        cache = model.make_cache()
        flux_mlx.prefill(model, mx.array(row), cache)
        caches.append(cache)
    return caches


@pytest.mark.parametrize("route", ["sparse", (1,), "auto"])
def test_decoding_by_the_kernel_is_decoding_by_operations(decoders, monkeypatch, route):
    model = wide_model(route)
    by_kernel = decoded(model, prefilled(model, [prompt(130)])[0], [prompt(6, seed=1)])
    sparse_layers = flux_mlx.routes(prefilled(model, [prompt(130)])[0]).count(flux_mlx.Route.SPARSE)
    assert sparse_layers > 0
    assert decoders
    monkeypatch.setattr(kernel_policy, "choose", lambda *_: "ops")
    by_operations = decoded(model, prefilled(model, [prompt(130)])[0], [prompt(6, seed=1)])
    np.testing.assert_allclose(by_kernel, by_operations, **CLOSE)


def test_a_batch_of_mixed_routes_takes_one_kernel(decoders, monkeypatch):
    model = wide_model("auto")
    rows = [prompt(130, seed=n) for n in range(3)]

    def batch() -> list:
        return [CacheList.merge(list(layer)) for layer in zip(*prefilled(model, rows), strict=True)]

    tokens = [prompt(6, seed=7)] * 3
    taken = flux_mlx.routes(batch())
    assert any(len(set(routes)) > 1 for routes in taken)
    decoders.clear()
    by_kernel = decoded(model, batch(), tokens)
    assert any(isinstance(routes, tuple) for routes in decoders)
    monkeypatch.setattr(kernel_policy, "choose", lambda *_: "ops")
    np.testing.assert_allclose(by_kernel, decoded(model, batch(), tokens), **CLOSE)


def test_rows_with_padding_are_left_to_groups(decoders):
    model = wide_model("sparse")
    caches = prefilled(model, [prompt(130), prompt(150)])
    decoders.clear()
    out = decoded(model, [CacheList.merge(list(layer)) for layer in zip(*caches, strict=True)], [prompt(6, seed=1)] * 2)
    assert decoders == []
    assert np.isfinite(out).all()


def test_a_kernel_is_prepared_once_for_a_capacity(decoders):
    model = wide_model("sparse")
    cache = prefilled(model, [prompt(130)])[0]
    step = partial(model, mx.array([[3]]), cache=cache)
    for _ in range(3):
        mx.eval(step())
    assert len(decoders) == len(model.layers)
