"""A Flux model in the hands of mlx-lm's own generation code: alone, in batches, drafted for, with quantised keys."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model

from flux_mlx import routes
from flux_mlx.cache import CacheList
from flux_mlx.models import Model, ModelArgs, apply, routed_layers, set_route
from flux_mlx.routed_attention import RowGroup, row_groups
from flux_mlx.spec import FluxConfig, Route
from parity_tests.greedy import Answers
from parity_tests.tiny_models import (
    PATTERN,
    ROUTER,
    flux_model,
    prompt,
    randomise,
    randomise_routers,
    stock_model,
    tiny_config,
)

STOCK = stock_model()
MODEL = flux_model()


@pytest.fixture(autouse=True)
def _automatic_routes():
    yield
    set_route(MODEL, "auto")


def generated(model, tokens: list[int], n: int = 12, **kwargs) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and their log-probabilities, `[n, vocabulary]`."""
    pairs = list(generate_step(mx.array(tokens), model, max_tokens=n, **kwargs))
    return [token for token, _ in pairs], np.stack([np.array(logprobs) for _, logprobs in pairs])


@pytest.mark.parametrize("step", [16, 100, 2048])
@pytest.mark.parametrize("cached", [0, 40])
def test_full_routes_are_stock_bit_by_bit(step, cached):
    set_route(MODEL, "full")
    tokens, outcomes = prompt(250), []
    for model in (STOCK, MODEL):
        cache = make_prompt_cache(model)
        if cached:
            list(generate_step(mx.array(tokens[:cached]), model, max_tokens=0, prompt_cache=cache))
        outcomes.append(generated(model, tokens[cached:], prompt_cache=cache, prefill_step_size=step))
    assert outcomes[0][0] == outcomes[1][0]
    assert np.array_equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 18])
def test_short_prompts_are_stock(tokens):
    n = PATTERN.sink_tokens + PATTERN.window_tokens - tokens  # while every key is in the sink or the window
    assert generated(MODEL, prompt(tokens), n)[0] == generated(STOCK, prompt(tokens), n)[0]


def test_forced_routes_are_taken():
    set_route(MODEL, (1, 3))
    cache = MODEL.make_cache()
    generated(MODEL, prompt(61), prompt_cache=cache)
    assert routes(cache) == [Route.SPARSE, Route.FULL] * 2
    with pytest.raises(ValueError, match=r"\[set_route\] \[4\] are not routed layers; the model routes"):
        set_route(MODEL, (1, 4))


def test_input_embeddings_stand_in_for_tokens():
    tokens = prompt(61)
    embeddings = MODEL.model.embed_tokens(mx.array(tokens))
    expected = generated(MODEL, tokens, prefill_step_size=32)
    found = generated(MODEL, [], input_embeddings=embeddings, prefill_step_size=32)
    assert found[0] == expected[0]
    assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("route", ["full", "sparse", "auto"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_keys_from_the_first_chunk(route, bits):
    set_route(MODEL, route)
    cache = MODEL.make_cache()
    settings = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": 0, "prefill_step_size": 32}
    found = generated(MODEL, prompt(90), prompt_cache=cache, **settings)
    assert all(type(entry.kv).__name__ == "QuantizedKVCache" for entry in cache)
    if route == "full":
        expected = generated(STOCK, prompt(90), **settings)
        assert found[0] == expected[0]
        assert np.array_equal(found[1], expected[1])
    else:
        exact = generated(MODEL, prompt(90), prefill_step_size=32)[1]
        assert np.abs(found[1][0] - exact[0]).max() < {4: 1.5, 8: 0.1}[bits]


@pytest.mark.parametrize("route", ["full", "sparse", "auto"])
@pytest.mark.parametrize("kv_bits", [4, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_with_quantised_keys(bits, kv_bits, route):
    stock = quantize_model(stock_model(), {}, 32, bits)[0]
    flux = FluxConfig(pattern=PATTERN, router=ROUTER, route=route)
    model = apply(quantize_model(stock_model(), {}, 32, bits)[0], flux)
    randomise_routers(model)
    cache = model.make_cache()
    settings = {"kv_bits": kv_bits, "kv_group_size": 32, "quantized_kv_start": 0, "prefill_step_size": 32}
    found = generated(model, prompt(90), prompt_cache=cache, **settings)
    assert all(type(entry.kv).__name__ == "QuantizedKVCache" for entry in cache)
    if route == "full":
        expected = generated(stock, prompt(90), **settings)
        assert found[0] == expected[0]
        assert np.array_equal(found[1], expected[1])
    else:
        assert Route.SPARSE in routes(cache)
        exact = generated(model, prompt(90), prefill_step_size=32)[1]
        assert np.abs(found[1][0] - exact[0]).max() < {4: 1.5, 8: 0.1}[kv_bits]


@pytest.mark.parametrize("drafted", [1, 4, 14])
@pytest.mark.parametrize("route", ["full", (1, 3), "auto"])
def test_speculative_is_greedy_as_target_and_as_draft(drafted, route, record_property):
    tokens = prompt(61)
    set_route(MODEL, route)
    settings = {"max_tokens": 14, "num_draft_tokens": drafted, "prefill_step_size": 512}
    expected = generated(MODEL, tokens, 14)[0]
    as_target = speculative_generate_step(mx.array(tokens), MODEL, STOCK, **settings)
    answers = Answers(MODEL)
    answers.check(tokens, [token for token, *_ in as_target], expected)
    answers.report(record_property)
    as_draft = list(speculative_generate_step(mx.array(tokens), STOCK, MODEL, **settings))
    assert [token for token, *_ in as_draft] == generated(STOCK, tokens, 14)[0]
    if route == "full":
        assert sum(accepted for *_, accepted in as_draft) >= 7


def batch_tokens(model, rows: list[list[int]], late: list[list[int]] = (), n: int = 12, **settings) -> list[list[int]]:
    """Greedy tokens of each row of a batch; the `late` rows join while the others generate."""
    generator = BatchGenerator(model, max_tokens=n, **settings)
    uids = generator.insert(rows, max_tokens=[n + i for i in range(len(rows))])
    out, steps = {uid: [] for uid in uids}, 0
    while responses := generator.next_generated():
        for response in responses:
            out[response.uid].append(response.token)
        steps += 1
        if steps == 3 and late:
            joined = generator.insert(late, max_tokens=[n] * len(late))
            out |= {uid: [] for uid in joined}
    return [tokens for _, tokens in sorted(out.items())]


LENGTHS = (61, 7, 33, 90)


@pytest.mark.parametrize("route", ["full", (1, 3)])
def test_batch_generate_and_its_prompt_caches(route):
    set_route(MODEL, route)
    tokenizer = SimpleNamespace(eos_token_ids=set(), decode=lambda tokens: "", chat_template=None)
    settings = {"max_tokens": 8, "return_prompt_caches": True, "return_token_ids": True}
    rows, more = [prompt(n, seed) for seed, n in enumerate(LENGTHS)], [prompt(20 + n, 30 + n) for n in range(4)]
    first = batch_generate(MODEL, tokenizer, rows, **settings)
    second = batch_generate(MODEL, tokenizer, more, prompt_caches=first.caches, **settings)
    for row, question, *found in zip(rows, more, first.token_ids, second.token_ids, strict=True):
        cache = MODEL.make_cache()
        assert generated(MODEL, row, 8, prompt_cache=cache)[0] == found[0]
        assert generated(MODEL, question, 8, prompt_cache=cache)[0] == found[1]


@pytest.mark.parametrize("route", ["full", "sparse", (1, 3)])
@pytest.mark.parametrize("step", [16, 2048])
def test_a_batch_is_its_rows_one_by_one(route, step, record_property):
    set_route(MODEL, route)
    rows = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    late = [prompt(50, 11), prompt(20, 12)]
    found = batch_tokens(MODEL, rows, late, prefill_step_size=step)
    single = [generated(MODEL, row, 12 + i)[0] for i, row in enumerate(rows)] + [generated(MODEL, r)[0] for r in late]
    answers = Answers(MODEL)
    for row, ours, alone in zip([*rows, *late], found, single, strict=True):
        answers.check(row, ours, alone)
    answers.report(record_property)
    if route == "full":
        assert found == batch_tokens(STOCK, rows, late, prefill_step_size=step)


def test_rows_of_a_batch_take_their_own_routes():
    rows = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    single, taken = [], []
    for row in rows:
        cache = MODEL.make_cache()
        single.append(generated(MODEL, row, prompt_cache=cache)[0])
        taken.append(routes(cache))
    assert len(set(map(tuple, taken))) >= 3
    generator = BatchGenerator(MODEL, max_tokens=12)
    uids = generator.insert(rows)
    out, caches = {uid: [] for uid in uids}, {}
    while responses := generator.next_generated():
        for response in responses:
            out[response.uid].append(response.token)
            caches[response.uid] = response.prompt_cache or caches.get(response.uid)
    assert [routes(caches[uid]) for uid in uids] == taken
    assert list(out.values()) == single


def test_rows_that_take_one_route_are_computed_together():
    groups = list(row_groups([True, True, False, False, True], [0, 0, 5, 2, 0]))
    assert groups == [RowGroup(slice(0, 2), True, 0), RowGroup(slice(2, 4), False, 0), RowGroup(slice(4, 5), True, 0)]
    padded = list(row_groups([True, True, True], [3, 3, 4]))  # sparse rows go without their padding
    assert padded == [RowGroup(slice(0, 2), True, 3), RowGroup(slice(2, 3), True, 4)]


def test_a_batch_call_computes_every_row_by_its_route():
    rows = [prompt(61, seed) for seed in range(4)]
    caches = [MODEL.make_cache() for _ in rows]
    single = [MODEL(mx.array([row]), cache=cache)[0] for row, cache in zip(rows, caches, strict=True)]
    fresh = MODEL.make_cache()
    together = MODEL(mx.array(rows), cache=fresh)
    assert routes(fresh) == [list(layer) for layer in zip(*map(routes, caches), strict=True)]
    np.testing.assert_allclose(together, mx.stack(single), atol=1e-4)
    np.testing.assert_allclose(MODEL(mx.array(rows)), together, atol=1e-4)  # without a cache: routed row by row


def test_without_a_cache_training_is_full():
    x = mx.array([prompt(61)])
    set_route(MODEL, "sparse")
    assert not np.allclose(MODEL(x), STOCK(x), atol=1e-3)
    MODEL.train()
    assert mx.array_equal(MODEL(x), STOCK(x))
    MODEL.eval()


def test_a_cache_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"\[FluxModel\] the cache has 3 entries, the model 4 layers"):
        MODEL(mx.array([[1]]), cache=MODEL.make_cache()[:3])


def test_routes_are_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("FLUX_MLX_SHOW_ROUTES", "1")
    model = apply(stock_model(), FluxConfig(pattern=PATTERN, router=ROUTER, route=(1, 2)))
    generated(model, prompt(61), 2)
    line = "2 of 4 routed layers sparse; full: 1,2; sparse: 0,3\n"
    assert capsys.readouterr().err == f"flux: {line}"
    model(mx.array([prompt(61), prompt(61, 1)]), cache=model.make_cache())
    assert capsys.readouterr().err == f"flux: row 0: {line}flux: row 1: {line}"


def test_bad_input_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"\[apply\] the model is a Flux model already"):
        apply(MODEL, FluxConfig())
    with pytest.raises(ValueError, match=r"\[FluxConfig\] route names layers \[4\]"):
        apply(stock_model(), FluxConfig(route=(0, 4)))
    with pytest.raises(ValueError, match=r"\[ModelArgs\] config.json has no flux section"):
        ModelArgs.from_dict({"model_type": "llama"})
    config = {**tiny_config("llama"), "flux": FluxConfig().to_dict()}
    monkeypatch.setenv("FLUX_MLX_ROUTE", "most")
    with pytest.raises(ValueError, match=r"\[FLUX_MLX_ROUTE\] expected auto, full, sparse or a list of full.*'most'"):
        Model(ModelArgs.from_dict(config))
    apply(stock_model(), FluxConfig())  # the environment speaks to loaders only


def test_the_environment_routes_what_stock_code_loads(monkeypatch):
    args = ModelArgs.from_dict({**tiny_config("llama"), "flux": FluxConfig(route="full").to_dict()})
    for value, forced in (("1-2", [2, 1, 1, 2]), ("", [1] * 4), ("auto", [None] * 4)):
        monkeypatch.setenv("FLUX_MLX_ROUTE", value)
        assert [attn.forced for attn in routed_layers(Model(args)).values()] == forced


def test_routers_are_parameters_that_training_passes_by():
    MODEL.unfreeze()
    names = {name for name, _ in tree_flatten(MODEL.parameters())}
    trainable = {name for name, _ in tree_flatten(MODEL.trainable_parameters())}
    assert {name for name in names if ".router." in name} == names - trainable
    assert len(names - trainable) == 10 * len(routed_layers(MODEL))


def test_weights_of_stock_models_load_as_they_are():
    other = randomise(flux_model(seed=5), 1)
    other.load_weights(tree_flatten(STOCK.parameters()), strict=False)
    set_route(other, "full")
    assert generated(other, prompt(61))[0] == generated(STOCK, prompt(61))[0]


def test_entries_are_routed_caches():
    assert all(type(entry) is CacheList for entry in MODEL.make_cache())
