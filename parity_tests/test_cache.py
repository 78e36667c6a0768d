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


def one_layer() -> tuple:
    """A model of one layer with P = 30, and the last layer of its fresh router, whose bias alone decides."""
    config = FluxConfig(pattern=PATTERN, router=RouterConfig(pool_tokens=30))
    model = apply(stock_model(num_hidden_layers=1), config)
    return model, model.layers[0].self_attn.router.head[-1]


@pytest.mark.parametrize("first", [Route.FULL, Route.SPARSE])
@pytest.mark.parametrize("second", [Route.FULL, Route.SPARSE])
@pytest.mark.parametrize("tokens", [29, 30])
def test_a_short_turn_never_takes_a_layer_from_full_to_sparse(first, second, tokens):
    model, last = one_layer()
    last.bias = decided(first)
    cache = run(model, prompt(61))
    run(model, prompt(5, 1), cache, step=1)  # an answer
    last.bias = decided(second)
    run(model, prompt(tokens, 2), cache)
    short = tokens < model.layers[0].self_attn.flux.router.pool_tokens
    assert routes(cache) == [Route.FULL if short and first == Route.FULL else second]


def answered(model, last, first: Route = Route.FULL) -> list:
    """The cache of a prompt of 61 tokens and an answer of 5; from now on the router leans to SPARSE."""
    last.bias = decided(first)
    cache = run(model, prompt(61))
    run(model, prompt(5, 1), cache, step=1)
    last.bias = decided(Route.SPARSE)
    return cache


@pytest.mark.parametrize("cut", [0, 2, 5, 8, 65, 66])
@pytest.mark.parametrize("tokens", [20, 30])
@pytest.mark.parametrize("first", [Route.FULL, Route.SPARSE])
def test_a_short_turn_after_a_cut_keeps_a_full_layer(cut, tokens, first):
    model, last = one_layer()
    cache = answered(model, last, first)
    trim_prompt_cache(cache, cut)
    assert routes(cache) == [first if cut <= 5 else Route.UNSET]
    run(model, prompt(tokens, 2), cache)
    held = first == Route.FULL and tokens < 30 and cut < 66  # nothing is left of 66
    assert routes(cache) == [Route.FULL if held else Route.SPARSE]
    run(model, prompt(30, 3), cache)
    assert routes(cache) == [Route.SPARSE]


@pytest.mark.parametrize("tokens", [5, 20])
def test_cuts_one_after_another_keep_a_full_layer(tokens):
    model, last = one_layer()
    cache = answered(model, last)
    for seed in range(4):
        trim_prompt_cache(cache, 8)
        run(model, prompt(tokens, seed + 2), cache)
        run(model, prompt(3, 1), cache, step=1)
    run(model, prompt(20, 9), cache)
    assert routes(cache) == [Route.FULL]
    trim_prompt_cache(cache, cache[0].size())
    run(model, prompt(20, 9), cache)
    assert routes(cache) == [Route.SPARSE]


def test_a_batch_a_copy_and_a_file_remember_that_a_cut_row_was_full(tmp_path):
    model, last = one_layer()
    rows = [answered(model, last, first) for first in (Route.FULL, Route.SPARSE)]
    for i, row in enumerate(rows):
        trim_prompt_cache(row, 8)
        save_prompt_cache(str(tmp_path / f"{i}.safetensors"), copy.deepcopy(row))
        row[:] = load_prompt_cache(str(tmp_path / f"{i}.safetensors"))
        CacheList.adopt(row[0])
    batch = rows[0][0].merge([row[0] for row in rows])
    single = [batch.extract(0)]
    model(mx.array([prompt(20, 2), prompt(20, 3)]), cache=[batch])
    assert batch.routes == [Route.FULL, Route.SPARSE]
    assert routes(run(model, prompt(20, 2), single)) == [Route.FULL]


def test_a_refill_of_p_tokens_after_a_cut_is_decided_as_cold():
    model = flux_model()
    for seed in range(6):
        tokens = prompt(61, seed)
        cache = run(model, tokens)
        trim_prompt_cache(cache, 61)
        run(model, tokens, cache)
        assert routes(cache) == routes(cold := run(model, tokens))
        assert np.array_equal(last_logits(model, cache), last_logits(model, cold))


def test_a_server_whose_template_drops_thoughts_never_takes_a_layer_from_full_in_a_short_turn():
    model, last = one_layer()
    question, thought, said = prompt(61), prompt(8, 1), prompt(4, 2)
    last.bias = decided(Route.FULL)
    cache, lru, history = run(model, question), LRUPromptCache(max_size=4), question
    last.bias = decided(Route.SPARSE)
    for turn in range(3):
        run(model, thought + said, cache, step=1)
        lru.insert_cache("model", history + thought + said, cache)
        history = history[:-3] + said + prompt(20, turn + 3)  # the end of a prompt opens the thought
        cache, rest = lru.fetch_nearest_cache("model", history)
        assert len(rest) == 24
        assert routes(run(model, rest, cache)) == [Route.FULL]


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
