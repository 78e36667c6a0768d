"""The Metal kernels in the backend table: on the host shim, or on a Metal device where there is one."""

from __future__ import annotations

import shutil

import mlx.core as mx
import numpy as np

from flux_mlx import kernels, spec, xattention
from flux_mlx.spec import PatternConfig
from metal_kernels import launches
from metal_kernels.catalog import HEAD_DIMS
from metal_kernels.operations import Run
from parity_tests.backends import Arrays, Backend, BlockChoice, Router
from parity_tests.host_shim.run import HostRun
from parity_tests.strategies import Case


def _to(x: np.ndarray, dtype: str) -> mx.array:
    return mx.array(np.ascontiguousarray(x)).astype(getattr(mx, dtype))


def _back(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def _missing() -> str:
    return "" if kernels.is_available() or shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"


def _router(run: Run) -> Router:
    def pool(queries: np.ndarray, dtype: str, pool_tokens: int) -> np.ndarray:
        _, tokens, heads, _ = queries.shape
        launch = launches.router_pool(queries.shape, dtype, pool_tokens)
        (sums,) = run(launch, [_to(queries, dtype), pool_tokens])
        return _back(sums).sum(1) / np.float32(2 * min(pool_tokens, tokens) * heads)

    def logits(weights: dict[str, np.ndarray], pooled: np.ndarray) -> np.ndarray:
        arrays = {name: mx.array(w) for name, w in weights.items()}
        return _back(kernels.route_layer(mx.array(pooled)[:, None, None, :], arrays, 1, run=run)[0])

    return Router(pool, logits, spec.decide)


def _blocks(run: Run) -> BlockChoice:
    def mass(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
        return _back(kernels.block_mass(_to(q, dtype), _to(k, dtype), pattern, run=run))

    def choose(values: np.ndarray, first: int, pattern: PatternConfig) -> np.ndarray:
        return np.array(xattention.choose_blocks(mx.array(values), first, pattern.threshold, pattern.top_k_blocks))

    def select(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
        return choose(mass(q, k, dtype, pattern), (k.shape[2] - q.shape[2]) // pattern.block_size, pattern)

    return BlockChoice(mass, choose, select)


def metal_backend(run: Run | None = None, name: str = "metal") -> Backend:
    """impl="metal" as a backend record.

    Args:
        run: Launcher; by default the Metal device, or the host shim where there is none.
        name: Name of the record.
    """
    launcher = run or (kernels.metal_run if kernels.is_available() else HostRun())

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = (_to(x, case.dtype) for x in qkv)
        if case.pattern is None:
            out, lse = kernels.full_attention(q, k, v, scale=case.scale, run=launcher)
        else:
            out, lse = kernels.sparse_attention(
                q, k, v, case.pattern, prompt_tokens=case.prompt_tokens, scale=case.scale, run=launcher
            )
        return _back(out), _back(lse)

    return Backend(
        name,
        attend,
        _missing,
        router=_router(launcher),
        blocks=_blocks(launcher),
        head_dims=HEAD_DIMS[:4],
        block_sizes=(1, 4, 16, 32),
        supports=lambda case: case.head_dim in HEAD_DIMS,
        share=0.2 if isinstance(launcher, HostRun) else 1.0,
    )
