"""mlx-lm's loop over a prompt evaluates the caches' state after each chunk: what that makes of noted calls."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import LRUPromptCache, load_prompt_cache, save_prompt_cache

import flux_mlx
from benchmarks.mlx_timeline import stock_prefill
from flux_mlx.routed_attention import RoutedAttention
from parity_tests.late_routes import LAYERS, check_alike, play_device
from parity_tests.tiny_models import PATTERN, ROUTER, flux_model, prompt

WIDE = dataclasses.replace(PATTERN, window_tokens=512)


@pytest.fixture
def pooled(monkeypatch) -> list[int]:
    """Tokens of which queries were projected for a router, call by call."""
    seen, query_rows = [], RoutedAttention.query_rows
    monkeypatch.setattr(RoutedAttention, "query_rows", lambda self, x: seen.append(x.shape[1]) or query_rows(self, x))
    return seen


def by_stock(model: Any, tokens: list[int], step: int, answer: int = 1) -> list[Any]:
    """The cache behind mlx-lm's own generation."""
    cache = model.make_cache()
    for _ in generate_step(mx.array(tokens), model, max_tokens=answer, prompt_cache=cache, prefill_step_size=step):
        pass
    return cache


def by_hand(model: Any, tokens: list[int], step: int) -> list[Any]:
    """The same calls, but all of the state is brought up to date behind each."""
    cache, last = model.make_cache(), len(tokens) - 1
    for start in range(0, last, step):
        model(mx.array([tokens[start : min(start + step, last)]]), cache=cache)
        mx.eval([entry.state for entry in cache])
    token = mx.array([tokens[-1:]])
    for _ in range(2):  # generation begins a token before it gives the one before
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
    mx.eval(token)
    return cache


@pytest.mark.parametrize("step", [40, 2048])
def test_a_prompt_within_sink_and_window_pays_for_no_router_in_stock_generation(step, pooled):
    model = flux_model(pattern=WIDE)
    cache = by_stock(model, prompt(100), step)
    assert not pooled
    widths = {call.x.shape[1] for entry in cache for call in entry.noted if call.layer}
    assert widths == {2 * ROUTER.pool_tokens, *((99 % step,) if step < 99 else ())}  # what is read of 40, 40 and 19
    assert all(entry.state for entry in cache)
    assert len(pooled) >= LAYERS


def evaluated_by_stock(monkeypatch, model: Any, tokens: list[int]) -> tuple[list[Any], list[mx.array]]:
    """The cache behind a prompt's one chunk, and every array that mlx-lm evaluated."""
    trees: list[Any] = []
    evaluate = mx.eval
    cache = model.make_cache()
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", lambda *some: trees.extend(some) or evaluate(*some))
        stock_prefill(model, mx.array(tokens), 2048, cache)
    return cache, [x for _, x in tree_flatten(trees) if isinstance(x, mx.array)]


def is_among(array: mx.array, arrays: list[mx.array]) -> bool:
    return any(array is one for one in arrays)


def test_stock_evaluates_the_inputs_of_noted_calls(monkeypatch):
    cache, arrays = evaluated_by_stock(monkeypatch, flux_model(pattern=WIDE), prompt(100))
    assert all(is_among(entry.noted[0].x, arrays) for entry in cache)


def test_stock_evaluates_pools_and_decisions_that_stay_on_the_device(monkeypatch):
    play_device(monkeypatch)
    cache, arrays = evaluated_by_stock(monkeypatch, flux_model(), prompt(100))
    for entry in cache:
        assert is_among(entry.decision.codes, arrays)
        assert all(is_among(pool, arrays) for pool in entry.caches[1].cache)
        assert entry.inputs is None  # the pools held on to them


def test_a_cache_that_is_kept_holds_neither_model_nor_inputs():
    model = flux_model(pattern=WIDE)
    layer, cache = weakref.ref(model.layers[0].self_attn), by_stock(model, prompt(100), 2048)
    LRUPromptCache().insert_cache("model", prompt(100), cache)
    del model
    gc.collect()
    assert layer() is None
    assert not any(entry.noted for entry in cache)


@pytest.mark.parametrize("tokens", [17, 100, 257])
@pytest.mark.parametrize("step", [9, 40, 2048])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_state_becomes_what_it_is_behind_calls_by_hand(family, tokens, step):
    model = flux_model(family)
    mine, theirs = (
        [e for e in made(model, prompt(tokens), step) if hasattr(e, "routes")] for made in (by_stock, by_hand)
    )
    check_alike(mine, theirs)


def test_a_saved_prompt_holds_what_was_only_noted(tmp_path):
    model, file = flux_model(), str(tmp_path / "cache.safetensors")
    cache = by_stock(model, prompt(17), 2048)
    save_prompt_cache(file, cache)
    check_alike(load_prompt_cache(file), by_hand(model, prompt(17), 2048))


@pytest.mark.parametrize("tokens", [17, 257])
def test_another_thread_can_compute_what_was_noted(tokens):
    model = flux_model()
    mx.eval(model.parameters())
    expected = by_hand(model, prompt(tokens), 40)
    with ThreadPoolExecutor(1) as pool:
        cache = pool.submit(by_stock, model, prompt(tokens), 40).result()
    check_alike(cache, expected)


def test_a_batch_takes_the_routes_that_its_rows_take_alone():
    model, rows = flux_model(), [prompt(257, seed) for seed in range(3)]
    generator = BatchGenerator(model, max_tokens=1, prefill_step_size=40)
    ids = generator.insert(rows)
    caches = {}
    while len(caches) < len(rows):
        caches |= {r.uid: r.prompt_cache for r in generator.next()[1] if r.finish_reason}
    for uid, row in zip(ids, rows, strict=True):
        alone = by_hand(model, row, 40)
        assert flux_mlx.routes(caches[uid]) == flux_mlx.routes(alone)
        for mine, theirs in zip(caches[uid], alone, strict=True):
            assert mine.state
            assert theirs.state
            pools = (np.array(entry.caches[1].cache[2]) for entry in (mine, theirs))
            np.testing.assert_allclose(*pools, atol=1e-5)
