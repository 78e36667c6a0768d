"""Load a Flux model directory in Python, without running any code that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _download, load_model, load_tokenizer

from flux_mlx.models import Model, ModelArgs


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a JSON object, or has no `flux` section.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"[load] {directory} holds no config.json; expected a Flux model directory.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"[load] {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "flux" not in config:
        raise ValueError(f"[load] {path} has no flux section; make a Flux model directory with flux_mlx.convert.")
    return config


def load(path_or_hf_repo: str | Path, *, lazy: bool = False) -> tuple[nn.Module, Any]:
    """Load a Flux model directory. The directory's `model_file` is not run: the model is built by this package.

    Args:
        path_or_hf_repo: Local directory, or a hub id that mlx-lm can download.
        lazy: Leave the weights unevaluated until they are used.

    Returns:
        (model, tokenizer), as `mlx_lm.load` gives them.

    Raises:
        FileNotFoundError: No such directory, or no weights in it.
        ValueError: Not a Flux model, or its settings or weights do not fit.
    """
    directory = Path(_download(str(path_or_hf_repo)))
    read_config(directory)
    model, config = load_model(
        directory,
        lazy=lazy,
        model_config={"model_file": None},
        get_model_classes=lambda config: (Model, ModelArgs),
    )
    return model, load_tokenizer(directory, eos_token_ids=config.get("eos_token_id"))
