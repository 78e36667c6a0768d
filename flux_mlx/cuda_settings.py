"""What long processes on MLX's CUDA backend need of their environment: one call at the start of every command."""

from __future__ import annotations

import os

CUDA_SETTINGS = {"MLX_CUDA_SDPA_CACHE_SIZE": "4096", "MLX_CUDA_GRAPH_CACHE_SIZE": "2000"}
"""MLX's CUDA backend keeps a plan for each shape of attention and a graph for each sequence of kernels, 256 and 400 by
default, and ends a process that needs twice as many: many lengths in one process do."""


def prepare_cuda() -> None:
    """Put `CUDA_SETTINGS` into the environment, but for what the user set. Call it before MLX computes anything."""
    for name, value in CUDA_SETTINGS.items():
        os.environ.setdefault(name, value)
