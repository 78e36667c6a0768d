"""The first call over an empty KV cache leaves what stock leaves, and hands attention what stock hands it."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from flux_mlx.benchmark_models import stock_view
from flux_mlx.exact_prefill import prefill
from flux_mlx.first_keys import FirstKeys
from parity_tests.tiny_models import flux_model, prompt


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tokens", [1, 255, 256, 300])
def test_the_cache_holds_what_stocks_holds(rows, tokens):
    k, v = (mx.random.normal((rows, tokens, 2, 8)).swapaxes(1, 2) for _ in range(2))  # as projections come
    stock, ours = KVCache(), KVCache()
    seen = FirstKeys.of(ours).update_and_fetch(k, v)
    for found, wanted in zip(seen, stock.update_and_fetch(k, v), strict=True):
        assert mx.array_equal(found, wanted)
    for again in range(2):
        assert ours.offset == stock.offset
        assert ours.keys.shape == stock.keys.shape
        assert mx.array_equal(ours.keys, stock.keys)
        assert mx.array_equal(ours.values, stock.values)
        if not again:
            ours.update_and_fetch(k, v)
            stock.update_and_fetch(k, v)


def test_only_an_empty_stock_cache_is_stood_in_for():
    used = KVCache()
    used.update_and_fetch(mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 8)))
    rotating = RotatingKVCache(8)
    assert FirstKeys.of(used) is used
    assert FirstKeys.of(rotating) is rotating
    empty = FirstKeys.of(KVCache())
    assert (empty.offset, empty.step) == (0, KVCache.step)
    assert not hasattr(empty, "bits")  # by which mlx-lm tells quantised keys


def test_what_is_held_is_in_its_own_memory_and_order():
    k = mx.arange(2 * 256 * 8).reshape(1, 256, 2, 8).swapaxes(1, 2)
    cache = KVCache()
    FirstKeys.of(cache).update_and_fetch(k, k)
    kept = memoryview(mx.array(cache.keys))
    assert kept.c_contiguous
    before = mx.array(k)
    cache.keys[..., :1, :] = 0
    mx.eval(cache.keys)
    assert mx.array_equal(k, before)


def test_short_prompts_leave_stocks_keys_bit_for_bit():
    flux = flux_model("qwen3")
    ids = mx.array(prompt(flux.flux.pattern.dense_tokens))
    cache, wanted = flux.make_cache(), make_prompt_cache(stock_view(flux))
    prefill(flux, ids, cache)
    stock_view(flux)(ids[None, :-1], cache=wanted)
    for entry, stock in zip(cache, wanted, strict=True):
        assert mx.array_equal(entry.kv.keys, stock.keys)
        assert mx.array_equal(entry.kv.values, stock.values)


@pytest.mark.parametrize("tokens", [1, 256, 300])
def test_attention_leaves_nothing_to_compute_in_the_cache(tokens):
    """What waits holds on to all that the projections made, in every layer."""
    x, cache = mx.random.normal((1, tokens, 2, 8)), KVCache()
    mx.eval(FirstKeys.of(cache).update_and_fetch(x.swapaxes(1, 2), 2 * x.swapaxes(1, 2)))
    graph = io.StringIO()
    mx.export_to_dot(graph, cache.keys, cache.values)
    assert "rectangle" not in graph.getvalue()


def test_another_thread_may_decode_once_the_first_call_is_computed():
    """MLX computes work that a thread left undone in that thread only."""
    flux, wanted = flux_model("qwen3"), flux_model("qwen3")
    mx.eval(flux.parameters(), wanted.parameters())
    cache, calls = flux.make_cache(), [mx.array([prompt(20)]), mx.array([[3]])]

    def call(ids: mx.array) -> mx.array:
        with mx.stream(mx.new_stream(mx.default_device())):
            out = flux(ids, cache=cache)
            mx.eval(out)
            return out

    for ids in calls:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(call, ids).result()
    expected = wanted.make_cache()
    for ids in calls:
        out = wanted(ids, cache=expected)
    assert mx.allclose(found, out, atol=1e-5)
