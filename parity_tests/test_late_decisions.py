"""Exact prefill whose routes stay on the device, its kernels played by operations: the host's way but for the waits."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

import flux_mlx
from flux_mlx import (
    cuda_catalog,
    cuda_kernels,
    exact_prefill,
    kernel_policy,
    routed_attention,
    router_decision,
)
from flux_mlx.kernel_self_test import Variant
from flux_mlx.router_decision import Decision
from flux_mlx.spec import PatternConfig, Route
from parity_tests.cuda_cases import AMPERE, H100
from parity_tests.late_routes import (
    LAYERS,
    TOKENS,
    answer,
    check_alike,
    filled,
    host_s_way,
    play_device,
    remembered,
)
from parity_tests.tiny_models import flux_model, prompt


@pytest.fixture
def device(monkeypatch) -> Counter:
    """Routes stay on the device; what happened."""
    return play_device(monkeypatch)


def by_host(monkeypatch, *args: Any, **options: Any) -> list[Any]:
    with host_s_way(monkeypatch):
        return filled(*args, **options)


@pytest.mark.parametrize("step", [16, 100, 200, 255])
@pytest.mark.parametrize("seed", range(3))
def test_the_device_s_way_leaves_what_the_host_s_does_and_reads_once(monkeypatch, device, step, seed):
    model, tokens = flux_model(seed=seed), prompt(TOKENS, seed)
    expected = by_host(monkeypatch, model, tokens, step)
    assert device["read"] == LAYERS
    assert device["late"] == 0
    device.clear()
    cache = filled(model, tokens, step)
    assert (device["read"], device["routes"]) == (1, LAYERS)
    chunks = -(-(TOKENS - 1) // step)
    assert device["late"] == LAYERS * (chunks - (step <= 24))  # sink and window hold 24 tokens: no route for these
    check_alike(cache, expected)
    assert device["read"] == 1
    assert all(entry.inputs is None and entry.undecided() is None for entry in cache)
    last = mx.array(tokens[-1:])
    tokens_of = [[t for t, _ in generate_step(last, model, max_tokens=8, prompt_cache=x)] for x in (cache, expected)]
    assert tokens_of[0] == tokens_of[1]


def test_both_routes_are_taken(device):
    taken = {route for seed in range(3) for route in flux_mlx.routes(filled(flux_model(seed=seed), prompt(TOKENS), 64))}
    assert taken == {Route.FULL, Route.SPARSE}


def test_a_last_layer_of_one_chunk(monkeypatch, device):
    """Exact prefill of a prompt too short to be one stock call, behind tokens that the window does not hold."""
    model, tokens = flux_model(), prompt(TOKENS)
    caches = []
    for fill in (by_host, lambda _, *args: filled(*args)):
        cache = fill(monkeypatch, model, tokens, 64)
        device.clear()
        with host_s_way(monkeypatch) if fill is by_host else nullcontext():
            flux_mlx.prefill(model, mx.array(prompt(5, 1)), cache)
        caches.append(cache)
    assert device["read"] <= 1
    check_alike(*caches)


def in_a_thread(run: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


@pytest.mark.parametrize(("tokens", "step"), [((100, 60), 100), ((TOKENS,), 100), ((22,), 8), ((22, 60), 8)])
def test_another_thread_may_decode(device, tokens, step):
    """MLX computes work that a thread left undone in that thread only: the prompt leaves none."""
    model, caches = flux_model(), []
    for run in (lambda prefill: prefill(), in_a_thread):
        cache = model.make_cache()

        def prefill(cache: list[Any] = cache) -> None:
            for turn, n in enumerate(tokens):
                flux_mlx.prefill(model, mx.array(prompt(n, turn)), cache, prefill_step_size=step)

        run(prefill)
        answer(model, cache)
        answer(model, cache)  # beyond what sink and window hold
        caches.append(cache)
    check_alike(*caches)


@pytest.mark.parametrize("turns", [(150, 107), (100, 20, 137), (40, 30, 60, 5)])
def test_later_turns_keep_their_rules(monkeypatch, device, turns):
    """A short turn takes a layer to FULL, never from it: some layers' routes are not the decision's."""
    for seed in range(3):
        model = flux_model(seed=seed)
        caches = [model.make_cache(), model.make_cache()]
        for turn, tokens in enumerate(turns):
            chunk = mx.array(prompt(tokens, turn + seed))
            with host_s_way(monkeypatch):
                flux_mlx.prefill(model, chunk, caches[0], prefill_step_size=16)
            flux_mlx.prefill(model, chunk, caches[1], prefill_step_size=16)
            check_alike(*caches)
            for cache in caches:
                answer(model, cache)


@pytest.mark.parametrize("first", [Route.FULL, Route.SPARSE])
def test_a_short_turn_takes_no_layer_from_full(monkeypatch, device, first):
    """Then the route is not what the router says now, and the host knows it."""
    model, said = flux_model(), [first]
    monkeypatch.setattr(routed_attention, "route_codes", lambda _: mx.array([int(said[-1])]))
    cache = filled(model, prompt(100), 64)
    answer(model, cache)
    device.clear()
    said.append(Route.SPARSE)
    flux_mlx.prefill(model, mx.array(prompt(model.flux.router.pool_tokens - 1, 1)), cache, prefill_step_size=5)
    assert flux_mlx.routes(cache) == [first] * LAYERS
    assert device["late"] == (0 if first == Route.FULL else 2 * LAYERS)
    assert device["read"] == (first == Route.SPARSE)


@pytest.mark.parametrize("forced", [(0, 2), (3,), (0, 1, 2, 3)])
def test_forced_layers_beside_routed_ones(monkeypatch, device, forced):
    model, tokens = flux_model(), prompt(TOKENS)
    layers = flux_mlx.models.routed_layers(model)
    for index in forced:
        layers[index].forced = Route.SPARSE
    expected = by_host(monkeypatch, model, tokens, 64)
    device.clear()
    check_alike(filled(model, tokens, 64), expected)
    assert device["read"] == (len(forced) < LAYERS)
    assert device["late"] == (LAYERS - len(forced)) * 4


@pytest.mark.parametrize("at", range(LAYERS + 1))
def test_an_interruption_leaves_the_cache_as_it_was(device, at):
    model, tokens = flux_model(), prompt(TOKENS)
    cache, untouched = filled(model, tokens[:100], 64), filled(model, tokens[:100], 64)

    def interrupt(done: int, total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux_mlx.prefill(model, mx.array(tokens[100:]), cache, prefill_step_size=64, prompt_progress_callback=interrupt)
    check_alike(cache, untouched)
    for one in (cache, untouched):
        flux_mlx.prefill(model, mx.array(tokens[100:]), one, prefill_step_size=64)
    check_alike(cache, untouched)


def test_an_interrupted_wait_leaves_the_cache_as_it_was(monkeypatch, device):
    model, tokens = flux_model(), prompt(TOKENS)
    cache = filled(model, tokens[:100], 64)
    before = remembered(cache)

    def interrupted(_: Decision) -> list:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Decision, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flux_mlx.prefill(model, mx.array(tokens[100:]), cache, prefill_step_size=64)
    for mine, theirs in zip(remembered(cache), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_callback_may_read_routes(monkeypatch, device):
    model, tokens = flux_model(), prompt(TOKENS)
    expected, cache = by_host(monkeypatch, model, tokens, 64), model.make_cache()
    device.clear()

    def look(done: int, total: int) -> None:
        if done:
            assert cache[done - 1].routes == expected[done - 1].routes

    flux_mlx.prefill(model, mx.array(tokens), cache, prefill_step_size=64, prompt_progress_callback=look)
    assert device["read"] == LAYERS
    check_alike(cache, expected)


def test_the_host_reads_no_memory_that_kernels_read(monkeypatch, device):
    """MLX moves what the host reads while kernels under way read it where it was."""
    lent, read = [], []
    attend, unpack = cuda_kernels.routed_attention, router_decision.unpacked

    def noted_attend(q, k, v, route, *args, **options):
        lent.append(route)
        return attend(q, k, v, route, *args, **options)

    def noted_unpack(words: mx.array, rows: int) -> list[Route]:
        read.append(words)
        return unpack(words, rows)

    monkeypatch.setattr(cuda_kernels, "routed_attention", noted_attend)
    monkeypatch.setattr(router_decision, "unpacked", noted_unpack)
    model, tokens = flux_model(), prompt(TOKENS)
    for index, attn in flux_mlx.models.routed_layers(model).items():
        attn.forced = Route.SPARSE if index != 1 else None
    filled(model, tokens, 64)
    assert len(read) == 1
    caches = [model.make_cache()]
    look = {"prompt_progress_callback": lambda done, _: done and caches[0][done - 1].routes}
    flux_mlx.prefill(model, mx.array(tokens), caches[0], prefill_step_size=64, **look)
    assert len(read) == 2
    assert not {address(x) for x in lent} & {address(x) for x in read}


def test_routes_are_joined_beside_the_last_layer_s_keys(monkeypatch, device):
    """Behind the keys the device would have nothing else to do."""
    beside, start = [], exact_prefill._Ahead.start_keys

    def noted(self, entry: Any, arrays: list[mx.array]) -> None:
        beside.append([x.dtype for x in arrays])
        start(self, entry, arrays)

    monkeypatch.setattr(exact_prefill._Ahead, "start_keys", noted)
    filled(flux_model(), prompt(TOKENS), 64)
    assert [mx.uint32 in dtypes for dtypes in beside] == [False] * (LAYERS - 1) + [True]


def address(x: mx.array) -> int:
    mx.eval(x)
    return np.asarray(memoryview(x)).__array_interface__["data"][0]


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("parts", [1, 3])
def test_packed_routes_are_what_went_in(rows, parts):
    routes = [Route.SPARSE if x else Route.FULL for x in np.random.default_rng(rows).random(rows * parts) < 0.5]
    joined = Decision.joined([mx.array(routes[start : start + rows]) for start in range(0, rows * parts, rows)])
    assert joined.read() == routes
    assert joined.codes.nbytes == 4 * -(-rows * parts // 32)
    assert Decision(mx.array(routes), [True] * len(routes), is_lent=True).read() == routes


def test_a_layer_that_is_done_holds_on_to_no_inputs(device):
    """Its pools are computed with its decision: nothing is left that would keep the prompt's hidden states."""
    model, cache = flux_model(), flux_model().make_cache()

    def look(done: int, total: int) -> None:
        for entry in cache[:done]:
            graph = io.StringIO()
            mx.export_to_dot(graph, *entry.caches[1].cache)
            assert entry.inputs is None
            assert "rectangle" not in graph.getvalue()
        assert done == total or device["read"] == 0

    flux_mlx.prefill(model, mx.array(prompt(TOKENS)), cache, prefill_step_size=64, prompt_progress_callback=look)


@pytest.mark.parametrize("how", ["evict", "kv_bits"])
def test_caches_that_change_layer_by_layer_take_the_host_s_way(monkeypatch, device, how):
    model, tokens = flux_model(), prompt(TOKENS)
    flux_mlx.set_kv_policy(model, "evict" if how == "evict" else "keep")
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0} if how == "kv_bits" else {}
    filled(model, tokens, 64, **options)
    assert device["late"] == 0
    assert device["read"] == LAYERS


@pytest.mark.parametrize("name", ["triangle", "xattention"])
def test_other_patterns_are_left_to_the_host(monkeypatch, device, name):
    monkeypatch.undo()
    q = mx.zeros((1, 4, 100, 64), mx.float16)
    monkeypatch.setattr(kernel_policy, "RECORD", kernel_policy.Record())
    monkeypatch.setattr(kernel_policy, "_may_use_kernels", lambda: True)
    monkeypatch.setattr(cuda_kernels, "is_available", lambda: True)
    monkeypatch.setattr(cuda_kernels, "device", lambda: H100)
    assert kernel_policy.choose_undecided(q, q, q, PatternConfig(name), 9000, 9000) == "ops"


def test_the_policy(monkeypatch):
    """Kernels that passed their self-test, for what a prompt that the window does not hold is long enough."""
    verdicts: dict[str, str] = {}

    def self_test(variant: Variant, run: Any) -> str:
        return verdicts.get(variant.backend, "")

    def choose(dtype: mx.Dtype, L: int = 100, prompt_tokens: int = 9000, block_size: int = 128) -> str:
        monkeypatch.setattr(kernel_policy, "RECORD", kernel_policy.Record())
        q, k = mx.zeros((1, 4, L, 64), dtype), mx.zeros((1, 2, L, 64), dtype)
        pattern = PatternConfig(block_size=block_size)
        return kernel_policy.choose_undecided(q, k, k, pattern, prompt_tokens, prompt_tokens)

    assert choose(mx.bfloat16) == "ops"  # no CUDA device
    monkeypatch.setattr(kernel_policy, "self_test", self_test)
    monkeypatch.setattr(kernel_policy, "calibration", dict)
    monkeypatch.setattr(cuda_kernels, "is_available", lambda: True)
    monkeypatch.setattr(cuda_kernels, "device", lambda: H100)
    assert choose(mx.bfloat16) == "ops"  # the default device is the CPU
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert choose(mx.bfloat16) == choose(mx.float16, L=3) == "cuda"
    assert choose(mx.float32) == "ops"
    assert choose(mx.bfloat16, prompt_tokens=2000) == "ops"
    assert choose(mx.bfloat16, block_size=64) == "ops"  # of prefill's kernels the portable one alone
    assert choose(mx.bfloat16, L=3, block_size=64) == "cuda"
    verdicts["cuda"] = "wrong"
    with pytest.warns(RuntimeWarning, match="wrong"):
        assert choose(mx.bfloat16) == "ops"
    verdicts.clear()
    for where in (cuda_catalog.Device(7, 5, 40, 1 << 20), AMPERE):
        monkeypatch.setattr(cuda_kernels, "device", lambda where=where: where)
        assert choose(mx.bfloat16) == "ops"
    assert choose(mx.bfloat16, L=3) == "cuda"
