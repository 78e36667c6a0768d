"""Torch, Triton and MLX in the backend table.

Both packages use the same module, function and argument names, so one adapter serves both: it differs in how an array
goes in and comes out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from flux_mlx.spec import PatternConfig, Route, RouterConfig
from parity_tests.backends import NUMPY, Arrays, Backend, BlockChoice, Router, needs
from parity_tests.strategies import Case


@dataclass(frozen=True)
class Framework:
    """How to reach one package. Nothing is imported before it is used.

    Args:
        package: Where `attention`, `router` and `xattention` are.
        to: numpy and a dtype's name to a tensor.
        back: Tensor to numpy, floats as float32.
        load: Fill a `LayerRouter` with weights by name.
    """

    package: str
    to: Callable[[np.ndarray, str], Any]
    back: Callable[[Any], np.ndarray]
    load: Callable[[Any, dict[str, np.ndarray]], None]

    def module(self, name: str) -> ModuleType:
        """One module of the package."""
        return importlib.import_module(f"{self.package}.{name}")

    def attend(self, qkv: Arrays, case: Case, **options: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """`Backend.attend`; `options` go to the package's functions."""
        attention = self.module("attention")
        tensors = [self.to(x, case.dtype) for x in qkv]
        if case.pattern is None:
            result = attention.full_attention(*tensors, scale=case.scale, **options)
        else:
            options |= {"prompt_tokens": case.prompt_tokens, "scale": case.scale}
            result = attention.sparse_attention(*tensors, case.pattern, **options)
        out, lse = result if isinstance(result, tuple) else (result, None)
        return self.back(out), None if lse is None else self.back(lse)

    def router(self) -> Router:
        """The steps of the package's `router` module."""

        def pool(queries: np.ndarray, dtype: str, pool_tokens: int) -> np.ndarray:
            return self.back(self.module("router").pool_queries(self.to(queries, dtype), pool_tokens))

        def logits(weights: dict[str, np.ndarray], pooled: np.ndarray) -> np.ndarray:
            layer = self.module("router").LayerRouter(pooled.shape[1], RouterConfig())
            self.load(layer, weights)
            return self.back(layer(self.to(pooled, "float32")))

        def decide(values: np.ndarray) -> list[Route]:
            return self.module("router").decide(self.to(values, "float32"))

        return Router(pool, logits, decide)

    def blocks(self, name: str = "xattention") -> BlockChoice:
        """The steps of the package's module `name`."""

        def mass(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
            tensors = self.to(q, dtype), self.to(k, dtype)
            return self.back(self.module(name).block_mass(*tensors, pattern.block_size, pattern.stride))

        def choose(values: np.ndarray, first: int, pattern: PatternConfig) -> np.ndarray:
            settings = first, pattern.threshold, pattern.top_k_blocks
            return self.back(self.module(name).choose_blocks(self.to(values, "float32"), *settings))

        def select(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
            return self.back(self.module(name).select_blocks(self.to(q, dtype), self.to(k, dtype), pattern))

        return BlockChoice(mass, choose, select)


def torch_framework(device: str) -> Framework:
    """`cuda_reference` on "cpu" or "cuda"."""

    def to(x: np.ndarray, dtype: str) -> Any:
        import torch

        return torch.from_numpy(np.array(x)).to(device, getattr(torch, dtype))

    def back(x: Any) -> np.ndarray:
        x = x.detach().cpu()
        return (x.float() if x.is_floating_point() else x).numpy()

    def load(layer: Any, weights: dict[str, np.ndarray]) -> None:
        layer.load_state_dict({name: to(w, "float32") for name, w in weights.items()})
        layer.to(device)

    return Framework("cuda_reference", to, back, load)


def mlx_framework() -> Framework:
    """`flux_mlx` on MLX's default device."""

    def to(x: np.ndarray, dtype: str) -> Any:
        import mlx.core as mx

        return mx.array(x).astype(getattr(mx, dtype))

    def back(x: Any) -> np.ndarray:
        import mlx.core as mx

        return np.array(x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)

    def load(layer: Any, weights: dict[str, np.ndarray]) -> None:
        layer.load_weights([(name, to(w, "float32")) for name, w in weights.items()])

    return Framework("flux_mlx", to, back, load)


@contextlib.contextmanager
def torch_nan_fill() -> Iterator[None]:
    """Torch's deterministic mode fills what `torch.empty` returns with NaN."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _torch_missing(device: str) -> str:
    reason = needs("torch")()
    if not reason and device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        reason = "there is no CUDA device"
    return reason


def torch_backend(device: str) -> Backend:
    """Torch eager."""
    torch = torch_framework(device)

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray | None]:
        return torch.attend(qkv, case, impl="eager", return_lse=True)

    def pool_rows(queries: np.ndarray, dtype: str, pool_tokens: int, lengths: list[int]) -> np.ndarray:
        return torch.back(torch.module("router").pool_queries(torch.to(queries, dtype), pool_tokens, lengths))

    router = replace(torch.router(), pool_rows=pool_rows)
    missing = functools.partial(_torch_missing, device)
    return Backend("torch", attend, missing, router, torch.blocks(), nan_fill=torch_nan_fill)


def triton_backend(device: str) -> Backend:
    """The Triton kernels: compiled on a GPU, interpreted on a CPU (slow, so few examples)."""
    torch, interpreted = torch_framework(device), device == "cpu"

    def to(x: np.ndarray, dtype: str) -> Any:  # the interpreter has no bfloat16; the values are rounded already
        return torch.to(x, "float32" if interpreted and dtype == "bfloat16" else dtype)

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray | None]:
        return torch.attend(qkv, case, impl="triton", return_lse=True)

    def missing() -> str:
        if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
            return "on a CPU Triton needs TRITON_INTERPRET=1"
        return needs("triton")() or _torch_missing(device)

    return Backend(
        "triton",
        attend,
        missing,
        blocks=replace(torch, to=to).blocks("triton_xattention"),
        head_dims=(64, 80, 96, 128),
        block_sizes=(1, 16, 32),
        strides=(2, 4, 8),
        share=0.02 if interpreted else 1.0,
        nan_fill=torch_nan_fill,
    )


def mlx_backend() -> Backend:
    """MLX operations."""
    mlx = mlx_framework()

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray | None]:
        return mlx.attend(qkv, case, impl="ops")

    return Backend("mlx", attend, needs("mlx.core"), mlx.router(), mlx.blocks(), rounds_scores=True, same_bits=False)


def metal_backend() -> Backend:
    """The Metal kernels on the host shim, or on a Metal device. They are launched through MLX."""
    reason = needs("mlx.core")()
    if reason:
        return replace(NUMPY, name="metal", missing=lambda: reason)
    return importlib.import_module("parity_tests.host_shim.backend").metal_backend()


@functools.cache
def backend_table(device: str) -> dict[str, Backend]:
    """Every backend of the suite by name, for tensors on "cpu" or "cuda"."""
    table = [NUMPY, torch_backend(device), triton_backend(device)]
    if device == "cpu":
        table += [mlx_backend(), metal_backend()]
    return {backend.name: backend for backend in table}
