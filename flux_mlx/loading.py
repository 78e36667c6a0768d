"""Load a Flux model directory in Python, without running any code that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _download, load_model, load_tokenizer

from flux_mlx.model_directory import read_config
from flux_mlx.models import Model, ModelArgs


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
    if "flux" not in read_config(directory):
        raise ValueError(f"[load] {directory} has no flux section in config.json; make one with flux_mlx.convert.")
    model, config = load_model(
        directory,
        lazy=lazy,
        model_config={"model_file": None},
        get_model_classes=lambda config: (Model, ModelArgs),
    )
    return model, load_tokenizer(directory, eos_token_ids=config.get("eos_token_id"))
