"""The routed cache: what stock code does to caches keeps routes and pools, row by row."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.models.cache import CacheList as StockCacheList

from flux_mlx import describe_routes, routes
from flux_mlx.cache import CacheList, Counter
from flux_mlx.models import apply, set_route
from flux_mlx.spec import FluxConfig, Route, RouterConfig, pool_queries
from parity_tests.tiny_models import PATTERN, ROUTER, flux_model, prompt, stock_model

D, P = 6, 5
MODEL = flux_model()


def run(model, tokens: list[int], cache=None, step: int = 64) -> list:
    """The cache after a prompt in chunks."""
    cache = model.make_cache() if cache is None else cache
    x = mx.array(tokens)[None]
    for i in range(0, len(tokens), step):
        model(x[:, i : i + step], cache=cache)
        mx.eval([entry.state for entry in cache])
    return cache


def last_logits(model, cache, token: int = 7) -> np.ndarray:
    """Logits of one more token, of a copy of the cache."""
    return np.array(model(mx.array([[token]]), cache=copy.deepcopy(cache))[0, -1])


def grow(cache: CacheList, tokens: int) -> None:
    """Append keys and values."""
    cache.kv.update_and_fetch(mx.zeros((1, 1, tokens, 1)), mx.zeros((1, 1, tokens, 1)))


def feed(cache: CacheList, queries: np.ndarray) -> None:
    """Pool queries `[L, D]` as a prompt chunk, then append their keys."""
    x = mx.array(queries)
    cache.feed(0, x[:P], x[-P:], len(queries))
    grow(cache, len(queries))


def draw_queries(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, D)).astype(np.float32)


def spec_pool(queries: np.ndarray) -> np.ndarray:
    return pool_queries(queries[None, :, None], P)


@given(cuts=st.lists(st.integers(1, 13), min_size=1, max_size=6))
def test_a_pool_fed_in_chunks_is_the_specs(cuts):
    queries, cache, start = draw_queries(sum(cuts)), CacheList.new(D, P), 0
    for tokens in cuts:
        feed(cache, queries[start : start + tokens])
        start += tokens
    np.testing.assert_allclose(np.array(cache.pooled()), spec_pool(queries), atol=1e-6)


@given(first=st.integers(1, 20), keep=st.integers(0, 20), rest=st.integers(1, 20))
def test_a_cut_pool_is_the_prefix_that_is_left_and_the_new_tokens(first, keep, rest):
    keep = min(keep, first)
    queries, cache = draw_queries(first + rest), CacheList.new(D, P)
    feed(cache, queries[:first])
    cache.set_routes([Route.SPARSE])
    assert cache.trim(first - keep) == first - keep
    assert cache.routes == [Route.SPARSE if keep == first else Route.UNSET]
    feed(cache, queries[first:])
    new = queries[first:]
    recent = np.concatenate([queries[:first], new])[-P:] if keep == first else new[-P:]
    expected = np.concatenate([np.concatenate([queries[:keep], new])[:P], recent]).mean(0)
    np.testing.assert_allclose(np.array(cache.pooled())[0], expected, atol=1e-6)


def test_trimming_an_answer_keeps_the_route():
    cache = run(MODEL, prompt(61))
    before = routes(cache)
    run(MODEL, prompt(9, 1), cache, step=1)
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 9) == 9
    assert routes(cache) == before
    trim_prompt_cache(cache, 1)
    assert routes(cache) == [Route.UNSET] * 4


def test_trimmed_and_refilled_is_cold():
    set_route(model := flux_model(), (0, 2))
    tokens = prompt(61)
    cold = run(model, tokens[:-1])
    cache = run(model, tokens[:40] + prompt(30, 9))
    trim_prompt_cache(cache, 30)
    run(model, tokens[40:-1], cache)
    assert routes(cache) == routes(cold)
    np.testing.assert_allclose(last_logits(model, cache), last_logits(model, cold), atol=1e-5)


def test_saved_by_stock_functions_is_live(tmp_path):
    live = run(MODEL, prompt(61))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), live)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [type(entry) for entry in loaded] == [StockCacheList] * 4
    expected = last_logits(MODEL, live)
    assert np.array_equal(last_logits(MODEL, loaded), expected)
    assert routes(loaded) == routes(live)
    assert all(np.array_equal(a.counters, b.counters) for a, b in zip(loaded, live, strict=True))
    assert describe_routes(loaded) == describe_routes(live)


def test_a_copy_goes_its_own_way():
    cache = run(MODEL, prompt(61))
    kept, before = copy.deepcopy(cache), routes(cache)
    expected = last_logits(MODEL, kept)
    trim_prompt_cache(cache, 30)
    run(MODEL, prompt(50, 3), cache)
    assert routes(kept) == before
    assert np.array_equal(last_logits(MODEL, kept), expected)


def test_a_batch_keeps_every_rows_state():
    rows = [run(MODEL, prompt(tokens, seed)) for seed, tokens in enumerate((61, 20, 7, 45))]
    before = [routes(row) for row in rows]
    assert len(set(map(tuple, before))) >= 3
    counters = [[entry.counters.copy() for entry in row] for row in rows]
    batch = [entries[0].merge(list(entries)) for entries in zip(*rows[:3], strict=True)]
    for entry, other in zip(batch, [e.merge([e]) for e in rows[3]], strict=True):
        entry.extend(other)
    assert routes(batch) == [list(layer) for layer in zip(*before, strict=True)]
    for entry in batch:
        entry.filter([3, 0, 1])
    for at, row in enumerate((3, 0, 1)):
        single = [entry.extract(at) for entry in batch]
        assert routes(single) == before[row]
        assert all(np.array_equal(a.counters, b) for a, b in zip(single, counters[row], strict=True))
        assert np.array_equal(last_logits(MODEL, single), last_logits(MODEL, rows[row]))


def test_changes_made_on_the_host_reach_stock_code():
    cache = run(MODEL, prompt(61))
    for entry in cache:
        entry.set_routes([Route.SPARSE])
    assert all(entry.state[1][0][0][0][0, Counter.ROUTE].item() == Route.SPARSE for entry in cache)
    cache[0].state = run(MODEL, prompt(20))[0].state
    assert cache[0].counters[0, Counter.END] == 20


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_keys_keep_the_route(bits):
    cache = run(MODEL, prompt(61))
    before, expected = routes(cache), last_logits(MODEL, cache)
    quantised = [entry.to_quantized(group_size=32, bits=bits) for entry in cache]
    assert routes(quantised) == before
    assert all(type(entry.kv).__name__ == "QuantizedKVCache" and entry.size() == 61 for entry in quantised)
    assert [entry.to_quantized(group_size=32, bits=bits) for entry in quantised] == quantised
    error = np.abs(last_logits(MODEL, quantised) - expected).max()
    assert 0 < error < {4: 1.0, 8: 0.05}[bits]
    assert all(a == b for a, b in zip(routes(copy.deepcopy(quantised)), before, strict=True))


def test_a_row_of_zeros_means_full():
    cache = MODEL.make_cache()
    assert routes(cache) == [Route.UNSET] * 4
    joined = cache[0].merge([cache[0], run(MODEL, prompt(61))[0]])
    assert joined.routes[0] == Route.UNSET


def test_one_row_serves_a_batch():
    cache = run(MODEL, prompt(61))
    before = routes(cache)
    out = MODEL(mx.array([[7], [7], [9]]), cache=cache_of_three(cache))
    assert np.allclose(out[0, -1], last_logits(MODEL, cache), atol=1e-5)
    assert np.allclose(out[2, -1], last_logits(MODEL, cache, 9), atol=1e-5)
    fresh = MODEL.make_cache()
    MODEL(mx.array([prompt(61), prompt(61, 5)]), cache=fresh)
    assert [layer[0] for layer in routes(fresh)] == before
    assert [layer[1] for layer in routes(fresh)] == routes(run(MODEL, prompt(61, 5)))
    with pytest.raises(ValueError, match=r"\[CacheList\] the cache holds 2 rows, the call 3"):
        MODEL(mx.array([[1], [2], [3]]), cache=fresh)


def cache_of_three(cache: list) -> list:
    """The keys of a one-row cache three times over, its router state once."""
    wide = copy.deepcopy(cache)
    for entry in wide:
        keys, values, offset = entry.kv.state
        entry.kv.state = mx.repeat(keys, 3, axis=0), mx.repeat(values, 3, axis=0), offset
    return wide


# Small calls and turns


def counters(cache, column: Counter) -> int:
    return int(cache[0].counters[0, column])


def test_small_calls_never_route():
    short = ROUTER.min_prefill_tokens - 1
    cache = run(MODEL, prompt(60), step=short)
    assert routes(cache) == [Route.UNSET] * 4
    cache = run(MODEL, prompt(61))
    before = routes(cache)
    for seed in range(4):
        run(MODEL, prompt(short, seed + 20), cache)
    assert routes(cache) == before


def test_one_short_call_inside_a_prompt_is_the_prompts_own():
    cache = run(MODEL, prompt(61))
    run(MODEL, prompt(3, 1), cache)
    run(MODEL, prompt(20, 2), cache)
    assert counters(cache, Counter.TURN) == 81
    assert counters(cache, Counter.BOUND) == 0
    run(MODEL, prompt(2, 3), cache, step=1)
    run(MODEL, prompt(20, 4), cache)
    assert counters(cache, Counter.TURN) == 20
    assert counters(cache, Counter.BOUND) == 1


def decided(route: Route) -> mx.array:
    """Bias of a fresh router's last layer with which it always decides `route`."""
    return mx.array([0.0, 1.0] if route == Route.FULL else [1.0, 0.0])


@pytest.mark.parametrize("first", [Route.FULL, Route.SPARSE])
@pytest.mark.parametrize("second", [Route.FULL, Route.SPARSE])
@pytest.mark.parametrize("tokens", [29, 30])
def test_a_short_turn_never_takes_a_layer_from_full_to_sparse(first, second, tokens):
    config = FluxConfig(pattern=PATTERN, router=RouterConfig(pool_tokens=30))
    model = apply(stock_model(num_hidden_layers=1), config)
    last = model.layers[0].self_attn.router.head[-1]  # fresh: its bias alone decides
    last.bias = decided(first)
    cache = run(model, prompt(61))
    run(model, prompt(5, 1), cache, step=1)  # an answer
    last.bias = decided(second)
    run(model, prompt(tokens, 2), cache)
    short = tokens < config.router.pool_tokens
    assert routes(cache) == [Route.FULL if short and first == Route.FULL else second]


def test_adopt_takes_only_our_layout():
    for stock in (
        StockCacheList(KVCache(), KVCache()),
        StockCacheList(KVCache(), ArraysCache(2)),
        StockCacheList(KVCache(), ArraysCache(3)),
        StockCacheList(ArraysCache(2), KVCache()),
        KVCache(),
    ):
        CacheList.adopt(stock)
        assert not isinstance(stock, CacheList)


def test_the_servers_prompt_cache_holds_ours():
    lru = LRUPromptCache(max_size=4)
    tokens = prompt(80)
    lru.insert_cache("model", tokens, run(MODEL, tokens))
    found, rest = lru.fetch_nearest_cache("model", tokens[:50] + prompt(20, 8))
    assert rest == prompt(20, 8)
    assert found[0].offset == 50
    assert routes(found) == [Route.UNSET] * 4
    assert lru.nbytes > 0
    again, rest = lru.fetch_nearest_cache("model", [*tokens, 1, 2])
    assert rest == [1, 2]
    assert routes(again) == routes(run(MODEL, tokens))
