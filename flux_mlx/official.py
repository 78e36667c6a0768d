"""Published Flux Attention checkpoints (`PawQwen3ForCausalLM`, `PawLlamaForCausalLM`): their settings in our terms.

Their config.json is the base model's with keys added; the defaults below are those of the published inference code for
keys that are missing, which are not those of its training script. Tensor names are read in `flux_mlx.weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig

ARCHITECTURES = {"PawQwen3ForCausalLM": "Qwen3ForCausalLM", "PawLlamaForCausalLM": "LlamaForCausalLM"}
"""Published architecture to that of its base model."""

DEFAULTS = {
    "toggle_type": "streaming",
    "retrieval_mode": "full",
    "pooling_mode": "ctx_q",  # the code's default is one that its own inference refuses
    "sink_size": 128,
    "local_window_size": 1024,
    "pool_size": 100,
    "triangle_n_last": 128,
}
_PATTERNS = {"streaming": "streaming", "triangle": "triangle", "xattn": "xattention"}
_BLOCK_TOKENS = 128
_OTHER_KEYS = (
    *("use_softmax", "use_task_emb_for_mask", "mask_temp", "mask_hard_sample", "enable_ada_sparsity", "topk_k"),
    *("enable_lambda_task", "disable_linear_regularization_term", "suggested_sparsity", "suggested_threshold"),
)


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a published checkpoint, by its architecture or by the pool's key."""
    return "pool_size" in config or any(name in ARCHITECTURES for name in config.get("architectures") or ())


def _whole(value: Any) -> Any:
    """150.0 as 150; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def official_settings(config: Mapping[str, Any]) -> FluxConfig:
    """Pattern and pool of a published checkpoint.

    Raises:
        ValueError: Its full layers, its sparse layers or its pool are of a kind that is not implemented here.
    """
    said = {name: _whole(config.get(name, default)) for name, default in DEFAULTS.items()}
    if said["toggle_type"] not in tuple(_PATTERNS):
        raise ValueError(f"[official] toggle_type must be one of {list(_PATTERNS)}, got {said['toggle_type']!r}")
    if said["retrieval_mode"] != "full":
        raise ValueError(f"[official] retrieval_mode must be 'full', got {said['retrieval_mode']!r}")
    if said["pooling_mode"] != "ctx_q":
        raise ValueError(f"[official] pooling_mode must be 'ctx_q', got {said['pooling_mode']!r}")
    pattern = PatternConfig(
        name=_PATTERNS[said["toggle_type"]],
        block_size=_BLOCK_TOKENS,
        sink_tokens=said["sink_size"],
        window_tokens=said["local_window_size"],
        last_tokens=said["triangle_n_last"],
    )
    return FluxConfig(pattern, RouterConfig(pool_tokens=said["pool_size"]))


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the base model: a published one without its own keys, any other as it is."""
    if not is_official(config):
        return dict(config)
    dropped = {*DEFAULTS, *_OTHER_KEYS, "auto_map"}
    base = {key: value for key, value in config.items() if key not in dropped}
    if "architectures" in base:
        base["architectures"] = [ARCHITECTURES.get(name, name) for name in base["architectures"]]
    return base


def two_logits(parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A router of one logit (`use_softmax` false: full where it is positive) as one of two, (0, logit)."""
    weight, bias = (parameters.get(f"head.4.{part}") for part in ("weight", "bias"))
    if weight is None or bias is None or weight.shape[0] != 1 or bias.shape != (1,):
        return dict(parameters)
    grown = {"head.4.weight": mx.pad(weight, [(1, 0), (0, 0)]), "head.4.bias": mx.pad(bias, [(1, 0)])}
    return {**parameters, **grown}
