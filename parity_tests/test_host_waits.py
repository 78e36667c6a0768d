"""What routing costs the host: waits for the device, evaluations, Python calls; all counted, none timed."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

import flux_mlx
from flux_mlx import exact_prefill, on_the_way, router_state
from flux_mlx.router_state import Decision
from flux_mlx.spec import Route
from parity_tests.tiny_models import PATTERN, flux_model, prompt, stock_model

DENSE_TOKENS = PATTERN.dense_tokens  # 24
LAYERS = 4


@pytest.fixture
def waits(monkeypatch) -> Counter:
    """How often the host waited: for a route ("route"), for counters ("counters"), for an evaluation ("eval")."""
    seen = Counter()
    read, array, evaluate = Decision.read, np.array, mx.eval

    def counted_read(decision):
        seen["route"] += 1
        return read(decision)

    class Numpy:
        """numpy as the cache sees it."""

        def __getattr__(self, name):
            return getattr(np, name)

        def array(self, x):
            seen["counters"] += isinstance(x, mx.array)
            return array(x)

    def counted_eval(*arrays):
        seen["eval"] += 1
        evaluate(*arrays)

    monkeypatch.setattr(Decision, "read", counted_read)
    monkeypatch.setattr(router_state, "np", Numpy())
    monkeypatch.setattr(mx, "eval", counted_eval)
    return seen


def prefilled(model, tokens: list[int], waits: Counter, step: int = 2048) -> tuple[list, mx.array]:
    """A cache after exact prefill, and the last token; only the prefill's waits are counted."""
    cache = model.make_cache()
    for entry in cache:
        assert entry.routes == [Route.UNSET]  # the counters of a fresh cache are read
    waits.clear()
    return cache, flux_mlx.prefill(model, mx.array(tokens), cache, prefill_step_size=step)


def decode(model, cache: list, last: mx.array, tokens: int) -> list[int]:
    return [token for token, _ in generate_step(last, model, max_tokens=tokens, prompt_cache=cache)]


def test_within_sink_and_window_nothing_is_waited_for(waits):
    model = flux_model()
    cache, last = prefilled(model, prompt(17), waits)
    decode(model, cache, last, DENSE_TOKENS - 17 - 1)
    assert waits["route"] == waits["counters"] == 0
    taken = flux_mlx.routes(cache)
    assert waits["route"] == LAYERS
    assert taken == flux_mlx.routes(prefilled(model, prompt(17), waits)[0])


def test_an_answer_that_leaves_the_window_waits_once_for_each_layer(waits):
    model = flux_model()
    cache, last = prefilled(model, prompt(17), waits)
    decode(model, cache, last, 40)
    assert waits["route"] == LAYERS
    assert waits["counters"] == 0


@pytest.mark.parametrize("step", [32, 2048])
def test_a_long_prompt_waits_once_for_each_layer(waits, step):
    model = flux_model()
    cache, last = prefilled(model, prompt(257), waits, step)
    assert waits["route"] == LAYERS
    assert waits["counters"] == 0
    decode(model, cache, last, 10)
    assert waits["route"] == LAYERS
    assert waits["counters"] == 0


def test_a_route_is_computed_beside_the_first_chunk_and_read_for_the_second(monkeypatch):
    """The device has the whole first chunk to do while the host waits for the route."""
    seen = []

    def noted(owner, name, fact):
        method = getattr(owner, name)

        def call(self, *args, **kwargs):
            seen.append(fact(self, *args))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(router_state.RouterState, "start_decision", lambda entry, beside: ("start", beside[0][2]))
    noted(exact_prefill._Ahead, "hand_over", lambda *_: "chunk")
    noted(Decision, "read", lambda _: "read")
    model = flux_model()
    flux_mlx.prefill(model, mx.array(prompt(65)), model.make_cache(), prefill_step_size=16)
    assert seen == [("start", 16), "chunk", "read", "chunk", "chunk", "chunk"] * LAYERS


def test_a_forced_list_is_never_waited_for(waits):
    model = flux_model(route=(1, 3))
    cache, last = prefilled(model, prompt(257), waits, 64)
    decode(model, cache, last, 10)
    assert waits["route"] == waits["counters"] == 0


def test_a_prompt_of_one_chunk_is_not_waited_for_at_all(waits):
    model = flux_model(route="full")
    prefilled(model, prompt(100), waits)
    assert waits["eval"] == 0


@pytest.mark.parametrize("route", ["full", (1, 3), "auto"])
@pytest.mark.parametrize("policy", ["keep", "evict"])
def test_decoding_evaluates_as_often_as_stock(waits, route, policy):
    model, stock = flux_model(route=route), stock_model()
    flux_mlx.set_kv_policy(model, policy)
    cache, last = prefilled(model, prompt(100), waits)
    flux_mlx.routes(cache)
    waits.clear()
    decode(model, cache, last, 20)
    ours, _ = waits["eval"], waits.clear()
    decode(stock, stock.make_cache() if hasattr(stock, "make_cache") else None, mx.array([5]), 20)
    assert ours == waits["eval"]


def noted_inputs(cache: list) -> list[list[int]]:
    """Tokens of the inputs that each layer's cache holds on to; 0 for calls whose inputs do not matter."""
    return [[0 if call.x is None else call.x.shape[1] for call in entry._log] for entry in cache]


def test_a_short_prompt_pays_for_no_router(monkeypatch):
    model, pooled = flux_model(), []
    monkeypatch.setattr(router_state.RouterState, "feed", lambda *_, **__: pooled.append(1))
    cache = model.make_cache()
    last = flux_mlx.prefill(model, mx.array(prompt(17)), cache)
    decode(model, cache, last, DENSE_TOKENS - 17 - 1)
    assert pooled == []
    assert noted_inputs(cache) == [[16, 0, 0]] * LAYERS


def test_inputs_of_a_noted_prompt_are_trimmed_behind_the_first_token():
    model = flux_model(pattern=dataclasses.replace(PATTERN, window_tokens=64))
    pool = 2 * model.flux.router.pool_tokens
    cache = model.make_cache()
    last = flux_mlx.prefill(model, mx.array(prompt(pool + 20)), cache)
    assert noted_inputs(cache) == [[pool + 19]] * LAYERS
    steps = generate_step(last, model, max_tokens=5, prompt_cache=cache)
    next(steps)
    assert [calls[0] for calls in noted_inputs(cache)] == [pool + 19] * LAYERS
    next(steps)
    assert [calls[0] for calls in noted_inputs(cache)] == [pool] * LAYERS
    list(steps)
    untrimmed, _ = prefilled(model, prompt(pool + 20), Counter())
    for entry, other in zip(cache, untrimmed, strict=True):
        np.testing.assert_array_equal(np.array(entry.pooled()), np.array(other.pooled()))


def test_many_short_turns_are_looked_at_now_and_then():
    model = flux_model(pattern=dataclasses.replace(PATTERN, window_tokens=512))
    cache = model.make_cache()
    for _ in range(router_state.LOG_CALLS - 1):
        mx.eval(model(mx.array([prompt(17)]), cache=cache))
    assert {len(entry._log) for entry in cache} == {router_state.LOG_CALLS - 1}
    mx.eval(model(mx.array([prompt(17)]), cache=cache))
    assert {len(entry._log) for entry in cache} == {0}


def test_a_copied_cache_shares_the_noted_layers():
    model = flux_model()
    cache, _ = prefilled(model, prompt(17), Counter())
    copied = copy.deepcopy(cache)
    assert all(a._log[0].layer is b._log[0].layer for a, b in zip(cache, copied, strict=True))
    assert flux_mlx.routes(copied) == flux_mlx.routes(cache)


def python_calls(run: Callable[[], Any]) -> float:
    """Calls of this package's Python functions while `run` runs, a layer."""
    seen = 0

    def count(frame, event, _) -> None:
        nonlocal seen
        seen += event == "call" and "flux_mlx" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        out = run()
    finally:
        sys.setprofile(None)
    mx.eval(out)
    return seen / LAYERS


@pytest.mark.parametrize(("route", "most"), [(Route.FULL, 14), (Route.SPARSE, 58)])
def test_bookkeeping_of_a_token_is_a_few_calls(route, most):
    model = flux_model()
    cache = model.make_cache()
    model(mx.array([prompt(100)]), cache=cache)
    for entry in cache:
        entry.set_routes([route])
    for _ in range(3):
        mx.eval(model(mx.array([[3]]), cache=cache))
    assert {entry.is_idle for entry in cache} == {True}
    assert python_calls(lambda: model(mx.array([[3]]), cache=cache)) <= most


def test_the_layers_of_a_short_prompt_are_looked_for_once(monkeypatch):
    model, walks = flux_model(), []
    walk = exact_prefill.routed_layers
    monkeypatch.setattr(exact_prefill, "routed_layers", lambda model: walks.append(1) or walk(model))
    flux_mlx.prefill(model, mx.array(prompt(17)), model.make_cache())
    assert walks == [1]


def test_bookkeeping_of_a_short_prompt_is_a_few_calls():
    model, tokens = flux_model(), mx.array(prompt(17))
    caches = model.make_cache(), model.make_cache()
    flux_mlx.prefill(model, tokens, caches[0])
    assert python_calls(lambda: flux_mlx.prefill(model, tokens, caches[1])) <= 38


def exactly(model, tokens, cache):
    return flux_mlx.prefill(model, mx.array(tokens), cache)[None]


def in_stock_chunks(model, tokens, cache):
    for start in (0, 40):
        if tokens[start:-1][:40]:
            model(mx.array([tokens[start:-1][:40]]), cache=cache)
            mx.eval([entry.state for entry in cache])
    return mx.array([tokens[-1:]])


def in_a_batch(model, tokens, cache):
    model(mx.array([tokens[:-1], tokens[:0:-1]]), cache=cache)
    return mx.array([tokens[-1:], tokens[:1]])


def states_and_logits(model, prefill, tokens):
    cache = model.make_cache()
    last = prefill(model, prompt(tokens), cache)
    states = [np.array(x) for _, x in tree_flatten([entry.state for entry in cache]) if isinstance(x, mx.array)]
    return [*states, np.array(model(last, cache=cache))]


@pytest.mark.parametrize(
    ("prefill", "family", "route", "tokens"),
    [
        *((exactly, family, "full", n) for family in ("qwen3", "gemma3_text", "granitemoehybrid") for n in (17, 100)),
        *((in_stock_chunks, family, route, 81) for family in ("qwen3", "gemma3_text") for route in ("auto", "sparse")),
        *((in_a_batch, "qwen3", route, 60) for route in ("auto", "full")),
    ],
)
def test_the_device_gets_the_first_layers_of_a_prompts_call_before_the_last_are_built(
    prefill, family, route, tokens, monkeypatch
):
    handed_over, hand_over, found = [], on_the_way.OnTheWay.hand_over, []
    monkeypatch.setattr(
        on_the_way.OnTheWay, "hand_over", lambda self, stop: handed_over.append(stop) or hand_over(self, stop)
    )
    for layers_at_once in (1, 100):
        handed_over.clear()
        monkeypatch.setattr(on_the_way, "EARLY_TOKENS", 1)
        monkeypatch.setattr(on_the_way, "FIRST_LAYERS", layers_at_once)
        monkeypatch.setattr(on_the_way, "LAYERS_AT_ONCE", layers_at_once)
        model = flux_model(family, route=route)
        found.append(states_and_logits(model, prefill, tokens))
        early = [stop for stop in handed_over if stop < len(model.layers)]
        assert bool(early) == (layers_at_once == 1)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("tokens", "expected"), [(767, []), (768, [1, 4])])
def test_of_a_long_call_the_first_layer_is_handed_over_alone_and_then_a_few_at_once(tokens, expected, monkeypatch):
    pieces = []
    monkeypatch.setattr(on_the_way.mx, "async_eval", lambda states: pieces.append(len(states)))
    for entry in on_the_way.OnTheWay([Held(0) for _ in range(7)], tokens):
        entry.offset = tokens
    assert pieces == expected


def test_a_walk_over_the_cache_that_builds_no_layer_hands_nothing_over(monkeypatch):
    monkeypatch.setattr(on_the_way.OnTheWay, "hand_over", lambda self, stop: pytest.fail("nothing was built"))
    assert len(list(on_the_way.OnTheWay([Held(3) for _ in range(9)], 1000))) == 9


class Held:
    """A cache entry of `offset` tokens."""

    def __init__(self, offset: int):
        self.offset = offset
        self.state = ()
