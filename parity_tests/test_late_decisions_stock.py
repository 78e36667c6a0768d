"""Stock mlx-lm's prefill whose routes stay on the device: chunk by chunk as the host's way, but for the waits."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

import flux_mlx
from flux_mlx import router_state
from flux_mlx.routed_attention import RoutedAttention
from parity_tests.late_routes import LAYERS, TOKENS, check_alike, host_s_way, play_device
from parity_tests.tiny_models import flux_model, prompt


@pytest.fixture
def device(monkeypatch) -> Counter:
    """Routes stay on the device; what happened."""
    return play_device(monkeypatch)


def generated(model: Any, tokens: list[int], cache: list[Any], step: int, **options: Any) -> list[int]:
    """Six tokens by stock mlx-lm, the prompt in its chunks."""
    steps = generate_step(mx.array(tokens), model, prompt_cache=cache, prefill_step_size=step, max_tokens=6, **options)
    return [token for token, _ in steps]


@pytest.mark.parametrize("step", [20, 64, 100, 256])
@pytest.mark.parametrize("seed", range(3))
def test_stock_s_chunks_leave_what_the_host_s_way_does_and_read_once(monkeypatch, device, step, seed):
    model, tokens = flux_model(seed=seed), prompt(TOKENS, seed)
    caches = [model.make_cache(), model.make_cache()]
    with host_s_way(monkeypatch):
        expected = generated(model, tokens, caches[0], step)
    assert (device["read"] >= LAYERS, device["late"]) == (True, 0)
    device.clear()
    assert generated(model, tokens, caches[1], step) == expected
    assert (device["read"], device["routes"]) == (1, LAYERS)
    chunks = -(-(TOKENS - 1) // step)
    last_is_short = 0 < (TOKENS - 1) % step < model.flux.router.min_prefill_tokens
    assert device["late"] == LAYERS * (chunks - (step <= 24) - last_is_short)
    check_alike(*reversed(caches))


@pytest.mark.parametrize(("step", "by_itself"), [(64, []), (20, [20] * LAYERS)])
def test_the_router_takes_the_queries_of_the_chunk_under_way(monkeypatch, device, step, by_itself):
    """It projects its own only of a chunk that was dense and is done: of 20 tokens, which the window holds."""
    seen, query_rows = [], RoutedAttention.query_rows
    monkeypatch.setattr(RoutedAttention, "query_rows", lambda self, x: seen.append(x.shape[1]) or query_rows(self, x))
    model = flux_model()
    generated(model, prompt(TOKENS), model.make_cache(), step)
    assert device["late"]
    assert seen == by_itself


def test_what_stock_evaluates_of_a_chunk_takes_one_array_of_the_host_s(device):
    """And a concatenation and a view for every layer, no more."""
    router_state._behind_routes.cache_clear()
    model = flux_model()
    cache = model.make_cache()
    for start in range(0, 193, 64):
        model(mx.array([prompt(TOKENS)[start : start + 64]]), cache=cache)
        mx.eval([entry.decision.codes for entry in cache])
        states, graph = [entry.state for entry in cache], io.StringIO()
        mx.export_to_dot(graph, *(entry.caches[1][0] for entry in cache))
        assert graph.getvalue().count("rectangle") == 2 * LAYERS
        mx.eval(states)
    assert router_state._behind_routes.cache_info().misses == 4  # chunks


@pytest.mark.parametrize("turns", [(150, 107), (100, 20, 137), (40, 30, 60, 5)])
def test_later_turns_in_stock_s_chunks_keep_their_rules(monkeypatch, device, turns):
    for seed in range(3):
        model = flux_model(seed=seed)
        caches = [model.make_cache(), model.make_cache()]
        for turn, tokens in enumerate(turns):
            with host_s_way(monkeypatch):
                expected = generated(model, prompt(tokens, turn + seed), caches[0], 32)
            assert generated(model, prompt(tokens, turn + seed), caches[1], 32) == expected
            check_alike(*reversed(caches))


def test_a_prompt_that_the_window_holds_reads_no_route(device):
    model = flux_model()
    generated(model, prompt(18), model.make_cache(), 64)
    assert device["read"] == device["late"] == 0


@pytest.mark.parametrize("how", ["evict", "kv_bits", "batch"])
def test_what_stock_s_chunks_leave_to_the_host(device, how):
    model, tokens = flux_model(), prompt(TOKENS)
    flux_mlx.set_kv_policy(model, "evict" if how == "evict" else "keep")
    cache = model.make_cache()
    if how == "batch":
        model(mx.array([tokens[:100], tokens[100:200]]), cache=cache)
    else:
        options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0} if how == "kv_bits" else {}
        generated(model, tokens, cache, 24, **options)
    assert device["late"] == 0
    assert device["read"] > 0
