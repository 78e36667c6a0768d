"""Compiled steps of a model, cache or setting that changes: none of them decodes by what was."""

from __future__ import annotations

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRALinear

from flux_mlx import token_steps
from parity_tests.tiny_models import flux_model, prompt
from parity_tests.token_by_token import (
    PROMPT_TOKENS,
    decoded,
    double_down,
    one_by_one,
    quantise,
    scale_all,
    steps_of,
    without_steps,
)


def adapt(model) -> None:
    attn = model.layers[1].self_attn
    attn.q_proj = LoRALinear.from_base(attn.q_proj, r=4)
    attn.q_proj.lora_b = mx.ones_like(attn.q_proj.lora_b)


def add_bias(model) -> None:
    model.layers[3].self_attn.v_proj.bias = mx.ones(model.layers[3].self_attn.v_proj.weight.shape[0])


@pytest.mark.parametrize(
    "change", [double_down, scale_all, adapt, add_bias, lambda m: nn.quantize(m.layers[0].mlp, 32)]
)
def test_a_changed_model_decodes_the_next_answer_as_changed(monkeypatch, change):
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 4)
    before = decoded(model, tokens)
    change(model)
    after = decoded(model, tokens)
    assert not np.array_equal(before, after)
    without_steps(monkeypatch)
    np.testing.assert_array_equal(after, decoded(model, tokens))


def test_the_next_turn_of_a_conversation_looks_at_the_model_again(monkeypatch):
    """Even one that is as short as its first call of two tokens."""
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 8)
    original = model.layers[0].mlp.up_proj.weight

    def conversation() -> np.ndarray:
        model.layers[0].mlp.up_proj.weight = original
        cache = model.make_cache()
        decoded(model, tokens[: PROMPT_TOKENS + 3], cache=cache)
        model.layers[0].mlp.up_proj.weight = 2 * original
        mx.eval(model(mx.array([tokens[-5:-3]]), cache=cache))
        return one_by_one(model, tokens[-3:], cache)

    by_steps = conversation()
    without_steps(monkeypatch)
    np.testing.assert_array_equal(by_steps, conversation())


def write_in_place(model) -> None:
    model.layers[2].mlp.down_proj.weight *= 2


def write_an_element(model) -> None:
    model.layers[0].input_layernorm.weight[3] = 7.0


def write_scales(model) -> None:
    model.layers[1].mlp.up_proj.scales *= 2


def set_an_attribute(model) -> None:
    model.layers[1].post_attention_layernorm.eps = 0.5


@pytest.mark.parametrize("change", [write_in_place, write_an_element, write_scales, set_an_attribute])
def test_what_is_written_in_place_counts_from_the_next_answer(monkeypatch, change):
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 4)
    if change is write_scales:
        quantise(model, 8)
    before = decoded(model, tokens)
    steps = steps_of(model)
    change(model)
    after = decoded(model, tokens)
    assert not np.array_equal(before, after)
    assert sum(step in steps for step in steps_of(model)) == len(steps) - 1
    without_steps(monkeypatch)
    np.testing.assert_array_equal(after, decoded(model, tokens))


@pytest.mark.parametrize("change", [double_down, scale_all, adapt, lambda m: nn.quantize(m.layers[0].mlp, 32)])
def test_what_is_replaced_within_an_answer_counts_from_the_next_token(monkeypatch, change):
    tokens = prompt(PROMPT_TOKENS + 6)

    def answer() -> np.ndarray:
        model = flux_model("llama", route=(1,))
        cache = model.make_cache()
        decoded(model, tokens[: PROMPT_TOKENS + 3], cache=cache)
        mx.random.seed(1)  # of adapters
        change(model)
        return one_by_one(model, tokens[-3:], cache)

    by_steps = answer()
    without_steps(monkeypatch)
    np.testing.assert_array_equal(by_steps, answer())


def test_gradients_within_an_answer_go_through_a_step(monkeypatch):
    tokens = prompt(PROMPT_TOKENS + 4)

    def gradient() -> tuple[np.ndarray, np.ndarray]:
        model = flux_model("llama", route=(1,))
        cache = model.make_cache()
        decoded(model, tokens[:-1], cache=cache)
        of_model = nn.value_and_grad(model, lambda token: model(token, cache=cache).square().sum())
        grads = of_model(mx.array([tokens[-1:]]))[1]
        again = one_by_one(model, tokens[:2], cache)
        return np.array(grads["model"]["layers"][1]["mlp"]["down_proj"]["weight"]), again

    by_steps = gradient()
    assert by_steps[0].any()
    without_steps(monkeypatch)
    for mine, other in zip(by_steps, gradient(), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_training_lets_go_of_the_weights_of_the_last_answer():
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 3)
    decoded(model, tokens)
    assert len(steps_of(model)) == len(model.layers)
    scale_all(model)
    model.train()
    model(mx.array([tokens]))
    assert not steps_of(model)


def test_a_stream_of_ones_own_and_no_compilation():
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 4)
    expected = decoded(model, tokens)
    with mx.stream(mx.new_stream(mx.default_device())):
        np.testing.assert_array_equal(decoded(model, tokens), expected)
    mx.disable_compile()
    try:
        np.testing.assert_array_equal(decoded(model, tokens), expected)
    finally:
        mx.enable_compile()


def test_an_interrupted_trace_is_begun_anew(monkeypatch):
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 4)
    expected = decoded(copy.deepcopy(model), tokens)
    cache = model.make_cache()
    mx.eval(model(mx.array([tokens[:PROMPT_TOKENS]]), cache=cache))
    with monkeypatch.context() as patch:
        patch.setattr(token_steps, "rotate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(mx.array([tokens[PROMPT_TOKENS : PROMPT_TOKENS + 1]]), cache=cache)
    np.testing.assert_array_equal(one_by_one(model, tokens[PROMPT_TOKENS:], cache), expected)
    assert all(step.is_traced for step in steps_of(model))


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("act", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_looks_at_the_model_again(act):
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 6)
    cache = model.make_cache()
    decoded(model, tokens[:-2], cache=cache)
    assert all(entry.token_step() is not None for entry in cache)
    twin = act(cache)
    assert all(entry.token_step is None for entry in twin)
    np.testing.assert_array_equal(one_by_one(model, tokens[-2:], twin), one_by_one(model, tokens[-2:], cache))


def test_a_copy_of_a_model_has_steps_of_its_own():
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 4)
    expected = decoded(model, tokens)
    twin = copy.deepcopy(model)
    double_down(twin)
    assert not np.array_equal(decoded(twin, tokens), expected)
    assert not set(map(id, steps_of(model))) & set(map(id, steps_of(twin)))
    np.testing.assert_array_equal(decoded(model, tokens), expected)


def test_a_cache_goes_from_model_to_model():
    """A cache that one model filled is decoded by the weights of the one that is asked."""
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 6)
    other = copy.deepcopy(model)
    double_down(other)

    def mixed(cache: list) -> np.ndarray:
        decoded(model, tokens[: PROMPT_TOKENS + 3], cache=cache)
        return one_by_one(other, tokens[-3:], cache)

    by_steps = mixed(model.make_cache())
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_steps(monkeypatch)
        np.testing.assert_array_equal(by_steps, mixed(model.make_cache()))
