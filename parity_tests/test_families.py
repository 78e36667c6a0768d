"""Every family: the seam is its own attention, full routes give stock's logits, routes are those of exact mode."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import _get_classes, quantize_model

from flux_mlx import families, routes
from flux_mlx.cache import CacheList
from flux_mlx.exact_prefill import prefill
from flux_mlx.models import apply, routed_layers, set_route
from flux_mlx.spec import FluxConfig, Route
from parity_tests.tiny_models import (
    FAMILIES,
    PATTERN,
    ROUTER,
    VOCABULARY,
    flux_model,
    prompt,
    randomise,
    randomise_routers,
    stock_model,
    tiny_config,
)
from parity_tests.tolerances import NEAR_TIE

TOKENS = 61
GLOBAL_LAYERS = {"gemma3_text": [1, 3], "granitemoehybrid": [1, 3]}
REFUSED = {
    "cohere2": {"layer_norm_bias": False, "sliding_window": 16, "sliding_window_pattern": 2},
    "hunyuan_v1_dense": {"use_qk_norm": True},
    "gpt2": {"n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5},
}


def chunked_logits(model, tokens: list[int], step: int) -> mx.array:
    """Logits of the chunks of a prompt, `[L, vocabulary]`."""
    cache, x = make_prompt_cache(model), mx.array(tokens)[None]
    parts = [model(x[:, i : i + step], cache=cache)[0] for i in range(0, len(tokens), step)]
    return mx.concatenate(parts)


def test_every_listed_module_has_a_tested_family():
    used = {families.family(attn) for family in FAMILIES for attn in routed_layers(flux_model(family)).values()}
    names = {name.removeprefix("Flux") for name in used}
    assert names == set(families.ATTENTION_MODULES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seam_is_the_familys_own_attention(family):
    model = flux_model(family)
    for attn in routed_layers(model).values():
        attn.flux = replace(attn.flux, pattern=replace(PATTERN, window_tokens=4096))
        stock, ours, pos = KVCache(), CacheList.new(families.head_dim(attn), ROUTER.pool_tokens), 0
        ours.set_routes([Route.SPARSE])
        for tokens in (7, 1, 5):
            x = mx.random.normal((1, tokens, 128), key=mx.random.key(pos))
            mask = "causal" if tokens > 1 else None
            expected = type(attn).__mro__[2].__call__(attn, x, mask, stock)
            assert mx.array_equal(attn.attend(x, mask, ours), expected), f"{tokens} tokens at {pos}"
            pos += tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_full_routes_give_stock_logits(family):
    stock, model = stock_model(family), flux_model(family, route="full")
    for step in (16, 100):
        assert mx.array_equal(chunked_logits(model, prompt(TOKENS), step), chunked_logits(stock, prompt(TOKENS), step))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_one_chunk_is_routed_as_in_exact_mode(family):
    model = flux_model(family)
    assert list(routed_layers(model)) == GLOBAL_LAYERS.get(family, [0, 1, 2, 3])
    tokens, seen, near = mx.array(prompt(TOKENS)), set(), 0
    exact, chunked = model.make_cache(), model.make_cache()
    prefill(model, tokens, exact)
    model(tokens[None, :-1], cache=chunked)
    for i, attn in routed_layers(model).items():
        a, b = (attn.router(cache[i].pooled()) for cache in (exact, chunked))
        margin = float(mx.minimum(*(mx.abs(x[0, 1] - x[0, 0]) for x in (a, b))))
        near += margin < NEAR_TIE
        assert margin < NEAR_TIE or exact[i].routes == chunked[i].routes, f"layer {i}"
        seen |= set(chunked[i].routes)
    assert near <= 1, "the random routers are no test"
    assert Route.UNSET not in seen


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_layers_change_the_answer_and_decode_like_prefill(family):
    model = flux_model(family, route="sparse")
    whole = chunked_logits(model, prompt(TOKENS), TOKENS)
    stepwise = chunked_logits(model, prompt(TOKENS), 1)
    np.testing.assert_allclose(stepwise, whole, atol=2e-4, rtol=2e-4)
    set_route(model, "full")
    assert not np.allclose(chunked_logits(model, prompt(TOKENS), TOKENS), whole, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "qwen3_moe"])
def test_quantised_weights(family, bits):
    config = {"model_type": family}
    stock = quantize_model(stock_model(family), dict(config), 32, bits)[0]
    flux = FluxConfig(pattern=PATTERN, router=ROUTER, route="full")
    model = apply(quantize_model(stock_model(family), dict(config), 32, bits)[0], flux)
    assert mx.array_equal(chunked_logits(model, prompt(TOKENS), 16), chunked_logits(stock, prompt(TOKENS), 16))
    set_route(model, "auto")
    randomise_routers(model)
    cache = model.make_cache()
    for _, _ in zip(range(3), generate_step(mx.array(prompt(TOKENS)), model, prompt_cache=cache), strict=False):
        pass
    assert Route.UNSET not in routes(cache)


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family):
    FAMILIES_PLUS = {**FAMILIES, **REFUSED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parity_tests.tiny_models.FAMILIES", FAMILIES_PLUS)
        model = stock_model(family)
    with pytest.raises(ValueError, match=rf"\[apply\] mlx_lm\.models\.{family} has no layer that can be routed"):
        apply(model, FluxConfig())


@pytest.mark.parametrize(("outer", "inner"), [("gemma3", "gemma3_text"), ("qwen3_vl", "qwen3")])
def test_families_that_also_take_images_are_routed_in_their_text_part(outer, inner):
    config = {"model_type": outer, "text_config": tiny_config(inner), "vocab_size": VOCABULARY}
    model_class, args_class = _get_classes(config)
    stock, model = (randomise(model_class(args_class.from_dict(config))) for _ in range(2))
    apply(model, FluxConfig(pattern=PATTERN, router=ROUTER))
    randomise_routers(model)
    exact, chunked = model.make_cache(), model.make_cache()
    prefill(model, mx.array(prompt(TOKENS)), exact)
    model(mx.array([prompt(TOKENS)[:-1]]), cache=chunked)
    assert routes(exact) == routes(chunked)
    assert Route.UNSET not in routes(exact)
    set_route(model, "full")
    assert mx.array_equal(chunked_logits(model, prompt(TOKENS), 16), chunked_logits(stock, prompt(TOKENS), 16))


def test_sliding_layers_of_a_llama_stay_stock():
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = flux_model("llama", layer_types=layers, sliding_window=24)
    assert list(routed_layers(model)) == [1, 3]
    cache = model.make_cache()
    model(mx.array(prompt(TOKENS))[None], cache=cache)
    assert [type(entry).__name__ for entry in cache] == ["RotatingKVCache", "CacheList"] * 2
    assert routes(cache)[0] is None
    assert routes(cache)[1] in (Route.FULL, Route.SPARSE)
