"""Tokens decoded by compiled steps: bit for bit what stock's code and the layers' own calls give."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.rope_utils import Llama3RoPE
from mlx_lm.tuner.lora import LoRALinear

import flux_mlx
from flux_mlx import token_steps
from flux_mlx.benchmark_parts import AttentionShape, grow
from flux_mlx.families import project, project_token
from flux_mlx.models import routed_layers, set_kv_policy, set_route
from flux_mlx.routed_block import RoutedBlock
from flux_mlx.token_steps import TokenStep
from parity_tests.held_memory import settled_memory
from parity_tests.tiny_models import FAMILIES, flux_model, prompt, stock_model

UNTRACED = {"cohere"}  # its blocks are parallel
ON_DEVICES = [(family, dtype, bits) for family in ("llama", "qwen3", "granite", "gemma") for dtype, bits in
              (("float32", None), ("float16", None), ("bfloat16", 4))]  # fmt: skip
PROMPT_TOKENS = 45


def decoded(model, tokens: list[int], prompt_tokens: int = PROMPT_TOKENS, cache: list | None = None) -> np.ndarray:
    """Logits of the tokens behind a prompt, fed one by one."""
    cache = make_prompt_cache(model) if cache is None else cache
    x = mx.array(tokens)[None]
    mx.eval(model(x[:, :prompt_tokens], cache=cache))
    return one_by_one(model, tokens[prompt_tokens:], cache)


def one_by_one(model, tokens: list[int], cache: list) -> np.ndarray:
    """Logits of tokens, each evaluated before the next."""
    outs = (model(mx.array([[token]]), cache=cache)[0, 0].astype(mx.float32) for token in tokens)
    return np.stack([np.array(out) for out in outs])


def steps_of(model) -> list[TokenStep]:
    """All that the model's blocks keep."""
    blocks = [layer for layer in model.layers if isinstance(layer, RoutedBlock)]
    return [step for block in blocks for step in block.token_steps._steps.values()]


def without_steps(monkeypatch) -> None:
    """From now on every token goes through the layers' own calls."""
    monkeypatch.setattr(RoutedBlock, "is_plain_token", lambda *_: False)


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


def by_steps_and_by_own_calls(monkeypatch, family: str, dtype: str, bits: int | None) -> list[np.ndarray]:
    """Logits of a few tokens, both ways, of a model with full and sparse layers."""
    model, tokens = flux_model(family, route=(1, 2), head_dim=64), prompt(PROMPT_TOKENS + 5)
    model.set_dtype(getattr(mx, dtype))
    if bits is not None:
        quantise(model, bits)
    logits = [decoded(model, tokens)]
    assert all(step.is_traced for step in steps_of(model))
    without_steps(monkeypatch)
    return [*logits, decoded(model, tokens)]


def quantise(model, bits: int) -> None:
    """All products but the routers'."""
    nn.quantize(model, 32, bits, class_predicate=lambda name, m: hasattr(m, "to_quantized") and "router" not in name)


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


def double_down(model) -> None:
    model.layers[2].mlp.down_proj.weight = 2 * model.layers[2].mlp.down_proj.weight


def scale_all(model) -> None:
    model.update(tree_map(lambda x: 1.5 * x, model.parameters()))


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


def test_every_thread_traces_for_itself():
    model, tokens, found = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 4), []
    cache = model.make_cache()
    expected = decoded(model, tokens, cache=copy.deepcopy(cache))
    thread = threading.Thread(target=lambda: found.append(decoded(model, tokens, cache=cache)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], expected)
    assert len(steps_of(model)) == 2 * len(model.layers)


def test_threads_that_come_and_go_leave_few_steps():
    model = flux_model("llama", route="full")
    block, x = model.layers[0], mx.zeros((1, 1, 128))
    started = threading.Barrier(12)  # all are alive at once, so that no number is given out twice

    def trace() -> None:
        block.token_steps.find(block, x)
        started.wait()

    threads = [threading.Thread(target=trace) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < len(block.token_steps._steps) <= 8


def test_steps_hold_no_copy_of_a_weight_and_no_old_weight_for_long():
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 3)
    mx.eval(model(mx.array(tokens)[None], cache=model.make_cache()))
    held = settled_memory()
    thread = threading.Thread(target=decoded, args=(model, tokens))
    thread.start()
    thread.join()
    decoded(model, tokens)
    assert settled_memory() - held < model.layers[0].mlp.up_proj.weight.nbytes // 4
    old = weakref.ref(steps_of(model)[0]), weakref.ref(steps_of(model)[1])
    double_down(model)
    scale_all(model)
    decoded(model, tokens)
    assert [step() for step in old] == [None, None]


@pytest.mark.parametrize("route", ["full", "sparse"])
def test_a_token_copies_no_keys(route):
    model = flux_model("llama", route=route)
    shape, cache = AttentionShape.of(model), model.make_cache()
    for entry in cache:
        grow(entry.kv, shape, 20_000)
    one_by_one(model, prompt(3), cache)
    held = settled_memory()
    one_by_one(model, prompt(3), cache)
    assert all(step.is_traced for step in steps_of(model))
    assert mx.get_peak_memory() - held < cache[0].kv.keys.nbytes // 2


def test_neither_steps_nor_kept_caches_hold_on_to_a_model():
    model = flux_model("llama", route=(1,))
    cache = model.make_cache()
    decoded(model, prompt(PROMPT_TOKENS + 4), cache=cache)
    block, step = weakref.ref(model.layers[0]), weakref.ref(steps_of(model)[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert block() is None  # no cycle: the memory is free at once
        assert step() is None
    finally:
        gc.enable()
    assert flux_mlx.routes(cache)


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
