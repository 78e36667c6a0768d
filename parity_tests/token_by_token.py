"""Models decoded token by token, with compiled steps and without."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from flux_mlx.routed_block import RoutedBlock
from flux_mlx.token_steps import TokenStep
from parity_tests.tiny_models import flux_model, prompt

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


def double_down(model) -> None:
    model.layers[2].mlp.down_proj.weight = 2 * model.layers[2].mlp.down_proj.weight


def scale_all(model) -> None:
    model.update(tree_map(lambda x: 1.5 * x, model.parameters()))
