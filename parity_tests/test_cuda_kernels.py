"""The CUDA kernels without a GPU: portable prefill interpreted by Triton, launches, self-tests and policy."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from flux_mlx import attention, cuda_catalog, cuda_kernels, doctor, kernel_policy, kernel_self_test, spec
from flux_mlx.cuda_catalog import Device
from flux_mlx.kernel_self_test import Variant
from flux_mlx.spec import PatternConfig, Route
from parity_tests.cuda_cases import AMPERE, DECODE_PATTERN, H100, PREFILL_PATTERN, as_float64, check, draw
from parity_tests.host_shim.cuda_source import HostCuda

needs_no_device = pytest.mark.skipif(cuda_kernels.is_available(), reason="this machine has a CUDA device")


@pytest.fixture(autouse=True)
def _ampere(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "device", lambda: AMPERE)


@pytest.mark.parametrize(("L", "S", "D", "dtype"), [(70, 300, 64, "float16"), (131, 131, 128, "bfloat16")])
def test_prefill_reads_a_cache_buffer(L, S, D, dtype):
    """The buffer is longer than the keys in use; NaN lies behind them."""
    q, k, v = draw(2, 4, L, D, dtype=dtype), draw(2, 2, S, D, dtype=dtype), draw(2, 2, S, D, dtype=dtype, seed=1)
    behind = mx.full((2, 2, 21, D), float("nan"), k.dtype)
    buffers = [mx.concatenate([x, behind], axis=2) for x in (k, v)]
    results = cuda_kernels.sparse_attention(q, *buffers, PREFILL_PATTERN, kv_tokens=S, run=HostCuda())
    check(results, spec.sparse_attention(*(as_float64(x) for x in (q, k, v)), PREFILL_PATTERN), dtype)


@pytest.mark.parametrize("L", [2, 90])
def test_routes_are_read_on_the_device(L):
    q, k, v = draw(3, 2, L, 64), draw(3, 1, 400, 64), draw(3, 1, 400, 64, seed=1)
    route = mx.array([Route.SPARSE, Route.FULL, Route.UNSET], mx.int32)
    out, lse = cuda_kernels.routed_attention(q, k, v, route, PREFILL_PATTERN, run=HostCuda())
    arrays = [as_float64(x) for x in (q, k, v)]
    sparse, full = spec.sparse_attention(*arrays, PREFILL_PATTERN), spec.full_attention(*arrays)
    for row, expected in enumerate((sparse, full, full)):
        check((out[row], lse[row]), [x[row] for x in expected], "float16")


@pytest.mark.parametrize("L", [5, 20])
def test_keys_that_mlx_would_copy_are_compacted_first(L):
    pattern = PatternConfig(block_size=128, sink_tokens=128, window_tokens=128)
    q, k, v = draw(1, 2, L, 64), draw(1, 1, 770, 64), draw(1, 1, 770, 64, seed=1)
    seen = []

    def run(launch):
        prepared = HostCuda()(launch)

        def call(inputs, late):
            seen.append(inputs[1].shape[2])
            return prepared(inputs, late)

        return call

    results = cuda_kernels.sparse_attention(q, k, v, pattern, run=run)
    check(results, spec.sparse_attention(*(as_float64(x) for x in (q, k, v)), pattern), "float16")
    first_block = (770 - L) // 128  # of the first query
    assert seen == [128 + 770 - first_block * 128]


def _note(record: list):
    """A launcher that only takes notes."""

    def run(launch):
        record.append(launch)
        shapes = list(zip(launch.output_shapes, launch.output_dtypes, strict=True))
        return lambda inputs, late=(): [mx.zeros(shape, getattr(mx, dtype)) for shape, dtype in shapes]

    return run


def test_hopper_launch(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "device", lambda: H100)
    q, k = mx.zeros((1, 32, 2100, 128), mx.bfloat16), mx.zeros((1, 8, 4096, 128), mx.bfloat16)
    launches = []
    out, lse = cuda_kernels.sparse_attention(q, k, k, PatternConfig(), kv_tokens=3000, run=_note(launches))
    (launch,) = launches
    assert out.shape == q.shape
    assert lse.shape == (1, 32, 2100)
    assert launch.kernel.name == "flux_hopper_bfloat16_d128"
    assert launch.blocks == (132, 1, 1)
    assert launch.output_shapes[2] == (132 * launch.kernel.scratch_bytes // 4,)
    wanted = {"B": 1, "HQ": 32, "HKV": 8, "L": 2100, "S": 3000, "capacity": 4096, "block_size": 128}
    wanted |= {"window_blocks": 16, "sink_span": 128, "section": 32}
    assert dict(launch.arguments).items() >= wanted.items()
    short = cuda_catalog.prefill(
        launch.kernel, H100, (1, 1, 200, 128), (1, 1, 333, 128), 333, PatternConfig(), 1.0, may_be_full=True
    )
    assert short.blocks == (2, 1, 1)  # tiles 1 and 2 of 128 positions hold the queries 133 to 332


@pytest.mark.parametrize(
    ("device", "family", "block", "name"),
    [
        (H100, None, 256, "flux_hopper_float16_d64"),
        (H100, None, 64, "flux_portable_float16_d64_b64"),
        (H100, "portable", 128, "flux_portable_float16_d64_b128"),
        (AMPERE, None, 128, "flux_portable_float16_d64_b128"),
        (Device(10, 0, 148, 1 << 20), None, 128, "flux_portable_float16_d64_b128"),
        (AMPERE, None, 256, None),
        (Device(7, 5, 40, 1 << 20), None, 128, None),
    ],
)
def test_which_kernel_runs_where(device, family, block, name):
    kernel = cuda_catalog.find("float16", 64, block, device, family)
    assert (kernel and kernel.name) == name


def test_what_is_refused():
    q, k = draw(1, 4, 20, 64), draw(1, 2, 40, 64)
    with pytest.raises(ValueError, match=r"expected dtype bfloat16 or float16, got mlx\.core\.float32"):
        cuda_kernels.full_attention(*(x.astype(mx.float32) for x in (q, k, k)))
    with pytest.raises(ValueError, match=r"with D of \(64, 128\)"):
        cuda_kernels.full_attention(q[..., :32], k[..., :32], k[..., :32])
    with pytest.raises(ValueError, match='expected pattern "streaming" in exact prefill, got "triangle"'):
        cuda_kernels.sparse_attention(q, k, k, PatternConfig(name="triangle"), prompt_tokens=40)
    with pytest.raises(ValueError, match="no compiled kernel for block size 48"):
        cuda_kernels.sparse_attention(q, k, k, PatternConfig(block_size=48))
    with pytest.raises(ValueError, match="expected L <= kv_tokens <= keys in the buffer, got 20, 41, 40"):
        cuda_kernels.full_attention(q, k, k, kv_tokens=41)


def test_strides_that_int32_cannot_hold():
    assert cuda_catalog.fits_int32((1, 32, 1 << 20, 128), (1, 8, 1 << 20, 128))
    assert not cuda_catalog.fits_int32((2, 32, 1 << 20, 128), (2, 8, 1 << 20, 128))
    assert not cuda_catalog.fits_int32((1, 1, 1, 128), (1, 1, 1 << 24, 128))


@needs_no_device
@pytest.mark.parametrize("impl", cuda_kernels.FAMILIES)
@pytest.mark.parametrize("L", [1, 30])
def test_cuda_by_name_is_never_replaced(L, impl):
    q, k = draw(1, 4, L, 64), draw(1, 2, 300, 64)
    with pytest.raises(RuntimeError, match='impl="cuda" needs MLX with a CUDA device'):
        attention.sparse_attention(q, k, k, PREFILL_PATTERN, impl=impl)
    with pytest.raises(RuntimeError, match='impl="cuda" needs MLX with a CUDA device'):
        attention.full_attention(q, k, k, impl=impl)


@needs_no_device
@pytest.mark.parametrize("L", [1, 30])
@pytest.mark.parametrize("device", [AMPERE, H100], ids=["portable", "hopper"])
def test_mlx_takes_the_calls(monkeypatch, L, device):
    """MLX without CUDA refuses a launch only after its arguments have the right types: floats that float32 holds."""
    monkeypatch.setattr(cuda_kernels, "is_available", lambda: True)
    monkeypatch.setattr(cuda_kernels, "device", lambda: device)
    with pytest.raises(RuntimeError, match="No CUDA back-end"):
        cuda_kernels.full_attention(draw(1, 4, L, 64), draw(1, 2, 300, 64), draw(1, 2, 300, 64), scale=0.1)


@needs_no_device
@pytest.mark.parametrize("L", [1, 3])
def test_mlx_takes_the_calls_of_a_decoder(monkeypatch, L):
    monkeypatch.setattr(cuda_kernels, "is_available", lambda: True)
    q, k = draw(1, 4, L, 64), draw(1, 2, 300, 64)
    decode = cuda_kernels.decoder(tuple(q.shape), tuple(k.shape), "float16", DECODE_PATTERN, 0.1, Route.SPARSE)
    with pytest.raises(RuntimeError, match="No CUDA back-end"):
        decode(q, k, k, 290)


def test_scalars_are_what_mlx_takes():
    assert cuda_catalog.as_float32(0.1) == np.float32(0.1)
    assert cuda_catalog.as_int32(-(2**31)) == -(2**31)
    with pytest.raises(ValueError, match="expected a scalar that int32 holds, got 2147483648"):
        cuda_catalog.as_int32(2**31)


@pytest.fixture
def device(monkeypatch):
    """Pretend that there is a CUDA device, and that nothing was tested or calibrated."""
    record = kernel_policy.Record()
    monkeypatch.setattr(kernel_policy, "RECORD", record)
    monkeypatch.setattr(kernel_policy, "calibration", dict)
    monkeypatch.setattr(cuda_kernels, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(kernel_policy, "gpu_generation", lambda: 0)
    return record


SMALL = replace(PREFILL_PATTERN, sink_tokens=64, window_tokens=128)


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 128), ("float16", 64)])
@pytest.mark.parametrize("operation", ["prefill", "decode"])
def test_self_tests(operation, dtype, head_dim):
    variant = Variant(operation, dtype, head_dim, backend="cuda", pattern=SMALL)
    assert kernel_self_test.self_test(variant, HostCuda()) == ""


def test_a_self_test_sees_a_wrong_result():
    def wrong(launch):
        def call(inputs, late):
            first, *others = HostCuda()(launch)(inputs, late)
            return [first * 1.2, *others]

        return call

    variant = Variant("decode", "float16", 64, backend="cuda", pattern=SMALL)
    assert "differs from the specification" in kernel_self_test.self_test(variant, wrong)


def test_the_policy(device, monkeypatch):
    monkeypatch.setattr(kernel_policy, "self_test", lambda variant, run: "")
    q, k = draw(1, 4, 30, 64), draw(1, 2, 700, 64)
    assert kernel_policy.choose(q, k, k, PREFILL_PATTERN) == "cuda"
    assert (
        kernel_policy.choose(q[:, :, :1], k, k, PatternConfig(block_size=48, sink_tokens=0, window_tokens=96)) == "cuda"
    )
    assert kernel_policy.choose(q, k, k, PatternConfig()) == "ops"  # dense
    assert kernel_policy.choose(q, k, k, replace(PREFILL_PATTERN, block_size=48)) == "ops"
    assert {(v.operation, v.rows, v.backend) for v in device.verdicts} == {
        ("prefill", 1, "cuda"),
        ("decode", 1, "cuda"),
    }
    assert device.calls == {"cuda": 2, "ops: operations should be faster": 1, "ops: unsupported dtype or head dim": 1}


def test_a_wrong_hopper_kernel_leaves_the_portable_one(device, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "device", lambda: H100)
    monkeypatch.setattr(
        kernel_policy, "self_test", lambda variant, run: "" if "portable" in variant.backend else "wrong"
    )
    q, k = draw(1, 4, 30, 64), draw(1, 2, 700, 64)
    pattern = PatternConfig(block_size=128, sink_tokens=128, window_tokens=128)
    with pytest.warns(RuntimeWarning, match="wrong"):
        assert kernel_policy.choose(q, k, k, pattern) == "cuda-portable"
    launches = []
    cuda_kernels.sparse_attention(q, k, k, pattern, family=cuda_kernels.FAMILIES["cuda-portable"], run=_note(launches))
    assert launches[0].kernel.name == "flux_portable_float16_d64_b128"
    with pytest.warns(RuntimeWarning, match="wrong"):
        assert kernel_policy.choose(q[:, :, :1], k, k, pattern) == "ops"
    assert device.calls == {"cuda-portable": 1, "ops: self-test failed": 1}


def test_a_failed_load_means_operations(device, monkeypatch):
    monkeypatch.setattr(kernel_self_test.cuda_kernels, "cuda_run", lambda launch: 1 / 0)
    q, k = draw(1, 4, 30, 64), draw(1, 2, 700, 64)
    with pytest.warns(RuntimeWarning, match=r"cuda kernel .* is not used: ZeroDivisionError"):
        assert kernel_policy.choose(q, k, k, PREFILL_PATTERN) == "ops"
    assert kernel_policy.choose(q, k, k, PREFILL_PATTERN) == "ops"
    assert device.calls == {"ops: self-test failed": 2}
    assert "ZeroDivisionError" in kernel_policy.report()["variants"][0]["problem"]


def test_doctor_knows_the_variants_of_this_gpu(device, monkeypatch):
    on_ampere = doctor.all_variants()
    assert {variant.backend for variant in on_ampere} == {"cuda"}
    assert len(on_ampere) == len(set(on_ampere)) == 2 * 2 * (2 + 1) + 3 * 5
    monkeypatch.setattr(cuda_kernels, "device", lambda: Device(7, 5, 40, 1 << 20))
    assert doctor.all_variants() == []
