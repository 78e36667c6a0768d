"""Tiny random models of many families, as mlx-lm builds them, and Flux models made of them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes

from flux_mlx.models import apply, routed_layers
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig

VOCABULARY = 211
PATTERN = PatternConfig(block_size=8, sink_tokens=8, window_tokens=16)
ROUTER = RouterConfig(pool_tokens=12)

_COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_GRANITE = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.8,
    "mlp_bias": False,
}
_DEEP_MOE = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "rope_scaling": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True},
    "dots1": _DEEP_MOE,
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {
        "use_bias": False,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "gemma": {},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {**_DEEP_MOE, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    "granite": _GRANITE,
    "granitemoe": {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        **_GRANITE,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "position_embedding_type": "nope",
        "shared_intermediate_size": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "time_step_limit": [0.001, 100.0],
    },
    "helium": {"mlp_bias": False},
    "internlm3": {"bias": False, "qkv_bias": True},
    "llama": {},
    "mimo": {"num_nextn_predict_layers": 0},
    "mistral": {},
    "nanbeige": {},
    "nemotron": {"hidden_act": "relu2", "mlp_bias": False, "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None},
    "qwen2": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "solar_open": {**_DEEP_MOE, "partial_rotary_factor": 1.0, "use_qk_norm": True},
    "starcoder2": {"norm_epsilon": 1e-5},
}
"""Model type to what its config adds to the common one."""


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model."""
    return {"model_type": family, **_COMMON, **FAMILIES[family], **changes}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, so that a model depends on its seed alone; norms stay near 1."""
    rng = np.random.default_rng(seed)

    def draw(name: str, parameter: mx.array) -> mx.array:
        noise = rng.standard_normal(parameter.shape)
        if parameter.ndim > 1:
            return mx.array(parameter.shape[-1] ** -0.5 * noise, parameter.dtype)
        return mx.array((not name.endswith("bias")) + 0.05 * noise, parameter.dtype)

    model.update(tree_map_with_path(draw, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def stock_model(family: str = "llama", seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny stock model, float32."""
    config = tiny_config(family, **changes)
    model_class, args_class = _get_classes(config)
    return randomise(model_class(args_class.from_dict(config)), seed)


def randomise_routers(model: nn.Module, seed: int = 0) -> None:
    """Routers whose decisions differ from layer to layer and from prompt to prompt."""
    rng = np.random.default_rng(seed)
    for attn in routed_layers(model).values():
        last = attn.router.head[-1]
        for step in attn.router.encoder + attn.router.head:
            if "weight" in step:
                step.weight = mx.array(2.0 * step.weight.shape[1] ** -0.5 * rng.standard_normal(step.weight.shape))
                step.bias = mx.array(0.1 * rng.standard_normal(step.bias.shape))
        last.weight = 8.0 * last.weight
        last.bias = mx.zeros(2)
    mx.eval(model.parameters())


def flux_model(
    family: str = "llama", seed: int = 0, route: Any = "auto", pattern: PatternConfig = PATTERN, **changes: Any
) -> nn.Module:
    """The Flux model of `stock_model(family, seed)`, with routers that take both routes."""
    model = apply(stock_model(family, seed, **changes), FluxConfig(pattern=pattern, router=ROUTER, route=route))
    randomise_routers(model, seed)
    return model


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, tokens).tolist()
