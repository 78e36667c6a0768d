"""Load any model directory without running code that it holds: Flux models by this package, others by mlx-lm's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _download, load_model, load_tokenizer

from flux_mlx.model_directory import SHIM_NAME, is_flux_config, read_config, shim_text
from flux_mlx.models import Model, ModelArgs


def check_model_file(directory: Path, config: dict[str, Any]) -> None:
    """Allow a directory that names no code, or whose `model_file` is our shim, byte for byte.

    Raises:
        ValueError: It names other code.
    """
    name = config.get("model_file")
    if name is None:
        return
    file = directory / SHIM_NAME
    if name != SHIM_NAME or not file.is_file() or file.read_bytes() != shim_text().encode():
        raise ValueError(f"[load] {directory} asks to run its own code ({name!r}); models with code are not loaded.")
    if not is_flux_config(config):
        raise ValueError(f"[load] {directory / 'config.json'} names {SHIM_NAME} but has no flux section.")


def find_model(path_or_hf_repo: str) -> tuple[Path, dict[str, Any]]:
    """Directory (downloaded if it is a hub id) and config of a model that needs no code of its own.

    Raises:
        FileNotFoundError: No such directory, or no config in it.
        ValueError: It needs code of its own, or its config is damaged.
    """
    directory = Path(_download(path_or_hf_repo))
    config = read_config(directory)
    check_model_file(directory, config)
    return directory, config


def load_without_code(
    path_or_hf_repo: str, tokenizer_config: dict[str, Any] | None = None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load a Flux or a stock model.

    Args:
        path_or_hf_repo: Local directory, or a hub id that mlx-lm can download.
        tokenizer_config: As for `mlx_lm.load`, without trust in code.

    Returns:
        (model, tokenizer, config).

    Raises:
        FileNotFoundError: No such directory, or no config or weights in it.
        ValueError: It needs code of its own, or its settings or weights do not fit.
    """
    directory, config = find_model(path_or_hf_repo)
    settings: dict[str, Any] = {"trust_remote_code": False}
    if is_flux_config(config):
        settings |= {"model_config": {"model_file": None}, "get_model_classes": lambda config: (Model, ModelArgs)}
    model, config = load_model(directory, **settings)
    tokenizer_config = {**(tokenizer_config or {}), "trust_remote_code": False}
    return model, load_tokenizer(directory, tokenizer_config, eos_token_ids=config.get("eos_token_id")), config
