"""Routing on transformers' models: stock where it is full, exact pools, rows apart, decoding as the whole call."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from cuda_reference.model import Routing, attach, generate, routers
from flux_mlx import spec
from flux_mlx.spec import FluxConfig, Route
from parity_tests.tiny_torch import (
    FAMILIES,
    FLUX,
    PATTERNS,
    STREAMING,
    flux_model,
    padded,
    prompt,
    randomise_routers,
    stock_model,
)
from parity_tests.tolerances import MODEL_ATOL

torch.set_num_threads(1)


class Spy(Routing):
    """Keeps the queries that the routers read."""

    def decide(self, layer, router, queries):
        self.seen = {**getattr(self, "seen", {}), layer: queries.detach()}
        super().decide(layer, router, queries)


@pytest.fixture(scope="module")
def model():
    return flux_model()


def logits_of(model, rows, routing=None, **options):
    options = options if routing is None else {**options, "routing": routing}
    with torch.no_grad():
        return model(padded(rows), **options).logits


def close(actual, expected):
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=0, atol=MODEL_ATOL)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_routing_and_with_full_routes_the_model_is_stock(family):
    rows = [prompt(41)]
    stock = logits_of(stock_model(family), rows)
    model = flux_model(family)
    assert torch.equal(logits_of(model, rows), stock)
    assert torch.equal(logits_of(model, rows, Routing(replace(FLUX, route="full"), [41])), stock)
    assert not torch.equal(logits_of(model, rows, Routing(replace(FLUX, route="sparse"), [41])), stock)


def projected_queries(attention, x):
    """Queries before RoPE, [B, L, HQ, D], by the family's own modules: normed over all heads at once, or by head."""
    q, norm = attention.q_proj(x), getattr(attention, "q_norm", None)
    split = q.unflatten(-1, (-1, attention.head_dim))
    if norm is None:
        return split
    return norm(q).unflatten(-1, split.shape[2:]) if norm.weight.shape == q.shape[-1:] else norm(split)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [6, 29])  # 6 is the number of heads too
def test_routers_read_the_queries_before_rope(family, tokens):
    model = flux_model(family)
    inputs = {}
    for layer, block in enumerate(model.get_decoder().layers):
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: inputs.update({layer: kwargs["hidden_states"]}), with_kwargs=True
        )
    routing = Spy(FLUX, [tokens])
    logits_of(model, [prompt(tokens)], routing)
    assert sorted(routing.seen) == ([1] if family == "gemma3_text" else [0, 1, 2])
    for layer, seen in routing.seen.items():
        with torch.no_grad():
            expected = projected_queries(model.get_decoder().layers[layer].self_attn, inputs[layer])
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)


def test_routes_are_the_specification_s(model):
    tokens = prompt(37)
    routing = Spy(FLUX, [len(tokens)])
    logits_of(model, [tokens], routing)
    for layer, router in routers(model).items():
        weights = {name: value.numpy() for name, value in router.state_dict().items()}
        pooled = spec.pool_queries(routing.seen[layer][:, :-1].numpy(), FLUX.router.pool_tokens)
        expected = spec.route_logits(weights, pooled)
        close(routing.logits[layer], torch.from_numpy(expected))
        assert routing.routes[layer] == spec.decide(expected)


def test_both_routes_occur(model):
    seen = set()
    for seed in range(8):
        routing = Routing(FLUX, [37])
        logits_of(model, [prompt(37, seed)], routing)
        seen |= {(layer, rows[0]) for layer, rows in routing.routes.items()}
    assert {route for _, route in seen} == {Route.FULL, Route.SPARSE}
    assert len(seen) > 3


@pytest.mark.parametrize("name", PATTERNS)
def test_padding_and_other_rows_do_not_matter(model, name):
    config = replace(FLUX, pattern=PATTERNS[name])
    rows = [prompt(n, seed) for seed, n in enumerate((33, 12, 47, 21))]
    routing = Routing(config, [len(row) for row in rows])
    together = logits_of(model, rows, routing)
    assert len({str([routing.routes[layer][b] for layer in range(3)]) for b in range(4)}) > 1
    for b, row in enumerate(rows):
        alone = Routing(config, [len(row)])
        close(logits_of(model, [row], alone)[0], together[b, : len(row)])
        assert {layer: r[0] for layer, r in alone.routes.items()} == {i: r[b] for i, r in routing.routes.items()}


def test_what_follows_the_prompt_s_last_but_one_token_is_not_pooled(model):
    first, second = prompt(30) + prompt(9, seed=1), prompt(30) + prompt(5, seed=2)
    second[29] = (first[29] + 1) % 90 + 3
    pair = [Routing(FLUX, [30]) for _ in range(2)]
    for routing, row in zip(pair, (first, second), strict=True):
        logits_of(model, [row], routing)
    close(torch.cat(list(pair[0].logits.values())), torch.cat(list(pair[1].logits.values())))
    shorter = Routing(FLUX, [29])
    logits_of(model, [first], shorter)
    assert not torch.allclose(shorter.logits[0], pair[0].logits[0])


@pytest.mark.parametrize("route", ["auto", "full", "sparse", (1,)])
@pytest.mark.parametrize("name", PATTERNS)
def test_decoding_is_the_whole_call(model, name, route):
    """Prefill of prompt[:-1], then token by token, gives the logits of one call over prompt and answer."""
    config = replace(FLUX, pattern=PATTERNS[name], route=route)
    tokens, answer = prompt(37), prompt(15, seed=5)
    whole = Routing(config, [37])
    expected = logits_of(model, [tokens + answer], whole)[0, 36:]
    routing, cache = Routing(config, [37]), DynamicCache(config=model.config)
    logits_of(model, [tokens[:-1]], routing, past_key_values=cache, use_cache=True)
    steps = [
        logits_of(model, [[token]], routing, past_key_values=cache, use_cache=True)[0, -1]
        for token in tokens[-1:] + answer
    ]
    close(torch.stack(steps), expected)
    assert routing.routes == whole.routes


def test_several_tokens_at_once_after_the_prompt(model):
    """A continuation in one call (say, a candidate answer on a kept cache) is the whole call too."""
    config = replace(FLUX, route=(1,))
    tokens, answer = prompt(37), prompt(15, seed=5)
    expected = logits_of(model, [tokens + answer], Routing(config, [37]))[0, 36:]
    routing, cache = Routing(config, [37]), DynamicCache(config=model.config)
    logits_of(model, [tokens[:-1]], routing, past_key_values=cache, use_cache=True)
    actual = logits_of(model, [tokens[-1:] + answer], routing, past_key_values=cache, use_cache=True)[0]
    close(actual, expected)


def test_generate_is_greedy_and_reports_its_routes(model):
    tokens = prompt(37)
    result = generate(model, tokens, 9)
    routing = Routing(FLUX, [37])
    logits = logits_of(model, [tokens + result.tokens], routing)
    assert result.tokens == logits[0, 36:-1].argmax(-1).tolist()
    assert result.routes == {layer: rows[0] for layer, rows in routing.routes.items()}
    close(torch.stack(list(result.logits.values())), torch.cat(list(routing.logits.values())))
    stop = result.tokens[4]
    assert generate(model, tokens, 9, stop_tokens=[stop]).tokens == result.tokens[: result.tokens.index(stop)]


def test_forced_routes(model):
    result = generate(model, prompt(37), 2, route=(0, 2))
    assert result.routes == {0: Route.FULL, 1: Route.SPARSE, 2: Route.FULL}
    assert result.logits == {}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_mixed_branches_at_the_ends_are_the_branches(model, weight):
    rows = [prompt(33, 1), prompt(20, 2)]
    mixed = Routing(FLUX, [33, 20], mix=lambda layer, logits: torch.full((2,), weight))
    forced = Routing(replace(FLUX, route="full" if weight else "sparse"), [33, 20])
    actual, expected = logits_of(model, rows, mixed), logits_of(model, rows, forced)
    close(actual[0], expected[0])
    close(actual[1, :20], expected[1, :20])


def mixed_loss(model, rows, lengths):
    routing = Routing(FLUX, lengths, mix=lambda layer, logits: torch.sigmoid(logits[:, 1] - logits[:, 0]))
    loss = model(padded(rows), routing=routing, use_cache=False).logits[:, -1].square().mean()
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for router in routers(model).values() for p in router.parameters()], routing


def test_gradients_reach_every_router_with_and_without_checkpointing():
    model = flux_model().train()
    rows, lengths = [prompt(33, 1), prompt(33, 2)], [31, 25]
    plain, routing = mixed_loss(model, rows, lengths)
    assert all(grad.abs().max() > 0 for grad in plain)
    assert [z.shape for z in routing.z.values()] == [(2,)] * 3
    assert not routing.routes
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for actual, expected in zip(mixed_loss(model, rows, lengths)[0], plain, strict=True):
        close(actual, expected)


def test_routers_stay_float32_in_a_half_precision_model():
    torch.manual_seed(0)
    model = attach(stock_model().to(torch.bfloat16), FLUX)
    randomise_routers(model)
    routing = Routing(FLUX, [37])
    with torch.autocast("cpu", torch.bfloat16):
        assert logits_of(model, [prompt(37)], routing).dtype == torch.bfloat16
    assert {logits.dtype for logits in routing.logits.values()} == {torch.float32}
    assert {p.dtype for router in routers(model).values() for p in router.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_copy_routes_on_its_own(family):
    model = flux_model(family)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight.mul_(-1)
    routing = [Spy(FLUX, [37]), Spy(FLUX, [37])]
    for each, which in zip((model, twin), routing, strict=True):
        logits_of(each, [prompt(37)], which)
    torch.testing.assert_close(routing[1].seen[0], -routing[0].seen[0], rtol=0, atol=0)
    assert model.state_dict().keys() == twin.state_dict().keys()


def test_models_and_routes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="has routers already"):
        attach(flux_model(), FLUX)
    with pytest.raises(ValueError, match=r"names layers \[3\], but the model has layers 0 to 2"):
        attach(stock_model(), replace(FLUX, route=(3,)))
    with pytest.raises(ValueError, match=r"expected full layers among the routed ones, \[1\]; got \[0\]"):
        attach(stock_model("gemma3_text"), replace(FLUX, route=(0, 1)))
    with pytest.raises(ValueError, match=r"Phi3ForCausalLM: expected .* a q_proj"):
        attach(stock_model("phi3"), FLUX)
    with pytest.raises(ValueError, match=r"\[generate\] expected full layers among the routed ones, .*; got \[3\]"):
        generate(flux_model(), prompt(9), 1, route=(0, 3))
    with pytest.raises(ValueError, match="MistralForCausalLM: expected layers with global attention"):
        attach(stock_model("mistral", sliding_window=8), FLUX)


def test_a_family_that_norms_after_rope_is_refused():
    model = attach(stock_model("nanochat"), FLUX)
    with pytest.raises(ValueError, match="norms its queries after another step than q_proj"):
        logits_of(model, [prompt(20)], Routing(FLUX, [20]))


@pytest.mark.parametrize(
    ("lengths", "rows", "message"),
    [
        ([1], [[3]], "expected prompts of 2 tokens or more"),
        ([], [[3]], "expected prompts of 2 tokens or more"),
        ([20], [prompt(9)], "expected 19 tokens or more, got 9"),
        ([9, 9], [prompt(9)], "of 2 rows, the batch of 1"),
    ],
)
def test_routing_refuses(model, lengths, rows, message):
    with pytest.raises(ValueError, match=message):
        logits_of(model, rows, Routing(FLUX, lengths))


def test_padding_on_the_left_is_refused(model):
    mask = torch.tensor([[0, 0, *[1] * 18], [1] * 20])
    with pytest.raises(ValueError, match="expected rows padded on the right without an attention mask"):
        logits_of(model, [prompt(20), prompt(20, 1)], Routing(FLUX, [18, 20]), attention_mask=mask)


def test_decoding_rows_of_different_lengths_is_refused(model):
    routing, cache = Routing(FLUX, [20, 17]), DynamicCache(config=model.config)
    logits_of(model, [prompt(20), prompt(17)], routing, past_key_values=cache)
    with pytest.raises(ValueError, match="only if their prompts have one length"):
        logits_of(model, [[5], [6]], routing, past_key_values=cache)


def test_dense_prompts_are_computed_by_the_stock_function_yet_decided():
    model = flux_model()
    assert STREAMING.is_dense(12)
    routing = Routing(replace(FLUX, route="sparse"), [12])
    assert torch.equal(logits_of(model, [prompt(12)], routing), logits_of(stock_model(), [prompt(12)]))
    automatic = Routing(FluxConfig(pattern=STREAMING, router=FLUX.router), [12])
    logits_of(model, [prompt(12)], automatic)
    assert sorted(automatic.routes) == [0, 1, 2]
