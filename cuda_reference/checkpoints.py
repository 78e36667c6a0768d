"""Files of a training run: checkpoints that a kill at any moment cannot spoil, and the routers file that is shipped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cuda_reference.data_text import digest
from cuda_reference.recipe import Recipe
from flux_mlx.spec import FluxConfig
from flux_mlx.spec.config import ROUTER_INFIX, SETTINGS_KEY

_STEP = re.compile(r"step_(\d+)\.pt")
FIRST_VALUES = 64  # of each weight, which the fingerprint of a model reads
KEPT = 2  # checkpoints that stay; the older of them serves if the newer cannot be read


def _replace(path: Path, write: Any) -> None:
    """Write a sibling with `write(part)`, flush it to the disk, then rename it to `path`."""
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(steps done, file) of the checkpoints in `folder`, newest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*.pt") if (m := _STEP.fullmatch(p.name))]
    return sorted(found, reverse=True)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write `step_N.pt`, whole or not at all, and remove checkpoints older than the last `KEPT`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step}.pt"
    _replace(path, lambda part: torch.save(dict(state), part))
    for _, old in checkpoints(folder)[KEPT:]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest readable checkpoint of `folder`: (steps done, state), or None if there is none.

    Raises:
        ValueError: There are checkpoints, but none can be read.
    """
    found, reasons = checkpoints(folder), []
    for step, path in found:
        try:
            return step, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle or archive raises many kinds
            reasons.append(f"{path.name}: {error}")
    if reasons:
        raise ValueError(f"[checkpoints] no checkpoint in {folder} can be read: {reasons}")
    return None


def model_fingerprint(model: nn.Module) -> str:
    """A short hash that tells backbones apart: of names and shapes of the frozen weights and the first values of each.

    Rounded to bfloat16, so that it is the same on a CPU and on CUDA.
    """
    frozen = [(name, p) for name, p in model.named_parameters() if ROUTER_INFIX not in name]
    shapes = json.dumps([(name, list(p.shape)) for name, p in frozen])
    values = torch.cat([p.detach().flatten()[:FIRST_VALUES].to(torch.bfloat16) for _, p in frozen])
    return digest(shapes.encode(), values.cpu().view(torch.int16).numpy())


def flux_config(recipe: Recipe) -> FluxConfig:
    """The `flux` section that belongs to routers of `recipe`."""
    return FluxConfig(pattern=recipe.pattern, router=recipe.router)


def save_routers(path: Path, routers: Mapping[str, torch.Tensor], recipe: Recipe, dtype: torch.dtype) -> None:
    """Write a routers file, as `flux_mlx.convert --routers` takes it; its metadata hold the flux section.

    Args:
        path: Ends in .safetensors; replaced if it exists.
        routers: Name in a Flux model directory to parameter.
        recipe: What they were trained with.
        dtype: Of the file: float32 or float16.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in sorted(routers.items())}
    metadata = {SETTINGS_KEY: json.dumps(flux_config(recipe).to_dict()), "recipe": json.dumps(recipe.to_dict())}
    _replace(path, lambda part: save_file(tensors, part, metadata=metadata))


def load_routers(path: Path, routers: Mapping[str, torch.Tensor]) -> None:
    """Copy a routers file into `routers`, in place.

    Raises:
        ValueError: Damaged, other names, other shapes, or values that are not finite.
    """
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"[checkpoints] {path} is no whole safetensors file: {error}") from None
    if found.keys() != routers.keys():
        missing, extra = sorted(routers.keys() - found.keys()), sorted(found.keys() - routers.keys())
        raise ValueError(f"[checkpoints] {path}: routers missing {missing[:4]}, unknown {extra[:4]}.")
    for name, value in found.items():
        if value.shape != routers[name].shape or not value.isfinite().all():
            raise ValueError(
                f"[checkpoints] {path}: {name} must be finite and of shape {tuple(routers[name].shape)}, "
                f"got {tuple(value.shape)}."
            )
    with torch.no_grad():
        for name, value in found.items():
            routers[name].copy_(value)
