"""Adapters that mlx-lm's trainers wrote: files and settings are checked before a model takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_adapters as stock_load

from flux_mlx.model_directory import read_json
from flux_mlx.weights import check_safetensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapters.safetensors"
FINE_TUNE_TYPES = ("lora", "dora", "full")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
MAX_SCALE = float(np.finfo(np.float32).max)


def check_adapters(directory: str | Path) -> None:
    """Check what can be checked of adapters without their model.

    Raises:
        FileNotFoundError: No such directory, or a file of it is not there.
        ValueError: Settings that mean nothing, a damaged file, or values of another dtype than DTYPES or not finite;
            the message names the file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"[load_adapters] no such directory: {directory}")
    _check_config(directory / CONFIG_NAME)
    _check_tensors(directory / WEIGHTS_NAME)


def load_adapters(model: nn.Module, directory: str | Path) -> None:
    """Put adapters on a model, in place, and the model into evaluation mode.

    Modules that are to be adapted, but of which the file says nothing, stay as they were.

    Args:
        model: The model that they were trained on. After an error it is to be dropped: it may be half adapted.
        directory: With adapters.safetensors and adapter_config.json, as `mlx_lm.lora` writes them.

    Raises:
        FileNotFoundError: As `check_adapters`.
        ValueError: As `check_adapters`; or names or shapes that the model does not have.
    """
    check_adapters(directory)
    try:
        stock_load(model, str(directory))
    except Exception as error:  # of settings that do not fit the model mlx-lm's layers raise anything
        raise ValueError(f"[load_adapters] {directory}: {_one_line(error)}") from error
    model.eval()


def _one_line(error: Exception) -> str:
    """An error's message with the first of the tensors that it lists."""
    head, *listed = str(error).splitlines() or [type(error).__name__]
    more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
    return f"{head} {listed[0].strip()}{more}" if listed else head


def _check_config(path: Path) -> None:
    """Refuse settings that mlx-lm would fail on later, or take for something else."""
    if not path.is_file():
        raise FileNotFoundError(f"[load_adapters] no such file: {path}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"[load_adapters] {path} must be a JSON object, got {type(config).__name__}.")
    kind = config.get("fine_tune_type", "lora")
    if kind not in FINE_TUNE_TYPES:
        raise ValueError(f"[load_adapters] {path}: fine_tune_type must be one of {FINE_TUNE_TYPES}, got {kind!r}.")
    if kind == "full":
        return
    settings = config.get("lora_parameters")
    found = {**(settings if isinstance(settings, dict) else {}), "num_layers": config.get("num_layers")}
    for name, (holds, expected) in _SETTINGS.items():
        if not holds(found.get(name)):
            raise ValueError(f"[load_adapters] {path}: {name} must be {expected}, got {found.get(name)!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    """Whether a value is a number that float32 can hold."""
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= MAX_SCALE


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_SETTINGS = {
    "num_layers": (_is_int, "an integer"),
    "rank": (lambda value: _is_int(value) and value >= 1, "an integer of 1 or more"),
    "scale": (_is_real, "a finite number"),
    "dropout": (lambda value: _is_real(value) and 0 <= value < 1, "a number in [0, 1)"),
    "keys": (_are_names, "a list of module names, or absent"),
}
"""Setting of LoRA and DoRA to (what holds for it, in words)."""


def _check_tensors(path: Path) -> None:
    """Refuse a damaged file, an empty one, and tensors of other dtypes or that are not finite."""
    names, _ = check_safetensors(path)
    if not names:
        raise ValueError(f"[load_adapters] {path} has no tensors.")
    try:
        tensors = mx.load(str(path))
    except (RuntimeError, ValueError) as error:  # dtypes that MLX does not have
        raise ValueError(f"[load_adapters] {path}: {error}") from error
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            raise ValueError(f"[load_adapters] {path}: {name} must be one of {DTYPES}, got {value.dtype}.")
        if wrong := value.size - int(mx.isfinite(value).sum()):
            raise ValueError(f"[load_adapters] {path}: {name} has {wrong} values that are not finite.")
