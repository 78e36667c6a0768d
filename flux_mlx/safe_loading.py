"""Load any model directory without running code that it holds: Flux models by this package, others by mlx-lm's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from flux_mlx.environment import check_environment
from flux_mlx.model_directory import SHIM_NAME, is_flux_config, read_config, shim_text
from flux_mlx.model_source import find_directory
from flux_mlx.models import Model, ModelArgs, routed_layers
from flux_mlx.spec import RouterConfig
from flux_mlx.weights import check_routers_digest, check_safetensors, routers_of

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


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
    directory = find_directory(path_or_hf_repo)
    config = read_config(directory)
    check_model_file(directory, config)
    return directory, config


def check_finite_routers(model: nn.Module) -> None:
    """Refuse routers that could not decide.

    Raises:
        ValueError: A router parameter holds values that are not finite; the message names it.
    """
    for layer, attn in routed_layers(model).items():
        for name, value in tree_flatten(attn.router.parameters()):
            wrong = value.size - int(mx.isfinite(value).sum())
            if wrong:
                raise ValueError(
                    f"router parameter {RouterConfig.key(layer, name)} has {wrong} values that are not finite."
                )


def load_flux(directory: Path, config: dict[str, Any], *, lazy: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The Flux model of a directory, built by this package, and its whole config.

    Raises:
        FileNotFoundError: No weights.
        ValueError: Damaged weights, or settings or weights that do not fit; the message names the directory. A bad
            variable of the environment; the message names that.
    """
    check_environment()
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"[load] {directory} has no weights: expected model*.safetensors.")
    names = [name for file in files for name in check_safetensors(file)[0]]
    held = 1 + max((int(found[1]) for name in names if (found := _LAYER.search(name))), default=-1)
    sizes = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    stated = config.get("num_hidden_layers", sizes.get("num_hidden_layers"))
    if stated != held:
        raise ValueError(f"[load] {directory / 'config.json'} states num_hidden_layers {stated!r}, the weights {held}.")
    try:
        model, config = load_model(
            directory, lazy, model_config={"model_file": None}, get_model_classes=lambda config: (Model, ModelArgs)
        )
        check_finite_routers(model)
        check_routers_digest(directory, routers_of(routed_layers(model)))
        return model, config
    except Exception as error:  # of a damaged config mlx-lm's model code raises anything
        raise ValueError(f"[load] {directory}: {error or type(error).__name__}") from error


def load_any_tokenizer(directory: Path, settings: dict[str, Any], config: dict[str, Any]) -> Any:
    """The tokenizer of a model directory, without trust in code.

    Raises:
        ValueError: It is damaged; the message names the directory.
    """
    try:
        settings = {**settings, "trust_remote_code": False}
        return load_tokenizer(directory, settings, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # transformers and tokenizers raise anything
        raise ValueError(f"[load] the tokenizer in {directory}: {error or type(error).__name__}") from error


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
    model, config = load_flux(directory, config) if is_flux_config(config) else load_model(directory)
    return model, load_any_tokenizer(directory, tokenizer_config or {}, config), config
