"""Tokens decoded by compiled steps: bit for bit what stock's code and the layers' own calls give."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE

from flux_mlx.families import project, project_token
from flux_mlx.models import routed_layers, set_kv_policy, set_route
from parity_tests.tiny_models import FAMILIES, flux_model, prompt, stock_model
from parity_tests.token_by_token import (
    PROMPT_TOKENS,
    by_steps_and_by_own_calls,
    decoded,
    one_by_one,
    steps_of,
    without_steps,
)

UNTRACED = {"cohere"}  # its blocks are parallel


@pytest.mark.parametrize("family", FAMILIES)
def test_full_layers_decode_as_stock_does(family):
    tokens, model = prompt(PROMPT_TOKENS + 5), flux_model(family, route="full")
    np.testing.assert_array_equal(decoded(model, tokens), decoded(stock_model(family), tokens))
    traced = [step.is_traced for step in steps_of(model)]
    assert len(traced) == len(routed_layers(model))
    assert all(traced) != (family in UNTRACED)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokens_projections_need_no_transposition(family):
    x = mx.random.normal((1, 1, 128), key=mx.random.key(0))
    for attn in routed_layers(flux_model(family)).values():
        for mine, part in zip(project_token(attn, x), project(attn, x), strict=True):
            np.testing.assert_array_equal(mine, part.swapaxes(1, 2))


@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("route", ["auto", "sparse", (1,)])
def test_routed_layers_decode_as_by_their_own_calls(monkeypatch, route, policy):
    """Over the end of a buffer at 256 tokens, and over ends of blocks, where a window moves."""
    model, tokens = flux_model("qwen3", route=route), prompt(270)
    set_kv_policy(model, policy)
    by_steps = decoded(model, tokens, 240)
    assert all(step.is_traced for step in steps_of(model))
    without_steps(monkeypatch)
    np.testing.assert_array_equal(by_steps, decoded(model, tokens, 240))


@pytest.mark.parametrize(
    "case", [("llama", "float32", 4), ("qwen3", "float32", 8), ("gemma", "float32", None)], ids=str
)
def test_models_as_devices_test_them_decode_as_by_their_own_calls(monkeypatch, case):
    np.testing.assert_array_equal(*by_steps_and_by_own_calls(monkeypatch, *case))


def test_a_rope_with_frequencies_of_its_own(monkeypatch):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    model, tokens = flux_model("llama", route=(1,), rope_scaling=scaling), prompt(PROMPT_TOKENS + 5)
    assert type(model.layers[0].self_attn.rope) is Llama3RoPE
    by_steps = decoded(model, tokens)
    assert all(step.is_traced for step in steps_of(model))
    without_steps(monkeypatch)
    np.testing.assert_array_equal(by_steps, decoded(model, tokens))


def test_a_rope_that_looks_at_its_position_is_left_to_stock_code():
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model, tokens = flux_model("internlm3", route="full", rope_scaling=scaling), prompt(PROMPT_TOKENS + 4)
    stock = stock_model("internlm3", rope_scaling=scaling)
    np.testing.assert_array_equal(decoded(model, tokens), decoded(stock, tokens))
    assert not any(step.is_traced for step in steps_of(model))


@pytest.mark.parametrize("refused", [nn.Dropout(0.5), nn.Sequential(nn.Identity())])
def test_blocks_that_hold_chance_or_lists_are_not_traced(refused):
    model = flux_model("llama", route=(1,))
    model.layers[1].mlp.extra = refused
    decoded(model, prompt(PROMPT_TOKENS + 2))
    assert [step.is_traced for step in steps_of(model)] == [True, False, True, True]


def test_a_block_that_mlx_cannot_trace_goes_its_own_way(monkeypatch):
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 3)
    mlp = type(model.layers[0].mlp)
    stock = mlp.__call__
    monkeypatch.setattr(mlp, "__call__", lambda self, x: stock(self, x) if x.sum().item() < 1e9 else x)
    by_own_calls = decoded(model, tokens)
    assert not any(step.is_traced for step in steps_of(model))
    without_steps(monkeypatch)
    np.testing.assert_array_equal(by_own_calls, decoded(model, tokens))


def test_a_step_makes_no_more_of_a_position_than_one_array(monkeypatch):
    model, cache = flux_model("qwen3", route=(1,)), None
    cache = model.make_cache()
    decoded(model, prompt(PROMPT_TOKENS + 3), cache=cache)
    made, array = [], mx.array
    monkeypatch.setattr(mx, "array", type("Counted", (), {"__new__": lambda cls, *a: made.append(a) or array(*a)}))
    model(array([[1]]), cache=cache)
    assert len(made) <= 1


def test_forced_routes_that_change_between_tokens_are_followed(monkeypatch):
    model, tokens = flux_model("llama"), prompt(PROMPT_TOKENS + 8)

    def answer() -> list[np.ndarray]:
        cache, outs = model.make_cache(), []
        set_route(model, "sparse")
        outs.append(decoded(model, tokens[: PROMPT_TOKENS + 3], cache=cache))
        set_route(model, (0, 2))
        outs.append(one_by_one(model, tokens[-5:], cache))
        return outs

    by_steps = answer()
    without_steps(monkeypatch)
    for mine, other in zip(by_steps, answer(), strict=True):
        np.testing.assert_array_equal(mine, other)
