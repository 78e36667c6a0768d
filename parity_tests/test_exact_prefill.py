"""Exact prefill: stock's bits with every layer full, one set of routes at any chunk size, the oracle's logits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

import flux_mlx
from flux_mlx import exact_prefill, keys_first
from flux_mlx.models import routed_layers
from flux_mlx.spec import PatternConfig, Route
from parity_tests.held_memory import settled_memory
from parity_tests.numpy_llama import NumpyLlama
from parity_tests.tiny_models import flux_model, prompt, stock_model
from parity_tests.tolerances import NEAR_TIE, Reference

TOKENS = 257  # prompt[:-1] is a multiple of the pattern's block


def exact(model, tokens: list[int], step: int = 2048, cache=None) -> tuple[np.ndarray, list[Route]]:
    """Logits of the last token, and the routes."""
    cache = model.make_cache() if cache is None else cache
    last = flux_mlx.prefill(model, mx.array(tokens), cache, prefill_step_size=step)
    return np.array(model(last[None], cache=cache)[0, -1]), flux_mlx.routes(cache)


def chunked(model, tokens: list[int], step: int) -> tuple[np.ndarray, list]:
    """The same through stock's prefill."""
    cache = make_prompt_cache(model)
    first = next(generate_step(mx.array(tokens), model, max_tokens=1, prompt_cache=cache, prefill_step_size=step))
    return np.array(first[1]), cache


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("step", [16, 100, 2048])
def test_full_routes_give_stocks_bits(family, step):
    tokens = prompt(TOKENS)
    stock, flux = stock_model(family), flux_model(family, route="full")
    expected, cache = chunked(stock, tokens, step)
    ours = flux.make_cache()
    last = flux_mlx.prefill(flux, mx.array(tokens), ours, prefill_step_size=step)
    first = next(generate_step(last, flux, max_tokens=1, prompt_cache=ours))
    assert np.array_equal(np.array(first[1]), expected)
    for mine, theirs in zip(ours, cache, strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(mine.keys_and_values(), theirs.keys_and_values(), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_routes_do_not_depend_on_the_chunk_size(seed):
    model, tokens = flux_model(seed=seed), prompt(TOKENS, seed)
    _, routes, margin = NumpyLlama(model, np.float64)(tokens)
    assert margin > NEAR_TIE
    for step in (16, 100, 512, TOKENS):
        assert exact(model, tokens, step)[1] == routes


def test_the_seeds_take_both_routes():
    taken = {route for seed in range(4) for route in exact(flux_model(seed=seed), prompt(TOKENS, seed))[1]}
    assert taken == {Route.FULL, Route.SPARSE}


def reference(models: list, tokens: list[list[int]]) -> Reference:
    """Oracle and baseline of the last token's logits, `[prompts, vocabulary]`."""
    both = [
        np.stack([NumpyLlama(model, dtype)(row)[0] for model, row in zip(models, tokens, strict=True)])
        for dtype in (np.float64, np.float32)
    ]
    return Reference(*both, "float32")


@pytest.mark.parametrize("step", [64, 2048])
def test_logits_are_the_oracles(step):
    models, tokens = [flux_model(seed=seed) for seed in range(4)], [prompt(TOKENS, seed) for seed in range(4)]
    found = np.stack([exact(model, row, step)[0] for model, row in zip(models, tokens, strict=True)])
    reference(models, tokens).check("logits", found)


def test_the_oracle_sees_a_wrong_window():
    model, tokens = flux_model(), prompt(TOKENS)
    expected = reference([model], [tokens])
    pattern = model.flux.pattern
    wrong = PatternConfig(block_size=pattern.block_size, sink_tokens=pattern.sink_tokens, window_tokens=24)
    with_pattern(model, wrong)
    with pytest.raises(AssertionError, match="over the budget"):
        expected.check("logits", exact(model, tokens)[0][None])


@pytest.mark.parametrize("tokens", [17, 40, 200])
def test_a_stock_run_of_one_chunk_has_exact_routes(tokens):
    for seed in range(4):
        model = flux_model(seed=seed)
        _, cache = chunked(model, prompt(tokens, seed), 2048)
        assert flux_mlx.routes(cache) == exact(model, prompt(tokens, seed))[1]


@pytest.mark.parametrize("route", ["full", (0, 2), "auto"])
@pytest.mark.parametrize("step", [16, 64])
def test_a_second_prompt_follows_the_first(route, step):
    model, tokens = flux_model(route=route), prompt(TOKENS)
    cache = model.make_cache()
    exact(model, tokens[:150], step, cache)
    logits, routes = exact(model, tokens[150:], step, cache)
    if route != "auto":
        np.testing.assert_allclose(logits, exact(model, tokens, 64)[0], atol=1e-4)
        return
    whole = model.make_cache()  # the same turn in one chunk
    exact(model, tokens[:150], 2048, whole)
    expected, expected_routes = exact(model, tokens[150:], 2048, whole)
    assert routes == expected_routes
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def with_pattern(model, pattern: PatternConfig):
    for attn in routed_layers(model).values():
        attn.flux = flux_mlx.FluxConfig(pattern=pattern, router=model.flux.router)
    return model


@pytest.mark.parametrize("name", ["triangle", "xattention"])
def test_patterns_that_know_the_prompt_act_in_exact_prefill(name):
    tokens = prompt(TOKENS)
    pattern = PatternConfig(name, block_size=8, sink_tokens=8, window_tokens=16, last_tokens=40, stride=4)
    streaming, model = flux_model(route="sparse"), with_pattern(flux_model(route="sparse"), pattern)
    assert np.abs(exact(model, tokens)[0] - exact(streaming, tokens)[0]).max() > 1e-3
    np.testing.assert_allclose(chunked(model, tokens, 64)[0], chunked(streaming, tokens, 64)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["streaming", "triangle", "xattention"])
@pytest.mark.parametrize("held", [0, 21])
def test_sparse_prefill_does_not_depend_on_the_chunk_size(name, held):
    pattern = PatternConfig(
        name, block_size=8, sink_tokens=8, window_tokens=16, last_tokens=40, stride=4, threshold=0.5
    )
    model, tokens = with_pattern(flux_model(route="sparse"), pattern), prompt(TOKENS)
    found = []
    for step in (20, 100, 2048):
        cache = model.make_cache()
        if held:
            exact(model, tokens[:held], 2048, cache)
        found.append(exact(model, tokens[held:], step, cache)[0])
    np.testing.assert_allclose(found[0], found[2], atol=1e-4)
    np.testing.assert_allclose(found[1], found[2], atol=1e-4)


def test_xattention_drops_blocks_of_a_prompt_within_the_window():
    pattern = PatternConfig("xattention", block_size=8, sink_tokens=8, window_tokens=512, stride=4, threshold=0.3)
    model, tokens = with_pattern(flux_model(route="sparse"), pattern), prompt(TOKENS)
    assert np.abs(exact(model, tokens)[0] - exact(flux_model(route="full"), tokens)[0]).max() > 1e-3


@pytest.mark.parametrize(("family", "come_first"), [("llama", True), ("qwen3", True), ("phi3", False)])
def test_keys_are_written_before_attention_waits_for_the_device(monkeypatch, family, come_first):
    """Behind work that waits and reads them, MLX would copy all of them for every chunk."""
    model, done = flux_model(family), []
    hand_over, update = exact_prefill._Ahead.hand_over, KVCache.update_and_fetch

    def handed_over(self, entry, *work):
        done.append(("attention", id(entry.kv)))
        return hand_over(self, entry, *work)

    def written(kv, keys, values):
        done.append(("keys", id(kv)))
        return update(kv, keys, values)

    monkeypatch.setattr(exact_prefill._Ahead, "hand_over", handed_over)
    monkeypatch.setattr(KVCache, "update_and_fetch", written)
    cache = model.make_cache()
    flux_mlx.prefill(model, mx.array(prompt(10)), cache)
    for turn in range(2):
        done.clear()
        flux_mlx.prefill(model, mx.array(prompt(TOKENS, turn)), cache, prefill_step_size=32)
        for entry in cache:
            order = [what for what, kv in done if kv == id(entry.kv)]
            assert order == (["keys"] * 8 + ["attention"] * 8 if come_first else ["keys", "attention"] * 8)
            assert entry.kv.offset == 9 + (turn + 1) * (TOKENS - 1)
            assert "update_and_fetch" not in vars(entry.kv)


def test_progress_goes_by_layers():
    model, seen = flux_model(), []
    flux_mlx.prefill(
        model, mx.array(prompt(40)), model.make_cache(), prompt_progress_callback=lambda *at: seen.append(at)
    )
    assert seen == [(done, 4) for done in range(5)]


def counting(seen: Counter[str], name: str, projection: Any) -> Any:
    """The projection, its calls counted."""

    def counted(x: mx.array) -> mx.array:
        seen[name] += 1
        return projection(x)

    return counted


def remembered(cache: list) -> list:
    """Everything that a cache holds, as numpy arrays and numbers."""
    return [np.array(x) if isinstance(x, mx.array) else x for _, x in tree_flatten([entry.state for entry in cache])]


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gemma3_text", {"num_hidden_layers": 6})])
@pytest.mark.parametrize("at", [2, 4])
def test_an_interrupted_prefill_leaves_the_cache_as_it_was(family, changes, at):
    model, tokens = flux_model(family, **changes), prompt(TOKENS)
    cache, untouched = model.make_cache(), model.make_cache()
    exact(model, tokens[:100], 64, cache)
    exact(model, tokens[:100], 64, untouched)

    def interrupt(done: int, total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux_mlx.prefill(model, mx.array(tokens[100:]), cache, prompt_progress_callback=interrupt)
    assert flux_mlx.routes(cache) == flux_mlx.routes(untouched)
    assert [entry.offset for entry in cache] == [entry.offset for entry in untouched]
    logits = [exact(model, tokens[100:], 64, one)[0] for one in (cache, untouched)]
    np.testing.assert_array_equal(*logits)
    for mine, theirs in zip(remembered(cache), remembered(untouched), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("family", "route"), [("llama", "auto"), ("llama", "full"), ("phi3", "auto")])
def test_a_prefill_interrupted_within_a_layer_leaves_the_cache_as_it_was(monkeypatch, family, route):
    """Behind it another prompt: one's own keys, written before the interruption, would hide a mistake."""
    model, done = flux_model(family, route=route), []
    cache, untouched = model.make_cache(), model.make_cache()
    for one in (cache, untouched):
        exact(model, prompt(100), 64, one)
    hand_over = exact_prefill._Ahead.hand_over

    def interrupted(self, *work):
        done.append(work)
        if len(done) == 11:  # the second layer's third chunk
            raise KeyboardInterrupt
        return hand_over(self, *work)

    with monkeypatch.context() as patch:
        patch.setattr(exact_prefill._Ahead, "hand_over", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flux_mlx.prefill(model, mx.array(prompt(TOKENS, 1)), cache, prefill_step_size=32)
    assert flux_mlx.routes(cache) == flux_mlx.routes(untouched)
    assert [entry.offset for entry in cache] == [entry.offset for entry in untouched]
    logits = [exact(model, prompt(150, 2), 32, one)[0] for one in (cache, untouched)]
    np.testing.assert_array_equal(*logits)
    for mine, theirs in zip(cache, untouched, strict=True):
        for array, other in zip(mine.keys_and_values(), theirs.keys_and_values(), strict=True):
            np.testing.assert_array_equal(np.array(array), np.array(other))
        np.testing.assert_array_equal(mine.counters, theirs.counters)
        np.testing.assert_array_equal(np.array(mine.pooled()), np.array(theirs.pooled()))


@pytest.mark.parametrize("step", [5, 16, 100])
def test_pools_are_those_of_the_whole_prompt_where_chunks_are_shorter_than_they(step):
    """250 tokens: the last chunk holds less than a pool's 12."""
    model, pools = flux_model(), []
    for one in (step, 2048):
        cache = model.make_cache()
        flux_mlx.prefill(model, mx.array(prompt(251)), cache, prefill_step_size=one)
        pools.append([np.array(entry.pooled()) for entry in cache])
    np.testing.assert_allclose(pools[0], pools[1], atol=1e-5)


@pytest.mark.parametrize(("route", "chunks"), [("auto", 4), ("full", 4), ("auto", 10), ("full", 10)])
def test_what_is_projected_once_and_what_twice(monkeypatch, route, chunks):
    """Of four chunks all is kept; of ten the router's ends, and keys are projected again where queries are not kept.

    MLX computes none of what it projects again: attention takes the keys that are written.
    """
    model, step = flux_model(route=route), 30
    seen: Counter[str] = Counter()
    layer = model.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        monkeypatch.setattr(layer, name, counting(seen, name, layer[name]))
    held, buffers = [], []
    hand_over, update = exact_prefill._Ahead.hand_over, KVCache.update_and_fetch

    def handed_over(self, entry, *work):
        if entry is cache[1]:
            held.append(len(entry.projected))
        return hand_over(self, entry, *work)

    def written(kv, keys, values):
        update(kv, keys, values)
        buffers.append(kv.keys.shape[2])

    monkeypatch.setattr(exact_prefill._Ahead, "hand_over", handed_over)
    monkeypatch.setattr(KVCache, "update_and_fetch", written)
    cache = model.make_cache()
    flux_mlx.prefill(model, mx.array(prompt(step * chunks + 1)), cache, prefill_step_size=step)
    kept = chunks if chunks <= keys_first.CHUNKS_KEPT else 2 * (route == "auto")
    assert seen["q_proj"] == chunks
    assert seen["k_proj"] == chunks + (chunks - kept)
    assert held == ([3, 2, 1, 0] if chunks == 4 else [max(0, kept - 1)] * 9 + [0])
    assert set(buffers) == {-(-step * chunks // 256) * 256}


def test_memory_grows_with_the_prompt_not_with_the_chunks():
    model = flux_model()
    tokens = mx.array(prompt(4000))
    held = []
    for step in (64, 4096):
        cache = model.make_cache()
        before = settled_memory()
        flux_mlx.prefill(model, tokens, cache, prefill_step_size=step)
        held.append(mx.get_active_memory() - before)
        if step == 64:
            peak = mx.get_peak_memory() - before
    buffer_bytes = 4 * tokens.size * model.args.hidden_size
    assert held[0] <= 1.1 * held[1]
    assert peak <= held[0] + 6 * buffer_bytes


@pytest.mark.parametrize("start", [0, 10_000])
def test_keys_are_quantised_layer_by_layer(start):
    model, tokens = flux_model(), prompt(TOKENS)
    cache = model.make_cache()
    flux_mlx.prefill(model, tokens, cache, kv_bits=8, kv_group_size=32, quantized_kv_start=start)
    assert {type(entry.kv).__name__ for entry in cache} == {"KVCache" if start else "QuantizedKVCache"}
    logits = np.array(model(mx.array([tokens[-1:]]), cache=cache)[0, -1])
    assert np.abs(logits - exact(model, tokens)[0]).max() < 0.1


def test_one_token_needs_no_prefill():
    model = flux_model()
    cache = model.make_cache()
    assert flux_mlx.prefill(model, mx.array([5]), cache).tolist() == [5]
    assert cache[0].offset == 0


def test_bad_input_is_refused():
    model = flux_model()
    cases = [
        ({"prompt": mx.array([], mx.int32)}, r"prompt must be int \[L\] with L >= 1, got shape \(0,\)"),
        ({"prompt": mx.array([[1, 2]])}, r"got shape \(1, 2\)"),
        ({"prefill_step_size": 0}, "prefill_step_size must be 1 or more, got 0"),
        ({"cache": model.make_cache()[:2]}, "the cache has 2 entries, the model 4 layers"),
    ]
    for changes, message in cases:
        arguments = {"prompt": mx.array([1, 2, 3]), "cache": model.make_cache(), **changes}
        with pytest.raises(ValueError, match=message):
            flux_mlx.prefill(model, **arguments)
    rows = [type(entry).merge([entry, entry]) for entry in model.make_cache()]
    with pytest.raises(ValueError, match="must be of one row"):
        flux_mlx.prefill(model, mx.array([1, 2, 3]), rows)
