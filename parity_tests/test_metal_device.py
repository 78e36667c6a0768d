"""The Metal kernels on a real device; skipped where there is none (the workflow counts what ran)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from flux_mlx import doctor, kernel_policy, kernels
from metal_kernels.catalog import KERNELS
from parity_tests.host_shim.backend import metal_backend
from parity_tests.properties import within_budget
from parity_tests.test_metal_grid import COARSE, GRID, kernels_that_run
from parity_tests.token_by_token import ON_DEVICES, by_steps_and_by_own_calls

if not kernels.is_available():
    pytest.skip("no Metal device", allow_module_level=True)


@pytest.mark.parametrize("name", GRID)
def test_attention(name):
    within_budget(metal_backend(kernels.metal_run), GRID[name])


@pytest.mark.parametrize("variant", doctor.all_variants(), ids=str)
def test_self_test(variant):
    assert kernel_policy.self_test(variant) == ""


def test_every_kernel_of_the_catalog_runs_on_the_device():
    assert kernels_that_run(kernels.metal_run) == set(KERNELS)


def test_a_sliced_cache_is_read_in_place():
    keys, values = (mx.random.normal((1, 2, 512, 64)) for _ in range(2))
    q = mx.random.normal((1, 4, 1, 64))
    sliced = kernels.sparse_attention(q, keys[..., :300, :], values[..., :300, :], COARSE)[0]
    whole = kernels.sparse_attention(q, keys, values, COARSE, kv_tokens=300)[0]
    np.testing.assert_array_equal(np.array(sliced), np.array(whole))


def test_sixty_four_thousand_tokens_agree_with_stock():
    q, k, v = (mx.random.normal((1, heads, 65536, 64)).astype(mx.float16) for heads in (2, 1, 1))
    out = kernels.full_attention(q, k, v)[0]
    stock = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal")
    assert mx.abs(out - stock).max().item() < 5e-3


@pytest.mark.parametrize("case", ON_DEVICES, ids=str)
def test_tokens_by_compiled_steps(monkeypatch, case):
    by_steps, by_own_calls = by_steps_and_by_own_calls(monkeypatch, *case)
    allowed = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}[case[1]]  # of the largest logit
    assert np.abs(by_steps - by_own_calls).max() <= allowed * np.abs(by_own_calls).max()
