"""Decisions that stay on the device, on a CPU: kernels that operations play, and what a prompt leaves in a cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

import flux_mlx
from flux_mlx import attention, cuda_kernels, kernel_policy
from flux_mlx.router_decision import Decision
from flux_mlx.spec import Route

LAYERS = 4
TOKENS = 257


def counted_reads(monkeypatch) -> Counter:
    """Reads of decisions by the host ("read"), and routes in them ("routes")."""
    counted: Counter[str] = Counter()
    read = Decision.read

    def counted_read(decision: Decision) -> list[Route | None]:
        routes = read(decision)
        counted.update(read=1, routes=len(routes))
        return routes

    monkeypatch.setattr(Decision, "read", counted_read)
    return counted


def play_device(monkeypatch) -> Counter:
    """Routes stay on the device: kernels that operations play compute both attentions and take the route's.

    Returns:
        What happens: as `counted_reads`, and calls by a late route ("late").
    """
    seen = counted_reads(monkeypatch)

    def routed_attention(q, k, v, route, pattern, *, prompt_tokens, scale, kv_tokens):
        assert route.dtype == mx.int32
        seen["late"] += 1
        keys, values = k[:, :, :kv_tokens], v[:, :, :kv_tokens]
        full = attention.full_attention(q, keys, values, scale=scale)
        sparse = attention.sparse_attention(q, keys, values, pattern, prompt_tokens=prompt_tokens, scale=scale)
        return mx.where((route == int(Route.SPARSE))[:, None, None, None], sparse, full), None

    monkeypatch.setattr(cuda_kernels, "is_available", lambda: True)
    monkeypatch.setattr(kernel_policy, "use_cuda_router", lambda *_: False)
    monkeypatch.setattr(kernel_policy, "choose", lambda *_: "ops")
    monkeypatch.setattr(kernel_policy, "choose_undecided", lambda *_: "cuda")
    monkeypatch.setattr(cuda_kernels, "routed_attention", routed_attention)
    return seen


def filled(model: Any, tokens: list[int], step: int, **options: Any) -> list[Any]:
    """The cache after exact prefill in steps of `step` tokens."""
    cache = model.make_cache()
    flux_mlx.prefill(model, mx.array(tokens), cache, prefill_step_size=step, **options)
    return cache


def answer(model: Any, cache: list[Any]) -> None:
    """Two tokens, so that the next prompt is another turn."""
    for token in (3, 5):
        mx.eval(model(mx.array([[token]]), cache=cache))


@contextmanager
def host_s_way(monkeypatch) -> Iterator[None]:
    """Within it the host reads every route."""
    with monkeypatch.context() as patch:
        patch.setattr(kernel_policy, "choose_undecided", lambda *_: "ops")
        yield


def remembered(cache: list[Any]) -> list[np.ndarray]:
    """Keys and values in use, and the router's state, of every layer."""
    assert all(entry.state for entry in cache)  # asked for it, a cache brings its arrays up to what the host knows
    held = [x[:, :, : entry.offset] for entry in cache for x in (entry.kv.keys, entry.kv.values)]
    return [np.array(x) for x in held + [x for entry in cache for x in entry.caches[1].cache]]


def check_alike(cache: list[Any], other: list[Any]) -> None:
    """Equal routes; keys, values and router states as close as one order of operations is to another."""
    assert flux_mlx.routes(cache) == flux_mlx.routes(other)
    for mine, theirs in zip(remembered(cache), remembered(other), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 if mine.dtype == np.float32 else 0)
