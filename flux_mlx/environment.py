"""Variables of the environment that the package reads: what each does, and how its value is read."""

from __future__ import annotations

import os
from functools import cache

from flux_mlx.spec import parse_route
from flux_mlx.spec.config import RoutePolicy

VARIABLES = {
    "FLUX_MLX_ROUTE": "route of every Flux model that is loaded, instead of its config's: auto, full, sparse, or the "
    "full layers as in 0,2,6-8",
    "FLUX_MLX_SHOW_ROUTES": "1: routes are printed to stderr as they are taken",
    "FLUX_MLX_TRAIN_ROUTERS": "1: mlx-lm's trainers train the routers too",
    "FLUX_MLX_KERNELS": "on (default): our kernels compute where they passed their self-test; off: MLX operations do",
    "FLUX_MLX_CALIBRATION": "file that flux_mlx.doctor --calibrate writes and every command reads (default: "
    "~/.cache/flux_mlx/calibration.json)",
}
"""Name to help."""


def forced_route() -> RoutePolicy | None:
    """What FLUX_MLX_ROUTE says, as `parse_route` reads it; None if it is not set.

    Raises:
        ValueError: It says something else.
    """
    text = os.environ.get("FLUX_MLX_ROUTE")
    return parse_route(text, "FLUX_MLX_ROUTE") if text else None


@cache
def kernels_are_on() -> bool:
    """What FLUX_MLX_KERNELS says, read once in a process.

    Raises:
        ValueError: It says neither on nor off.
    """
    text = os.environ.get("FLUX_MLX_KERNELS") or "on"
    if text not in ("on", "off"):
        raise ValueError(f"[FLUX_MLX_KERNELS] expected on or off, got {text!r}.")
    return text == "on"


def switched_on(name: str) -> bool:
    """Whether a variable is set, and not to 0."""
    return os.environ.get(name, "") not in ("", "0")


def check_environment() -> None:
    """Refuse bad values before a model is loaded, for which they are no fault of the model's.

    Raises:
        ValueError: FLUX_MLX_ROUTE or FLUX_MLX_KERNELS has one; the message names it.
    """
    forced_route()
    kernels_are_on()
