"""Random arrays and comparisons that the tests of the CUDA kernels share."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from flux_mlx.cuda_catalog import Device
from flux_mlx.kernel_self_test import TOLERANCE
from flux_mlx.spec import PatternConfig

AMPERE, H100 = Device(8, 0, 12, 1 << 20), Device(9, 0, 132, 50 << 20)
DECODE_PATTERN = PatternConfig(block_size=16, sink_tokens=16, window_tokens=48)
PREFILL_PATTERN = PatternConfig(block_size=64, sink_tokens=64, window_tokens=128)


def draw(*shape: int, dtype: str = "float16", seed: int = 0) -> mx.array:
    """Normal, evaluated by NumPy."""
    return mx.array(np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)).astype(getattr(mx, dtype))


def as_float64(x: mx.array) -> np.ndarray:
    """The same numbers."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def check(results: Iterable[mx.array], expected: Iterable[np.ndarray], dtype: str) -> None:
    """Fail where a result is further off than the self-test of `dtype` allows."""
    for got, want in zip(results, expected, strict=True):
        error = np.abs(as_float64(got) - want).max()
        assert error <= TOLERANCE[dtype], error
