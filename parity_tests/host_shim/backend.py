"""The Metal kernels in the backend table: on a Metal device, or on the host shim where there is none.

MLX is imported when a backend is used, not before.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import numpy as np

from flux_mlx import spec
from flux_mlx.spec import PatternConfig
from metal_kernels import launches
from metal_kernels.catalog import HEAD_DIMS
from metal_kernels.operations import Run
from parity_tests.backends import Arrays, Backend, BlockChoice, Router, needs
from parity_tests.strategies import Case


def default_launcher() -> Run:
    """The Metal device's launcher, or the host shim's."""
    from flux_mlx import kernels
    from parity_tests.host_shim.run import HostRun

    return kernels.metal_run if kernels.is_available() else HostRun()


def _to(x: np.ndarray, dtype: str) -> Any:
    import mlx.core as mx

    return mx.array(np.ascontiguousarray(x)).astype(getattr(mx, dtype))


def _back(x: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(x.astype(mx.float32))


def _missing() -> str:
    compiler = sys.platform == "darwin" or shutil.which("g++") or shutil.which("clang++")
    return needs("mlx.core")() or ("" if compiler else "no C++ compiler")


def _router(run: Run | None) -> Router:
    def pool(queries: np.ndarray, dtype: str, pool_tokens: int) -> np.ndarray:
        _, tokens, heads, _ = queries.shape
        launch = launches.router_pool(queries.shape, dtype, pool_tokens)
        (sums,) = (run or default_launcher())(launch, [_to(queries, dtype), pool_tokens])
        return _back(sums).sum(1) / np.float32(2 * min(pool_tokens, tokens) * heads)

    def logits(weights: dict[str, np.ndarray], pooled: np.ndarray) -> np.ndarray:
        from flux_mlx import kernels

        arrays = {name: _to(w, "float32") for name, w in weights.items()}
        queries = _to(pooled[:, None, None, :], "float32")
        return _back(kernels.route_layer(queries, arrays, 1, run=run or default_launcher())[0])

    return Router(pool, logits, spec.decide)


def _blocks(run: Run | None) -> BlockChoice:
    def mass(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
        from flux_mlx import kernels

        return _back(kernels.block_mass(_to(q, dtype), _to(k, dtype), pattern, run=run or default_launcher()))

    def choose(values: np.ndarray, first: int, pattern: PatternConfig) -> np.ndarray:
        from flux_mlx import xattention

        chosen = xattention.choose_blocks(_to(values, "float32"), first, pattern.threshold, pattern.top_k_blocks)
        return np.array(chosen)

    def select(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
        return choose(mass(q, k, dtype, pattern), (k.shape[2] - q.shape[2]) // pattern.block_size, pattern)

    return BlockChoice(mass, choose, select)


def metal_backend(run: Run | None = None) -> Backend:
    """impl="metal" as a backend record.

    Args:
        run: Launcher; by default `default_launcher()`.
    """

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        from flux_mlx import kernels

        q, k, v = (_to(x, case.dtype) for x in qkv)
        options = {"scale": case.scale, "run": run or default_launcher()}
        if case.pattern is None:
            out, lse = kernels.full_attention(q, k, v, **options)
        else:
            out, lse = kernels.sparse_attention(q, k, v, case.pattern, prompt_tokens=case.prompt_tokens, **options)
        return _back(out), _back(lse)

    return Backend(
        "metal",
        attend,
        _missing,
        router=_router(run),
        blocks=_blocks(run),
        head_dims=HEAD_DIMS[:4],
        supports=lambda case: case.head_dim in HEAD_DIMS,
        share=1.0 if sys.platform == "darwin" else 0.2,
    )
