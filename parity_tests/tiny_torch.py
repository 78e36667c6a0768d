"""Tiny random models as transformers builds them, attached to routers that take both routes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cuda_reference.model import attach, routers
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig

VOCABULARY = 97
STREAMING = PatternConfig(block_size=4, sink_tokens=4, window_tokens=8, last_tokens=6, stride=2, threshold=0.6)
PATTERNS = {name: replace(STREAMING, name=name) for name in ("streaming", "triangle", "xattention")}
FLUX = FluxConfig(pattern=STREAMING, router=RouterConfig(pool_tokens=5))
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": 8},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 0, 1], "head_dim": 8},
    "olmo2": {"head_dim": 8},
    "cohere": {"use_qk_norm": True, "head_dim": 8},
    "gemma3_text": {**LOCAL, "query_pre_attn_scalar": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
"""Model type to what its config adds: plain, biased, normed by head, normed over heads, normed after a transpose."""


def stock_model(family: str = "llama", seed: int = 0, impl: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A tiny stock model in eval mode, float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=impl)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.eval()


def randomise_routers(model: PreTrainedModel, seed: int = 0) -> None:
    """Routers whose decisions differ from layer to layer and from prompt to prompt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routers(model).values():
            for name, parameter in router.named_parameters():
                scale = 2.0 * parameter.shape[-1] ** -0.5 if name.endswith("weight") else 0.1
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            router.head[-1].weight.mul_(8.0)
            router.head[-1].bias.zero_()


def flux_model(family: str = "llama", seed: int = 0, config: FluxConfig = FLUX, **changes: Any) -> PreTrainedModel:
    """The routed form of `stock_model(family, seed)`."""
    model = attach(stock_model(family, seed, **changes), config)
    randomise_routers(model, seed)
    return model


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(rows: list[list[int]], pad: int = 0) -> torch.Tensor:
    """Rows padded on the right, int64 `[B, longest]`."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
