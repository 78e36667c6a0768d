"""The base model of a conversion: find it, load it without routers, cast and quantise it."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, mixed_quant_predicate_builder
from mlx_lm.utils import _get_classes, load_model, quantize_model

from flux_mlx.gguf_directory import write_plain_directory
from flux_mlx.model_directory import CARD_NAME, Base, card_field, is_flux_config, read_config
from flux_mlx.model_source import find_directory
from flux_mlx.official import base_config
from flux_mlx.weights import check_safetensors, without_routers

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer*", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "LICENCE*")
_HUB_FILES += ("NOTICE*", "USE_POLICY*", CARD_NAME)
_GGUF_ACCELERATOR_DTYPE = "bfloat16"  # activations of models trained in bfloat16 can overflow float16


@dataclass(frozen=True)
class Quantization:
    """How to quantise the base model's weights: the `--q-*` flags of `mlx_lm.convert`; None is mlx-lm's default."""

    group_size: int | None = None
    bits: int | None = None
    mode: str = "affine"
    recipe: str | None = None


def default_dtype(config: Mapping[str, Any]) -> str | None:
    """Dtype to write: float32 if MLX computes on a CPU, else what config.json names, else None (as it is)."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "float32"
    text = config.get("text_config") or {}
    named = config.get("torch_dtype") or config.get("dtype") or text.get("torch_dtype") or text.get("dtype")
    return named if named in MODEL_CONVERSION_DTYPES else None


@contextmanager
def source_directory(
    source: str, dtype: str | None, scratch: Path, revision: str | None
) -> Iterator[tuple[Path, Base]]:
    """The model directory of `source`: itself, a snapshot of the hub, or a temporary one made of a GGUF.

    Args:
        source: Directory, hub id, or GGUF file.
        dtype: dtype to dequantise a GGUF to; None is the default of the machine.
        scratch: Existing directory in which a temporary one may be made.
        revision: Revision at the hub.

    Raises:
        FileNotFoundError: No such file, directory or hub id.
        GGUFError: See `flux_mlx.gguf`.
    """
    path = Path(source)
    if path.is_file() or path.suffix == ".gguf":
        with tempfile.TemporaryDirectory(prefix=".gguf.", dir=scratch) as made:
            plain = Path(made) / "plain"
            write_plain_directory(path, plain, dtype or default_dtype({"dtype": _GGUF_ACCELERATOR_DTYPE}))
            yield plain, _base(plain, path.stem)
    elif path.is_dir():
        yield path, _base(path, path.resolve().name)
    elif not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"[convert] {source} is neither a model directory, nor a GGUF file, nor a hub id.")
    else:
        path = find_directory(source, revision=revision, allow_patterns=list(_HUB_FILES))
        yield path, dataclasses.replace(_base(path, source), name=source, hub_id=source)


def _base(directory: Path, name: str) -> Base:
    stated = card_field(directory, "base_model")
    return Base(stated or name, hub_id=stated, license=card_field(directory, "license"))


def _base_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for `config`, made to leave routers in the weights aside."""
    stock, args = _get_classes(config)

    def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = without_routers(weights)
        return stock.sanitize(self, weights) if hasattr(stock, "sanitize") else weights

    return type(stock.__name__, (stock,), {"__module__": stock.__module__, "sanitize": sanitize}), args


def load_base(directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the base model of a directory, lazily, routers left aside.

    Returns:
        (model, config without what Flux adds).

    Raises:
        FileNotFoundError: No config.json or no weights.
        ValueError: Unknown architecture, foreign model code, damaged weights or ones that do not fit the config.
    """
    config = read_config(directory)
    foreign = config.get("model_file")
    if foreign is not None and not is_flux_config(config):
        raise ValueError(f"[load_base] {directory} brings its own model code, {foreign!r}; flux_mlx cannot route it.")
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"[load_base] {directory} has no weights: expected model*.safetensors.")
    for file in files:
        check_safetensors(file)
    try:
        model, config = load_model(
            directory, lazy=True, model_config={"model_file": None}, get_model_classes=_base_classes
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"[load_base] {directory} ({config['model_type']}): {error}") from error
    return model, base_config({key: value for key, value in config.items() if key not in ("flux", "model_file")})


def cast(model: nn.Module, dtype: str) -> None:
    """Cast the floating-point parameters of a base model in place, but for those that its family keeps."""
    may_cast = getattr(model, "cast_predicate", lambda _: True)
    target = getattr(mx, dtype)

    def one(name: str, value: mx.array) -> mx.array:
        return value.astype(target) if may_cast(name) and mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(one, model.parameters()))


def quantize(model: nn.Module, config: dict[str, Any], how: Quantization) -> tuple[nn.Module, dict[str, Any]]:
    """Quantise a base model as `mlx_lm.convert -q` does.

    Raises:
        ValueError: It is quantised already, or mlx refuses the sizes.
    """
    if "quantization" in config:
        raise ValueError("[quantize] the source is quantised already; add --dequantize first or leave -q out.")
    if how.recipe and how.mode != "affine":
        raise ValueError(f"[quantize] --quant-predicate goes with --q-mode affine, got {how.mode!r}.")
    recipe = mixed_quant_predicate_builder(how.recipe, model, how.group_size or 64) if how.recipe else None
    before = _quantized_modules(model)
    made, made_config = quantize_model(model, config, how.group_size, how.bits, mode=how.mode, quant_predicate=recipe)
    if _quantized_modules(made) == before:
        raise ValueError(
            f"[quantize] no weight can be quantised in groups of {made_config['quantization']['group_size']}: expected "
            "a size that divides the width of the layers."
        )
    return made, made_config


def _quantized_modules(model: nn.Module) -> int:
    return sum(hasattr(module, "scales") for _, module in model.named_modules())


def set_projections(model: nn.Module, projections: Mapping[str, mx.array]) -> None:
    """Replace q, k and v projections by those that a published checkpoint changed.

    Raises:
        ValueError: The model has no such tensor (it is quantised, say), or another shape.
    """
    shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
    for name, value in projections.items():
        if shapes.get(name) != value.shape or name.removesuffix("weight") + "scales" in shapes:
            raise ValueError(
                f"[set_projections] the routers come with {name} of shape {list(value.shape)}; "
                f"the base must have it unquantised in that shape, got {shapes.get(name)}."
            )
    model.load_weights(list(projections.items()), strict=False)
