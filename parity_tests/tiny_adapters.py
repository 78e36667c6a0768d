"""Adapters of tiny models, as `mlx_lm.lora` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

SETTINGS = {"rank": 4, "scale": 10.0, "dropout": 0.0}


def adapted(model: nn.Module, *, use_dora: bool = False) -> nn.Module:
    """`model` with random adapters on every layer, in place."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), SETTINGS, use_dora=use_dora)
    rng = np.random.default_rng(0)
    drawn = [(n, mx.array(0.05 * rng.standard_normal(x.shape), x.dtype)) for n, x in trained(model)]
    model.load_weights([(name, value + ("lora" not in name)) for name, value in drawn], strict=False)
    model.eval()
    return model


def trained(model: nn.Module) -> list[tuple[str, mx.array]]:
    """The trainable parameters."""
    return tree_flatten(model.trainable_parameters())


def adapter_directory(path: Path, model: nn.Module, fine_tune_type: str = "lora", **changes: Any) -> Path:
    """The trainable parameters of `model`, and the settings of `adapted` with these changes."""
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), dict(trained(model)))
    config = {"fine_tune_type": fine_tune_type, "num_layers": len(model.layers), "lora_parameters": SETTINGS}
    (path / "adapter_config.json").write_text(json.dumps(config | changes))
    return path
