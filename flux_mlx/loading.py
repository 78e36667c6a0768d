"""Load a Flux model directory in Python, without running any code that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _download

from flux_mlx.model_directory import read_config
from flux_mlx.safe_loading import load_any_tokenizer, load_flux


def find_directory(path_or_hf_repo: str) -> Path:
    """A local directory, or the download of a hub id.

    Raises:
        FileNotFoundError: What looks like a path is no directory.
    """
    is_hub_id = path_or_hf_repo.count("/") <= 1 and not path_or_hf_repo.startswith((".", "/", "~"))
    if not is_hub_id and not Path(path_or_hf_repo).is_dir():
        raise FileNotFoundError(f"[load] no such directory: {path_or_hf_repo}")
    return Path(_download(path_or_hf_repo))


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
    directory = find_directory(str(path_or_hf_repo))
    config = read_config(directory)
    if "flux" not in config:
        raise ValueError(f"[load] {directory} has no flux section in config.json; make one with flux_mlx.convert.")
    model, config = load_flux(directory, config, lazy=lazy)
    return model, load_any_tokenizer(directory, {}, config)
