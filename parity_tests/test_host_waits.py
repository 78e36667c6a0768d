"""What routing costs the host: waits for the device, evaluations, Python calls; all counted, none timed."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

import flux_mlx
from flux_mlx import exact_prefill, noted_calls, routed_block, router_state
from flux_mlx.router_decision import Decision
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


def test_an_answer_that_leaves_the_window_waits_once(waits):
    model = flux_model()
    cache, last = prefilled(model, prompt(17), waits)
    decode(model, cache, last, 40)
    assert waits["route"] == 1
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
    return [[0 if call.x is None else call.x.shape[1] for call in entry.noted] for entry in cache]


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
    for _ in range(noted_calls.NOTED_CALLS - 1):
        mx.eval(model(mx.array([prompt(17)]), cache=cache))
    assert {len(entry.noted) for entry in cache} == {noted_calls.NOTED_CALLS - 1}
    mx.eval(model(mx.array([prompt(17)]), cache=cache))
    assert {len(entry.noted) for entry in cache} == {0}


def test_a_copied_cache_shares_the_noted_layers():
    model = flux_model()
    cache, _ = prefilled(model, prompt(17), Counter())
    copied = copy.deepcopy(cache)
    assert all(a.noted[0].layer is b.noted[0].layer for a, b in zip(cache, copied, strict=True))
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


@pytest.fixture
def pieces(monkeypatch) -> list[nn.Module]:
    """Blocks whose output went to the device as soon as it was built."""
    seen, hand_over = [], routed_block.RoutedBlock.hand_over

    def noted(self, out, cache):
        seen.append(self)
        hand_over(self, out, cache)

    monkeypatch.setattr(routed_block.RoutedBlock, "hand_over", noted)
    return seen


@pytest.mark.parametrize(
    ("prefill", "family", "route", "tokens"),
    [
        *((exactly, family, "full", n) for family in ("qwen3", "gemma3_text", "granitemoehybrid") for n in (17, 100)),
        *((in_stock_chunks, family, route, 81) for family in ("qwen3", "gemma3_text") for route in ("auto", "sparse")),
        *((in_a_batch, "qwen3", route, 60) for route in ("auto", "full")),
    ],
)
def test_pieces_of_a_prompts_call_make_what_the_whole_makes(prefill, family, route, tokens, monkeypatch, pieces):
    found = []
    monkeypatch.setattr("flux_mlx.models.LAYERS_AT_ONCE", 1)
    for least in (1, 100_000):
        monkeypatch.setattr(routed_block, "EARLY_TOKENS", least)
        pieces.clear()
        model = flux_model(family, route=route)
        found.append(states_and_logits(model, prefill, tokens))
        assert bool(pieces) == (least == 1)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("family", "rows", "tokens", "handed_over"),
    [
        ("llama", 1, 767, []),
        ("llama", 1, 768, [0, 4]),
        ("llama", 2, 384, [0, 4]),
        ("gemma3_text", 1, 768, [1, 5]),  # of its layers every other one is routed
    ],
)
def test_of_a_long_call_the_first_layer_is_handed_over_alone_and_then_a_few_at_once(
    family, rows, tokens, handed_over, pieces
):
    model = flux_model(family, num_hidden_layers=9)
    model(mx.zeros((rows, tokens), mx.int32), cache=model.make_cache())
    assert [i for i, layer in enumerate(model.layers) if any(layer is one for one in pieces)] == handed_over


def test_of_layers_that_are_far_apart_each_hands_over():
    model = flux_model("gemma3_text", num_hidden_layers=26, sliding_window_pattern=6)
    assert [i for i, layer in enumerate(model.layers) if getattr(layer, "hands_over", False)] == [5, 11, 17, 23]


def test_exact_prefill_hands_chunks_over_itself(monkeypatch):
    monkeypatch.setattr(routed_block, "EARLY_TOKENS", 1)
    model, start, starters = flux_model(), mx.async_eval, Counter()

    def counted(*arrays):
        starters[sys._getframe(1).f_globals["__name__"]] += 1
        start(*arrays)

    monkeypatch.setattr(mx, "async_eval", counted)
    flux_mlx.prefill(model, mx.array(prompt(100)), model.make_cache(), prefill_step_size=40)
    assert starters["flux_mlx.exact_prefill"] > 0
    assert starters["flux_mlx.routed_block"] == 0


@pytest.mark.parametrize("route", ["full", "sparse"])
def test_gradients_and_compilation_go_through_a_long_call_with_a_cache(route, monkeypatch):
    model, tokens = flux_model(route=route), mx.array([prompt(100)])

    def loss(weights):
        model.update(weights)
        return model(tokens, cache=model.make_cache()).astype(mx.float32).sum()

    found = []
    for least in (1, 100_000):
        monkeypatch.setattr(routed_block, "EARLY_TOKENS", least)
        parameters = model.trainable_parameters()
        found.append([np.array(x) for _, x in tree_flatten(mx.grad(loss)(parameters))])
        model.update(parameters)
        found[-1].append(np.array(mx.compile(lambda x: model(x, cache=model.make_cache()))(tokens)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
