"""Models to benchmark: published shapes with random weights, and the stock model behind a Flux model.

A shape needs no checkpoint: mlx-lm's own class is built from the published config, quantised as mlx-lm would, and
every parameter is then drawn in the form in which it is stored, one at a time, so that no float copy of a quantised
model ever exists.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from flux_mlx.models import FluxModel, RoutedAttention, RoutedBlock

GROUP_SIZE = 64
BITS = (4, 8, 16)
"""Bits of a weight; 16 leaves the weights as they are, in the dtype of the activations."""

_LARGE = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
_QWEN3 = {**_LARGE, "model_type": "qwen3", "num_hidden_layers": 36, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        **_LARGE,
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": _LLAMA3_ROPE,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "small": {
        **_QWEN3,
        "hidden_size": 512,
        "num_hidden_layers": 10,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": True,
    },
    "tiny": {
        **_QWEN3,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
"""config.json of each shape, as published (Qwen3-4B, Qwen3-8B, Llama-3.1-8B); `small` and `tiny` are nobody's."""


def default_dtype() -> str:
    """float32 where MLX computes on a CPU, whose half-precision products are slow; else bfloat16."""
    return "float32" if mx.default_device() == mx.Device(mx.cpu) else "bfloat16"


def random_model(config: dict[str, Any], bits: int = 16, dtype: str | None = None, seed: int = 0) -> nn.Module:
    """A stock model of mlx-lm with random weights, evaluated.

    Args:
        config: config.json, as in `SHAPES`.
        bits: 4 or 8 quantises every matrix that mlx-lm would, in groups of 64; 16 none.
        dtype: Of everything that is not quantised; None is `default_dtype()`.
        seed: Of the weights.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: Other bits, or a model type that mlx-lm does not have.
    """
    if bits not in BITS:
        raise ValueError(f"[random_model] bits must be one of {list(BITS)}, got {bits}.")
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if bits < 16:
        nn.quantize(model, GROUP_SIZE, bits, class_predicate=_is_quantizable)
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))
    for name, lazy in tree_flatten(model.parameters()):
        drawn = _draw(name, lazy, bits, getattr(mx, dtype or default_dtype()), next(keys))
        mx.eval(drawn)
        model.update(tree_unflatten([(name, drawn)]))
    model.eval()
    return model


def _is_quantizable(_: str, module: nn.Module) -> bool:
    """What mlx-lm quantises: modules that can be, with rows of whole groups."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0


def _draw(name: str, lazy: mx.array, bits: int, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """A parameter of the shape of `lazy`, which is never computed: outputs keep the size of their inputs."""
    kind, shape = name.rpartition(".")[2], lazy.shape
    if lazy.dtype == mx.uint32:
        return mx.random.split(key, lazy.size // 2).reshape(shape)  # keys are raw random bits, two words each
    if kind in ("scales", "biases"):  # packed values are uniform in 0 .. 2**bits - 1
        scale = (12 / (shape[-1] * GROUP_SIZE)) ** 0.5 / 2**bits
        return mx.full(shape, scale if kind == "scales" else -scale * (2**bits - 1) / 2, dtype)
    if lazy.ndim < 2:
        return mx.full(shape, float(kind != "bias"), dtype)
    return mx.random.normal(shape, dtype, scale=shape[-1] ** -0.5, key=key)


def stock_view(model: nn.Module) -> nn.Module:
    """The model of mlx-lm that a Flux model was made of: mlx-lm's own classes over the same arrays, no router.

    Args:
        model: A Flux model; it stays as it is.

    Raises:
        ValueError: Not a Flux model.
    """
    if not isinstance(model, FluxModel):
        raise ValueError(f"[stock_view] expected a Flux model, got {type(model).__name__}.")
    return _unrouted(model)


def _unrouted(part: Any) -> Any:
    """A copy of a module tree that shares its arrays, each mixed class replaced by its stock class."""
    if isinstance(part, (list, tuple)):
        return type(part)(_unrouted(item) for item in part)
    if not isinstance(part, nn.Module):
        return part
    twin = copy.copy(part)
    if isinstance(part, (FluxModel, RoutedAttention, RoutedBlock)):
        twin.__class__ = type(part).__bases__[1]
        twin.pop("router", None)  # what else routing set on the modules, stock code does not read
    for name, child in twin.items():
        twin[name] = _unrouted(child)
    return twin


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
