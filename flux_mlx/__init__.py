"""Flux Attention on MLX: a layer router sends each layer of a frozen LLM to full or to sparse attention.

    model, tokenizer = flux_mlx.load("path/to/flux-model")      # or flux_mlx.apply(model, flux_mlx.FluxConfig())
    cache = model.make_cache()
    last = flux_mlx.prefill(model, mx.array(tokenizer.encode(text)), cache)
    print(flux_mlx.routes(cache))

Importing the package imports neither MLX nor Torch; the names below load what they need at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "FluxConfig": "flux_mlx.spec",
    "PatternConfig": "flux_mlx.spec",
    "Route": "flux_mlx.spec",
    "RouterConfig": "flux_mlx.spec",
    "apply": "flux_mlx.models",
    "describe_routes": "flux_mlx.cache",
    "load": "flux_mlx.loading",
    "prefill": "flux_mlx.exact_prefill",
    "routes": "flux_mlx.cache",
    "set_kv_policy": "flux_mlx.models",
    "set_route": "flux_mlx.models",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flux_mlx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
