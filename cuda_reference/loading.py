"""Load a Flux model directory, the one that MLX loads, into a transformers model: config.json and model*.safetensors.

No code of the directory is run. Weights that MLX quantised (affine) are dequantised on the way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from cuda_reference.model import attach, routers
from flux_mlx.spec import FluxConfig
from flux_mlx.spec.config import ROUTER_INFIX, SETTINGS_KEY

Weights = dict[str, torch.Tensor]

MLX_KEYS = (
    SETTINGS_KEY,
    "model_file",
    "quantization",
    "quantization_config",
)  # of config.json, not transformers' business
DEQUANTISE_ROWS = 4096  # rows whose unpacked integers exist at one time


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, FluxConfig]:
    """Load a Flux model directory.

    Args:
        path: Local directory with config.json and model*.safetensors.
        dtype: dtype of the backbone; None keeps that of the weights. Routers are float32.
        device: Where the model goes.

    Returns:
        (attached model in eval mode, its settings).

    Raises:
        FileNotFoundError: No such directory, config or weights.
        ValueError: Not a Flux directory, damaged weights, weights that do not fit, or a quantisation other than affine.
    """
    directory = Path(path)
    config = read_config(directory)
    flux = FluxConfig.from_dict(config[SETTINGS_KEY])
    weights = dequantise_all(read_weights(directory), config.get("quantization"))
    backbone = {name: value for name, value in weights.items() if ROUTER_INFIX not in name}
    if dtype is None:
        dtype = next(iter(backbone.values())).dtype
    model = attach(_build(config, backbone, dtype, directory), flux)
    _load_routers(model, {name: value for name, value in weights.items() if ROUTER_INFIX in name}, directory)
    return model.to(device).eval(), flux


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Flux model directory. Raises as `load`."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"[load] expected a Flux model directory, but there is no {path}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[load] {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or SETTINGS_KEY not in config or "model_type" not in config:
        raise ValueError(f"[load] {path}: expected an object with model_type and a flux section.")
    return config


def read_weights(directory: Path) -> Weights:
    """All tensors of `model*.safetensors`. Raises as `load`."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"[load] there is no model*.safetensors in {directory}.")
    weights: Weights = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"[load] {file} is not a whole safetensors file: {error}") from error
    return weights


def dequantise_all(weights: Weights, settings: dict[str, Any] | None) -> Weights:
    """Replace each (weight, scales, biases) by one weight of the scales' dtype.

    Args:
        weights: Tensors by name; a module is quantised if it has `.scales`.
        settings: `quantization` of config.json: group_size, bits, mode, and entries by module path that override them.
    """
    result = {name: value for name, value in weights.items() if not name.endswith((".scales", ".biases"))}
    for name in weights:
        if not name.endswith(".scales"):
            continue
        path = name.removesuffix(".scales")
        own = (settings or {}).get(path)
        choice = {**(settings or {}), **(own if isinstance(own, dict) else {})}
        mode = choice.get("mode", "affine") if f"{path}.biases" in weights else "one without biases"
        if mode != "affine":
            raise ValueError(f"[load] {path}: expected MLX's affine quantisation, got {mode!r}.")
        parts = weights[f"{path}.weight"], weights[name], weights[f"{path}.biases"]
        try:
            result[f"{path}.weight"] = dequantise(*parts, choice["group_size"], choice["bits"])
        except KeyError as error:
            raise ValueError(f"[load] {path} is quantised, but config.json does not say its {error}.") from None
    return result


def dequantise(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, group_size: int, bits: int
) -> torch.Tensor:
    """MLX's affine form: weight = scale * integer + bias, one scale and bias for `group_size` columns.

    Args:
        packed: uint32 `[rows, columns * bits / 32]`: a row is one little-endian string of `bits`-bit integers.
        scales: float `[rows, columns / group_size]`.
        biases: float, the shape of scales.
        group_size: Columns of a group.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        `[rows, columns]` of the scales' dtype; the product and the sum are float32.

    Raises:
        ValueError: Shapes or bits do not fit together.
    """
    columns = scales.shape[-1] * group_size
    if bits not in (2, 3, 4, 5, 6, 8) or packed.dtype != torch.uint32 or packed.shape[-1] * 32 != columns * bits:
        raise ValueError(
            f"[dequantise] expected uint32 [rows, {columns * bits / 32:g}] for {columns} columns of {bits} bits, got "
            f"{packed.dtype} {tuple(packed.shape)}."
        )
    first_bit = torch.arange(columns) * bits
    byte, shift = first_bit // 8, (first_bit % 8).to(torch.int32)
    out = []
    for rows in zip(*(x.flatten(0, -2).split(DEQUANTISE_ROWS) for x in (packed, scales, biases)), strict=True):
        octets = torch.nn.functional.pad(rows[0].contiguous().view(torch.uint8), (0, 1)).to(torch.int32)
        integers = (octets[:, byte] | octets[:, byte + 1] << 8) >> shift & (1 << bits) - 1
        scale, bias = (x.float().repeat_interleave(group_size, dim=1) for x in rows[1:])
        out.append((scale * integers + bias).to(scales.dtype))
    return torch.cat(out).unflatten(0, packed.shape[:-1])


def _build(config: dict[str, Any], weights: Weights, dtype: torch.dtype, directory: Path) -> PreTrainedModel:
    """The transformers model of `config` with `weights`; every parameter must be given, and no other."""
    settings = {key: value for key, value in config.items() if key not in MLX_KEYS}
    try:
        hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    except (KeyError, ValueError) as error:
        raise ValueError(f"[load] {directory}: transformers has no causal LM of this model_type: {error}") from error
    model, info = model_class.from_pretrained(
        None, config=hf_config, state_dict=weights, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise ValueError(f"[load] {directory}: weights do not fit {model_class.__name__}: {problems}")
    return model


def _load_routers(model: PreTrainedModel, weights: Weights, directory: Path) -> None:
    """Fill the routers of `model`; every router must be given whole and finite, and no other."""
    expected, given = {}, {name: tuple(value.shape) for name, value in weights.items()}
    for layer, router in routers(model).items():
        prefix = f"{model.base_model_prefix}.layers.{layer}{ROUTER_INFIX}"
        expected |= {prefix + name: tuple(value.shape) for name, value in router.named_parameters()}
    wrong = [name for name in sorted(expected | given) if expected.get(name) != given.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"[load] {directory}: {len(wrong)} router tensors do not fit the model; expected {name} of shape "
            f"{expected.get(name, 'none')}, got {given.get(name, 'none')}."
        )
    broken = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if broken:
        raise ValueError(f"[load] {directory}: {broken[0]} has values that are not finite.")
    model.load_state_dict(weights, strict=False)
