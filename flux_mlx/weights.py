"""Router checkpoints: names in and out, checks, fresh routers.

Two namings are read. Ours, `...layers.{i}.self_attn.router.{encoder,head}.{n}.{weight,bias}`, and that of the published
checkpoints, `...self_attn.mask_allocator.cls_feat_extractor.*` (encoder) and `...cls_router_head_agnostic.*` (head),
which come with changed q, k and v projections and with training state that inference does not need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from flux_mlx.fingerprint import BLANK, check_stamp, digest_tensors, is_stamped, stamp
from flux_mlx.model_directory import building, is_flux_config, read_config, read_json
from flux_mlx.official import is_official, official_settings, two_logits
from flux_mlx.spec import FluxConfig, RouterConfig, init_weights
from flux_mlx.spec.config import SETTINGS_KEY

Routers = dict[int, dict[str, mx.array]]
"""Layer to the parameters of `RouterConfig.parameter_shapes`, float32."""

INDEX_NAME = "model.safetensors.index.json"
DIGEST_KEY = "flux_routers_sha256"
"""Digest of a directory's routers, in its index's metadata. Whatever saves a model anew writes an index without it."""

_ROUTER = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(?:router|mask_allocator)\.(.+)")
_PUBLISHED_NAMES = {"cls_feat_extractor.": "encoder.", "cls_router_head_agnostic.": "head."}
_TRAINING_STATE = re.compile(
    r"(?:.*\.)?(?:self_attn\.(?:attn_mask_log_alphas|mask_allocator\.(?:log_temp|task_embedding\.weight))"
    r"|sparsity_lambda\w*)"
)
_PROJECTION = re.compile(r"(?:.*\.)?layers\.\d+\.self_attn\.[qkv]_proj\..+")


def split_router_key(key: str) -> tuple[int, str] | None:
    """(layer, our parameter name) of a router tensor in either naming; None for any other tensor."""
    match = _ROUTER.fullmatch(key)
    if match is None:
        return None
    name = match[2]
    for published, ours in _PUBLISHED_NAMES.items():
        if name.startswith(published):
            name = ours + name.removeprefix(published)
    return int(match[1]), name


def without_routers(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors of the base model: no routers, no training state of published checkpoints."""
    return {k: v for k, v in weights.items() if not (_ROUTER.fullmatch(k) or _TRAINING_STATE.fullmatch(k))}


@dataclass
class RouterCheckpoint:
    """What a router file holds.

    Args:
        routers: The routers, float32, not yet compared with a model (`check_routers`).
        projections: q, k and v projections of a published checkpoint, under their names and in their dtype.
        flux: Settings that the routers were trained with, if the file says.
    """

    routers: Routers = field(default_factory=dict)
    projections: dict[str, mx.array] = field(default_factory=dict)
    flux: FluxConfig | None = None


def check_safetensors(path: Path) -> tuple[list[str], dict[str, str]]:
    """Check that header and length of a safetensors file agree.

    Returns:
        (names of the tensors, metadata).

    Raises:
        FileNotFoundError: No such file.
        ValueError: Truncated or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"[check_safetensors] no such file: {path}")
    try:
        with safe_open(path, "numpy") as file:
            return list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"[check_safetensors] {path} is no whole safetensors file: {error}") from None


def has_routers(directory: Path) -> bool:
    """Whether the weights of a model directory contain routers, in either naming."""
    return any(_ROUTER.fullmatch(key) for file in directory.glob("*.safetensors") for key in check_safetensors(file)[0])


def read_routers(path: str | Path) -> RouterCheckpoint:
    """Read routers from a safetensors file, or from all those of a directory, in either naming.

    The settings come from the file's metadata (`write_routers`), or from the directory's config.json.

    Raises:
        FileNotFoundError: No such file, or none in the directory.
        ValueError: A damaged file, no router in it, one named twice, values that are not finite or no floats, or other
            routers than the directory was made with.
    """
    path, checkpoint = Path(path), RouterCheckpoint()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"[read_routers] no *.safetensors in {path}")
    published = False
    for file in files:
        if is_stamped(file):
            check_stamp(file)
        names, metadata = check_safetensors(file)
        published = published or any(".mask_allocator." in name for name in names)
        if SETTINGS_KEY in metadata:
            with _naming(file):
                checkpoint.flux = FluxConfig.from_dict(json.loads(metadata[SETTINGS_KEY]))
        for key, value in mx.load(str(file)).items():
            if _PROJECTION.fullmatch(key):
                checkpoint.projections[key] = value
            elif not _TRAINING_STATE.fullmatch(key) and (found := split_router_key(key)) is not None:
                _add(checkpoint.routers, *found, value, f"{file}: {key}")
    if not checkpoint.routers:
        raise ValueError(
            f"[read_routers] {path} has no routers: expected tensors like {RouterConfig.key(0, 'head.4.weight')}"
        )
    checkpoint.routers = {layer: two_logits(parameters) for layer, parameters in checkpoint.routers.items()}
    if not published:
        checkpoint.projections.clear()
    if path.is_dir():
        check_routers_digest(path, checkpoint.routers)
    if path.is_dir() and (path / "config.json").is_file():
        with _naming(path / "config.json"):
            checkpoint.flux = _directory_settings(read_config(path))
    return checkpoint


def _add(routers: Routers, layer: int, name: str, value: mx.array, where: str) -> None:
    """Add one router parameter as float32; `where` names file and tensor."""
    if not mx.issubdtype(value.dtype, mx.floating):
        raise ValueError(f"[read_routers] {where} of layer {layer} must be floating point, got {value.dtype}")
    value = value.astype(mx.float32)
    wrong = value.size - int(mx.isfinite(value).sum())
    if wrong:
        raise ValueError(f"[read_routers] {where} of layer {layer} has {wrong} values that are not finite")
    parameters = routers.setdefault(layer, {})
    if name in parameters:
        raise ValueError(f"[read_routers] {where} is a second {name} of layer {layer}")
    parameters[name] = value


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Name `file` in the error about settings that it holds."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"[read_routers] {file}: its settings are wrong: {error}") from None


def _directory_settings(config: dict[str, Any]) -> FluxConfig | None:
    """Settings in config.json, of ours or of a published checkpoint; None if it has none."""
    if is_flux_config(config):
        return FluxConfig.from_dict(config[SETTINGS_KEY])
    return official_settings(config) if is_official(config) else None


def check_routers(routers: Routers, head_dims: Mapping[int, int]) -> None:
    """Compare routers with the layers of a model.

    Args:
        routers: To check.
        head_dims: Routed layer to its head size D.

    Raises:
        ValueError: Other layers, parameters missing or unknown, or shapes that do not fit D.
    """
    _check_names("layers with a router", head_dims, routers)
    for layer, head_dim in head_dims.items():
        expected = RouterConfig.parameter_shapes(head_dim)
        _check_names(f"router parameters of layer {layer}", expected, routers[layer])
        for name, shape in expected.items():
            got = routers[layer][name].shape
            if got != shape:
                raise ValueError(
                    f"[check_routers] {name} of layer {layer} must have shape {list(shape)} for the model's head size "
                    f"{head_dim}, got {list(got)}"
                )


def _check_names(what: str, expected: Mapping[Any, Any], got: Mapping[Any, Any]) -> None:
    missing, unknown = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"[check_routers] {what}: the file lacks {missing} and has {unknown}, which the model lacks")


def fresh_routers(head_dims: Mapping[int, int], config: RouterConfig, seed: int = 0) -> Routers:
    """New routers, drawn layer by layer (`spec.init_weights`), the same for the same seed and layer."""
    return {
        layer: {k: mx.array(v) for k, v in init_weights(d, config, np.random.default_rng([seed, layer])).items()}
        for layer, d in head_dims.items()
    }


def flatten_routers(routers: Routers) -> dict[str, mx.array]:
    """Routers under the names of a model directory."""
    return {
        RouterConfig.key(layer, name): value for layer, part in sorted(routers.items()) for name, value in part.items()
    }


def routers_of(layers: Mapping[int, nn.Module]) -> Routers:
    """The routers of a model's routed attention modules (`models.routed_layers`)."""
    return {layer: dict(tree_flatten(attn.router.parameters())) for layer, attn in layers.items()}


def keep_routers_digest(directory: Path, digest: str) -> None:
    """Note the digest of its routers in a directory that mlx-lm's `save_model` wrote."""
    path = directory / INDEX_NAME
    index = json.loads(path.read_text("utf-8"))
    index["metadata"][DIGEST_KEY] = digest
    path.write_text(json.dumps(index, indent=4), "utf-8")


def check_routers_digest(directory: Path, routers: Routers) -> None:
    """Compare the routers read from a directory with the digest that it was made with, if it has one.

    Raises:
        ValueError: Other routers, or the index is no JSON.
    """
    path = directory / INDEX_NAME
    index = read_json(path) if path.is_file() else {}
    metadata = index.get("metadata") if isinstance(index, dict) else None
    expected = metadata.get(DIGEST_KEY) if isinstance(metadata, dict) else None
    if expected is not None and expected != (got := digest_tensors(flatten_routers(routers))):
        raise ValueError(
            f"[check_routers_digest] the routers in {directory} were changed: expected SHA-256 {expected}, got {got}."
        )


def write_routers(path: str | Path, routers: Routers, flux: FluxConfig, dtype: mx.Dtype = mx.float32) -> None:
    """Write a routers-only file that `read_routers` and `flux_mlx.convert --routers` take.

    Args:
        path: New file, ending in .safetensors.
        routers: Layer to parameters.
        flux: Settings they belong to, kept in the file's metadata.
        dtype: float32 or float16.

    Raises:
        FileExistsError: `path` exists.
    """
    tensors = {key: value.astype(dtype) for key, value in flatten_routers(routers).items()}
    with building(Path(path)) as part:
        mx.save_safetensors(str(part), tensors, metadata={SETTINGS_KEY: json.dumps(flux.to_dict()), **BLANK})
        stamp(part)
