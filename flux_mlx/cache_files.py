"""Saved prompt caches with a fingerprint: of the whole file, and of the model that made it.

The file is the one that mlx-lm's `save_prompt_cache` writes, so stock commands can read it too. Its metadata also
holds the format's version, the number of layers, a digest of the model, and the file's own (`flux_mlx.fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache as stock_load
from mlx_lm.models.cache import save_prompt_cache as stock_save

from flux_mlx.cache import CacheList
from flux_mlx.fingerprint import BLANK, check_stamp, digest_tensors, is_stamped, stamp
from flux_mlx.weights import check_safetensors
from flux_mlx.window_cache import WHY_NOT_SAVED

VERSION = "2"


def model_digest(model: nn.Module) -> str:
    """SHA-256 over what a model computes with: settings, numbers of its modules, every byte of its parameters.

    The route does not count: one of today is no other model.
    """
    described = {
        "flux": {**model.flux.to_dict(), "route": None} if hasattr(model, "flux") else None,
        "args": getattr(model, "args", None),
        "modules": {name: _constants(module) for name, module in model.named_modules()},
        "parameters": digest_tensors(dict(tree_flatten(model.parameters()))),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=_plain).encode()).hexdigest()


def _constants(module: nn.Module) -> dict[str, float | str]:
    """Numbers and words of a module that are no parameters, as the scale of an adapter; no switches."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, int | float | str) and not isinstance(value, bool | Enum)
    }


def _plain(value: Any) -> Any:
    """A form that JSON has for settings that it has none for."""
    return vars(value) if hasattr(value, "__dict__") else str(value)


def check_target(path: str | Path) -> Path:
    """The path, if a prompt cache can be written there.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The name has another ending than .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"[save_prompt_cache] the name must end in .safetensors, got {path}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"[save_prompt_cache] there is no folder {path.parent} to put {path.name} in.")
    return path


def save_prompt_cache(
    path: str | Path, cache: list[Any], model: nn.Module, metadata: dict[str, str] | None = None
) -> None:
    """Write a prompt cache, whole or not at all; an older file of that name is replaced.

    Args:
        path: File to write, ending in .safetensors.
        cache: Of `model`.
        model: The model whose keys and values these are.
        metadata: To keep along. Stock commands want "model" and "tokenizer_config" here.

    Raises:
        FileNotFoundError: See `check_target`.
        ValueError: The cache has another number of entries than the model layers, or has dropped keys; or
            `check_target` refuses the name.
    """
    path = check_target(path)
    if len(cache) != len(model.layers):
        raise ValueError(f"[save_prompt_cache] {len(cache)} entries for a model of {len(model.layers)} layers.")
    if any(isinstance(entry, CacheList) and entry.is_evicted for entry in cache):
        raise ValueError(f"[save_prompt_cache] {WHY_NOT_SAVED}")
    stamps = {
        "flux_version": VERSION,
        "flux_layers": str(len(cache)),
        "flux_model_sha256": model_digest(model),
    }
    part = path.with_name(f".{path.stem}.{os.getpid()}.part.safetensors")
    try:
        stock_save(str(part), cache, {**(metadata or {}), **stamps, **BLANK})
        stamp(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def has_fingerprint(path: str | Path) -> bool:
    """Whether a file is one of ours, be it damaged: `load_prompt_cache` is for it, not mlx-lm's own function."""
    return is_stamped(Path(path))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a saved cache whose bytes are all as they were written.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No fingerprint, another version, or a byte has changed.
    """
    path = Path(path)
    check_stamp(path)
    entries = check_safetensors(path)[1]
    metadata = {key[2:]: value for key, value in entries.items() if key.startswith("0.")}
    if metadata.get("flux_version") != VERSION:
        found = metadata.get("flux_version")
        raise ValueError(f"[load_prompt_cache] {path} has format {found!r}; this flux_mlx reads {VERSION!r}.")
    return metadata


def check_model(path: str | Path, metadata: dict[str, str], model: nn.Module) -> None:
    """Refuse a saved cache, of which `read_metadata` read this, for another model than the one that made it.

    Raises:
        ValueError: It was made by another model or other routers.
    """
    layers, digest = len(model.layers), model_digest(model)
    if metadata.get("flux_layers") != str(layers):
        raise ValueError(f"[load_prompt_cache] {path} holds {metadata['flux_layers']} layers, the model {layers}.")
    if metadata["flux_model_sha256"] != digest:
        raise ValueError(
            f"[load_prompt_cache] {path} was made by another model or other routers: expected digest {digest}, "
            f"got {metadata['flux_model_sha256']} of {metadata.get('model', 'a model without name')}."
        )


def load_prompt_cache(path: str | Path, model: nn.Module) -> tuple[list[Any], dict[str, str]]:
    """Read a prompt cache that `save_prompt_cache` wrote.

    Args:
        path: The file.
        model: The model to use it with.

    Returns:
        (cache, metadata).

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file was changed, has no fingerprint, or was made by another model or other routers.
    """
    metadata = read_metadata(path)
    check_model(path, metadata, model)
    cache = stock_load(str(path))
    for entry in cache:
        CacheList.adopt(entry)
    return cache, metadata
