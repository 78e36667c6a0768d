"""The CUDA kernels inside MLX on a real device; skipped where there is none."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from flux_mlx import attention, cuda_kernels, doctor, kernel_self_test
from flux_mlx.spec import PatternConfig, Route

if not cuda_kernels.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PATTERN = PatternConfig(block_size=128, sink_tokens=128, window_tokens=256)


def draw(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.random.normal(shape, dtype)


@pytest.mark.parametrize("variant", doctor.all_variants(), ids=str)
def test_self_test(variant):
    assert kernel_self_test.self_test(variant) == ""


@pytest.mark.parametrize("q_tokens", [1, 8, 200])
def test_a_sliced_cache_and_its_buffer_give_the_same_bits(q_tokens):
    q, keys, values = draw(2, 8, q_tokens, 128), draw(2, 2, 1024, 128), draw(2, 2, 1024, 128)
    sliced = cuda_kernels.sparse_attention(q, keys[:, :, :900], values[:, :, :900], PATTERN)[0]
    whole = cuda_kernels.sparse_attention(q, keys, values, PATTERN, kv_tokens=900)[0]
    assert mx.array_equal(sliced, whole).item()


@pytest.mark.parametrize("q_tokens", [1, 200])
def test_routes_of_the_device_and_of_the_host_give_the_same_bits(q_tokens):
    q, k, v = draw(2, 8, q_tokens, 128), draw(2, 2, 900, 128), draw(2, 2, 900, 128)
    codes = (int(Route.SPARSE), int(Route.FULL))
    by_host = cuda_kernels.routed_attention(q, k, v, codes, PATTERN)
    by_device = cuda_kernels.routed_attention(q, k, v, mx.array(codes, mx.int32), PATTERN)
    assert all(mx.array_equal(a, b).item() for a, b in zip(by_host, by_device, strict=True))


def test_sixty_four_thousand_tokens_agree_with_stock():
    q, k, v = (draw(1, heads, 65536, 128) for heads in (4, 1, 1))
    out = attention.full_attention(q, k, v, impl="cuda")
    stock = attention.full_attention(q, k, v, impl="ops")
    assert mx.abs(out - stock).max().item() < kernel_self_test.TOLERANCE["bfloat16"]


def test_gradients_are_those_of_operations():
    q, k, v = (draw(1, heads, 700, 64, dtype=mx.float16) for heads in (2, 1, 1))

    def gradient(impl: str) -> np.ndarray:
        loss = mx.grad(lambda x: attention.sparse_attention(x, k, v, PATTERN, impl=impl).astype(mx.float32).sum())
        return np.array(loss(q).astype(mx.float32))

    np.testing.assert_array_equal(gradient("cuda"), gradient("ops"))
