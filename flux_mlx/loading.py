"""Load a Flux model directory in Python, without running any code that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn

from flux_mlx.model_directory import read_config
from flux_mlx.model_source import find_directory
from flux_mlx.safe_loading import load_any_tokenizer, load_flux


def load(path_or_hf_repo: str | Path, *, lazy: bool = False) -> tuple[nn.Module, Any]:
    """Load a Flux model directory. The directory's `model_file` is not run: the model is built by this package.

    Args:
        path_or_hf_repo: Local directory, or a hub id that mlx-lm can download.
        lazy: Leave the weights unevaluated until they are used.

    Returns:
        (model, tokenizer), as `mlx_lm.load` gives them.

    Raises:
        FileNotFoundError: No such directory, or no weights in it.
        ValueError: Not a Flux model, its settings or weights do not fit, or a variable of the environment is bad.
    """
    directory = find_directory(str(path_or_hf_repo))
    config = read_config(directory)
    if "flux" not in config:
        raise ValueError(f"[load] {directory} has no flux section in config.json; make one with flux_mlx.convert.")
    model, config = load_flux(directory, config, lazy=lazy)
    return model, load_any_tokenizer(directory, {}, config)
