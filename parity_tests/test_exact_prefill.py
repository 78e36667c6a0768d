"""Exact prefill: stock's bits with every layer full, one set of routes at any chunk size, the oracle's logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import flux_mlx
from flux_mlx.spec import PatternConfig, Route
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
    for layer in model.layers:
        layer.self_attn.flux = flux_mlx.FluxConfig(pattern=wrong, router=model.flux.router)
    with pytest.raises(AssertionError, match="over the budget"):
        expected.check("logits", exact(model, tokens)[0][None])


@pytest.mark.parametrize("tokens", [17, 40, 200])
def test_a_stock_run_of_one_chunk_has_exact_routes(tokens):
    for seed in range(4):
        model = flux_model(seed=seed)
        _, cache = chunked(model, prompt(tokens, seed), 2048)
        assert flux_mlx.routes(cache) == exact(model, prompt(tokens, seed))[1]


@pytest.mark.parametrize("route", ["full", (0, 2), "auto"])
def test_a_second_prompt_follows_the_first(route):
    model, tokens = flux_model(route=route), prompt(TOKENS)
    cache = model.make_cache()
    exact(model, tokens[:150], 64, cache)
    logits, routes = exact(model, tokens[150:], 64, cache)
    if route == "auto":
        assert set(routes) <= {Route.FULL, Route.SPARSE}
    else:
        np.testing.assert_allclose(logits, exact(model, tokens, 64)[0], atol=1e-4)


def test_patterns_that_know_the_prompt_act_in_exact_prefill():
    tokens = prompt(TOKENS)
    for name in ("triangle", "xattention"):
        pattern = PatternConfig(name, block_size=8, sink_tokens=8, window_tokens=16, last_tokens=40, stride=4)
        streaming = flux_model(route="sparse")
        model = flux_model(route="sparse")
        for layer in model.layers:
            layer.self_attn.flux = flux_mlx.FluxConfig(pattern=pattern, router=model.flux.router)
        assert np.abs(exact(model, tokens)[0] - exact(streaming, tokens)[0]).max() > 1e-3
        np.testing.assert_allclose(chunked(model, tokens, 64)[0], chunked(streaming, tokens, 64)[0], atol=1e-5)


def test_progress_goes_by_layers():
    model, seen = flux_model(), []
    flux_mlx.prefill(
        model, mx.array(prompt(40)), model.make_cache(), prompt_progress_callback=lambda *at: seen.append(at)
    )
    assert seen == [(done, 4) for done in range(5)]


def test_an_interrupted_prefill_leaves_the_cache_as_it_was():
    model, tokens = flux_model(), prompt(TOKENS)
    cache = model.make_cache()
    exact(model, tokens[:100], 64, cache)

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux_mlx.prefill(model, mx.array(tokens[100:]), cache, prompt_progress_callback=interrupt)
    assert [entry.offset for entry in cache] == [100] * 4
    assert exact(model, tokens[100:], 64, cache)[0].shape == (211,)


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
