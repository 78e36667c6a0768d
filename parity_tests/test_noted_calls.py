"""Calls that are only noted: a cache that is asked late says and computes what one that looks at every call does."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flux_mlx
from flux_mlx import noted_calls
from flux_mlx.cache import CacheList, can_trim, tokens_held
from flux_mlx.models import apply, routed_layers, set_kv_policy, set_route
from flux_mlx.router_counters import Counter
from flux_mlx.router_decision import Decision
from flux_mlx.spec import FluxConfig, PatternConfig, Route, RouterConfig
from parity_tests.tiny_models import prompt, randomise_routers, stock_model

PATTERN = PatternConfig(block_size=8, sink_tokens=8, window_tokens=128)
ROUTER = RouterConfig(pool_tokens=40)  # more than the 16 tokens of the shortest prompt, as by default
LAYERS = 4
TOKENS = st.sampled_from([1, 1, 1, 2, 5, 15, 16, 17, 30, 50, 85, 100])
STEPS = st.sampled_from([20, 64, 2048])
POLICIES = st.sampled_from(["auto", "auto", "full", "sparse", (1, 3)])


def routed_model():
    model = apply(stock_model(), FluxConfig(pattern=PATTERN, router=ROUTER))
    randomise_routers(model)
    return model


MODEL = routed_model()


class Stopped(BaseException):
    """Ends a prefill, as Ctrl-C does."""


class Caches:
    """Two caches that get the same calls: `late` is not asked for its routes, `early` is after each call.

    Besides, `early` is woken each time: its short calls take the way of all calls, those of `late` the short way.
    """

    def __init__(self) -> None:
        self.late, self.early = MODEL.make_cache(), MODEL.make_cache()
        self.left: list[tuple[list, list]] = []  # copied, and not used since
        self.calls = 0

    def both(self, act: Any) -> None:
        """Act on both; what comes out of it is the same."""
        late, early = act(self.late), act(self.early)
        for entry in self.early:
            entry.counters  # noqa: B018 (looks at what was noted)
            entry.wake()
        if late is not None:
            np.testing.assert_array_equal(np.array(late), np.array(early))

    def tokens(self, n: int) -> mx.array:
        self.calls += 1
        return mx.array(prompt(n, seed=self.calls))

    def call(self, n: int) -> None:
        tokens = self.tokens(n)[None]
        self.both(lambda cache: MODEL(tokens, cache=cache))

    def prefill(self, n: int, step: int) -> None:
        tokens = self.tokens(n + 1)
        self.both(lambda cache: flux_mlx.prefill(MODEL, tokens, cache, prefill_step_size=step))

    def stop(self, n: int, step: int, layer: int) -> None:
        """A prefill that is interrupted behind a layer."""
        tokens = self.tokens(n + 1)

        def report(done: int, _: int) -> None:
            if done == layer:
                raise Stopped

        def run(cache: list) -> None:
            with suppress(Stopped):
                flux_mlx.prefill(MODEL, tokens, cache, prefill_step_size=step, prompt_progress_callback=report)

        self.both(run)

    def trim(self, n: int) -> None:
        n = min(n, tokens_held(self.late))
        if can_trim(self.late, n):
            self.both(lambda cache: [entry.trim(n) for entry in cache])

    def cut(self, n: int) -> None:
        """A cut within a conversation, which keeps the routes."""
        n = min(n, tokens_held(self.late) - 1)
        if n > 0 and can_trim(self.late, n):
            self.both(lambda cache: [_resumed(entry, n) for entry in cache])

    def route(self, policy: Any) -> None:
        if not any(entry.is_evicted for entry in self.late):  # they refuse to be full
            set_route(MODEL, policy)

    def ask(self, layer: int) -> None:
        """One layer's route, of one of them."""
        assert self.late[layer].routes == self.early[layer].routes

    def evaluate(self) -> None:
        """As stock does after a chunk."""
        mx.eval([entry.state for entry in self.late])

    def copy(self) -> None:
        self.left.append((self.late, self.early))
        self.late, self.early = copy.deepcopy(self.late), copy.deepcopy(self.early)

    def pickle(self) -> None:
        """The pickled ones go on, and what they were made of is left."""
        self.left.append((self.late, self.early))
        self.late, self.early = _pickled(self.late), _pickled(self.early)

    def can_leave(self) -> bool:
        """Whether stock code takes it: there are keys, and all of them."""
        return tokens_held(self.late) > 0 and not any(entry.is_evicted for entry in self.late)

    def through_a_batch(self) -> None:
        if self.can_leave():
            self.late, self.early = (
                [CacheList.merge([entry]).extract(0) for entry in cache] for cache in (self.late, self.early)
            )

    def through_a_file(self) -> None:
        """What loading does: arrays alone are left."""
        if self.can_leave():
            for entry in [*self.late, *self.early]:
                entry.state = entry.state

    def check(self) -> None:
        """Both know the same."""
        for late, early in [*self.left, (self.late, self.early)]:
            for mine, other in zip(late, early, strict=True):
                assert mine.routes == other.routes
                np.testing.assert_array_equal(mine.counters, other.counters)
                mine._flush(), other._flush()
                for found, expected in zip(mine.caches[1].cache, other.caches[1].cache, strict=True):
                    np.testing.assert_array_equal(np.array(found), np.array(expected))


def _pickled(cache: list) -> list:
    return pickle.loads(pickle.dumps(cache))


def _resumed(entry: CacheList, n: int) -> int:
    routes, trimmed = entry.routes, entry.trim(n)
    entry.resume(routes)
    return trimmed


ACTS = st.one_of(
    st.tuples(st.just("call"), TOKENS),
    st.tuples(st.just("call"), TOKENS),
    st.tuples(st.just("prefill"), TOKENS, STEPS),
    st.tuples(st.just("stop"), TOKENS, STEPS, st.integers(0, LAYERS)),
    st.tuples(st.just("trim"), st.integers(1, 40)),
    st.tuples(st.just("cut"), st.integers(1, 40)),
    st.tuples(st.just("route"), POLICIES),
    st.tuples(st.just("ask"), st.integers(0, LAYERS - 1)),
    st.tuples(st.sampled_from(["evaluate", "copy", "pickle", "through_a_batch", "through_a_file"])),
)


@pytest.mark.parametrize("kv_policy", ["keep", "evict"])
@given(acts=st.lists(ACTS, min_size=3, max_size=16), most=st.sampled_from([2, noted_calls.NOTED_CALLS]))
def test_a_cache_asked_late_agrees_with_one_asked_always(kv_policy, acts, most):
    set_kv_policy(MODEL, kv_policy)
    set_route(MODEL, "auto")
    caches = Caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noted_calls, "NOTED_CALLS", most)
        for name, *values in acts:
            getattr(caches, name)(*values)
        caches.check()


@pytest.mark.parametrize("turns", [[50], [17, 1, 20], [100]])
def test_a_pickled_cache_knows_what_noted_calls_come_to(turns):
    set_route(MODEL, "auto")
    set_kv_policy(MODEL, "keep")
    cache = MODEL.make_cache()
    for seed, tokens in enumerate(turns):
        MODEL(mx.array([prompt(tokens, seed=seed)]), cache=cache)
    assert all(entry.noted for entry in cache)
    expected = flux_mlx.routes(copy.deepcopy(cache))
    twin = _pickled(cache)
    assert flux_mlx.routes(twin) == flux_mlx.routes(cache) == expected
    assert Route.UNSET not in expected
    more = mx.array([prompt(150, seed=9)])  # beyond sink and window
    np.testing.assert_array_equal(np.array(MODEL(more, cache=twin)), np.array(MODEL(more, cache=cache)))


def test_pickling_reads_no_decision():
    """Kernels under way may read it; the host is not to, where it is."""
    set_route(MODEL, "auto")
    cache = MODEL.make_cache()
    MODEL(mx.array([prompt(50)]), cache=cache)
    for entry in cache:
        entry.catch_up()
    decisions = [entry.decision for entry in cache]
    twin = _pickled(cache)
    assert all(entry.decision is decision is not None for entry, decision in zip(cache, decisions, strict=True))
    assert all(entry.decision is None for entry in twin)
    assert flux_mlx.routes(twin) == flux_mlx.routes(cache)


def test_an_interrupted_wait_for_a_route_can_be_repeated(monkeypatch):
    set_route(MODEL, "auto")
    cache = MODEL.make_cache()
    flux_mlx.prefill(MODEL, mx.array(prompt(51)), cache)
    expected, read = flux_mlx.routes(copy.deepcopy(cache)), Decision.read

    def interrupted(decision: Decision) -> list:
        read(decision)
        raise Stopped

    monkeypatch.setattr(Decision, "read", interrupted)
    with pytest.raises(Stopped):
        flux_mlx.routes(cache)
    monkeypatch.setattr(Decision, "read", read)
    assert flux_mlx.routes(cache) == expected


def test_a_cache_that_was_evaluated_and_then_decoded_keeps_no_layer_and_no_input():
    model = routed_model()
    cache = model.make_cache()
    model(mx.array([prompt(50)]), cache=cache)
    mx.eval([entry.state for entry in cache])  # as stock does after a chunk
    for _ in range(3):
        mx.eval(model(mx.array([[3]]), cache=cache))
    layers = [weakref.ref(attn) for attn in routed_layers(model).values()]
    del model
    gc.collect()
    assert [layer() for layer in layers] == [None] * LAYERS
    assert all(entry.inputs is None for entry in cache)
    assert Route.UNSET not in flux_mlx.routes(cache)


def test_a_turn_in_chunks_after_a_short_one_that_nobody_looked_at():
    """The second turn's pool has the first turn's tokens in front."""
    set_route(MODEL, "auto")
    caches = Caches()
    caches.prefill(20, 2048)
    caches.prefill(256, 64)
    caches.check()
    assert {tuple(entry.counters[0, [Counter.PREFIX, Counter.PREFIX_END]]) for entry in caches.late} == {(40, 40)}


def test_an_evicted_cache_keeps_no_inputs_of_later_turns():
    """It is sparse for good: nobody waits for a decision, with which pools are computed."""
    model = routed_model()
    set_route(model, "sparse")
    set_kv_policy(model, "evict")
    cache = model.make_cache()
    last = flux_mlx.prefill(model, mx.array(prompt(300)), cache)
    mx.eval(model(last[None], cache=cache))
    set_route(model, "auto")
    for turn in range(3):
        last = flux_mlx.prefill(model, mx.array(prompt(20, seed=turn)), cache)
        for _ in range(3):
            mx.eval(model(last[None], cache=cache))
    assert {entry.is_evicted for entry in cache} == {True}
    assert all(entry.inputs is None for entry in cache)
    assert [_operations(entry.caches[1].cache) for entry in cache] == [0] * LAYERS


def _operations(arrays: list[mx.array]) -> int:
    """How many operations wait for an evaluation of arrays, which hold on to the operands until then."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("rectangle")
