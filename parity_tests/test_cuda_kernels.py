"""The CUDA kernels without a GPU: decode on the host shim, portable prefill interpreted by Triton, and the launches."""

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
from parity_tests.host_shim.cuda_source import HostCuda
from parity_tests.host_shim.run import SCHEDULES, HostError

AMPERE, H100 = Device(8, 0, 12, 1 << 20), Device(9, 0, 132, 50 << 20)
DECODE_PATTERN = PatternConfig(block_size=16, sink_tokens=16, window_tokens=48)
PREFILL_PATTERN = PatternConfig(block_size=64, sink_tokens=64, window_tokens=128)
TOLERANCE = kernel_self_test.TOLERANCE

needs_no_device = pytest.mark.skipif(cuda_kernels.is_available(), reason="this machine has a CUDA device")


@pytest.fixture(autouse=True)
def _ampere(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "device", lambda: AMPERE)


def draw(*shape: int, dtype: str = "float16", seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)).astype(getattr(mx, dtype))


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def check(results, expected, dtype: str) -> None:
    for got, want in zip(results, expected, strict=True):
        error = np.abs(as_float64(got) - want).max()
        assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 4, 2, 1, 301, 64), "float16"),
        ((2, 4, 1, 3, 200, 128), "bfloat16"),
        ((1, 6, 2, 8, 333, 64), "bfloat16"),  # three chunks of 8 rows
        ((1, 3, 3, 2, 2, 128), "float16"),
    ],
)
@pytest.mark.parametrize("run", [HostCuda(schedule="shuffled"), HostCuda(sanitize=True)], ids=["shuffled", "sanitized"])
def test_decode(sizes, dtype, run):
    B, HQ, HKV, L, S, D = sizes
    q, k, v = draw(B, HQ, L, D, dtype=dtype), draw(B, HKV, S, D, dtype=dtype), draw(B, HKV, S, D, dtype=dtype, seed=1)
    arrays = [as_float64(x) for x in (q, k, v)]
    sparse = cuda_kernels.sparse_attention(q, k, v, DECODE_PATTERN, run=run)
    check(sparse, spec.sparse_attention(*arrays, DECODE_PATTERN), dtype)
    full = cuda_kernels.full_attention(q, k, v, run=run)
    check(full, spec.full_attention(*arrays), dtype)


@pytest.mark.parametrize("schedule", ["behind", "shuffled"])
def test_decode_does_not_depend_on_the_order_of_blocks(schedule):
    q, k, v = draw(1, 8, 1, 64), draw(1, 2, 900, 64), draw(1, 2, 900, 64, seed=1)
    results = [cuda_kernels.full_attention(q, k, v, run=HostCuda(schedule=how)) for how in ("fair", schedule)]
    assert all(mx.array_equal(a, b).item() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("L", "S", "D", "dtype"), [(70, 300, 64, "float16"), (131, 131, 128, "bfloat16")])
def test_prefill_reads_a_cache_buffer(L, S, D, dtype):
    """The buffer is longer than the keys in use; NaN lies behind them."""
    q, k, v = draw(2, 4, L, D, dtype=dtype), draw(2, 2, S, D, dtype=dtype), draw(2, 2, S, D, dtype=dtype, seed=1)
    behind = mx.full((2, 2, 21, D), float("nan"), k.dtype)
    buffers = [mx.concatenate([x, behind], axis=2) for x in (k, v)]
    results = cuda_kernels.sparse_attention(q, *buffers, PREFILL_PATTERN, kv_tokens=S, run=HostCuda())
    check(results, spec.sparse_attention(*(as_float64(x) for x in (q, k, v)), PREFILL_PATTERN), dtype)


@pytest.mark.parametrize(("sizes", "dtype"), [((1, 8, 2, 1, 301, 128), "bfloat16"), ((2, 4, 1, 3, 200, 64), "float16")])
def test_decoder(sizes, dtype):
    """Whole buffers, NaN behind the keys in use; routes of all rows or of each."""
    B, HQ, HKV, L, S, D = sizes
    q, k, v = draw(B, HQ, L, D, dtype=dtype), draw(B, HKV, S, D, dtype=dtype), draw(B, HKV, S, D, dtype=dtype, seed=1)
    behind = mx.full((B, HKV, 19, D), float("nan"), k.dtype)
    buffers = [mx.concatenate([x, behind], axis=2) for x in (k, v)]
    arrays = [as_float64(x) for x in (q, k, v)]
    expected = [spec.full_attention(*arrays)[0], spec.sparse_attention(*arrays, DECODE_PATTERN)[0]]
    for route in (Route.FULL, Route.SPARSE, (Route.SPARSE, Route.FULL)[:B]):
        codes = route if isinstance(route, tuple) else (route,) * B
        decode = cuda_kernels.decoder(
            tuple(q.shape), tuple(buffers[0].shape), dtype, DECODE_PATTERN, D**-0.5, route, HostCuda()
        )
        out = decode(q, *buffers, S)
        assert out.shape == (B, L, HQ * D)
        wanted = np.stack([expected[code == Route.SPARSE][row] for row, code in enumerate(codes)])
        check([out], [wanted.swapaxes(1, 2).reshape(out.shape)], dtype)


def test_calls_of_a_decoder_take_slots_in_turn():
    """Calls that run at once must not count in the same tickets; all decoders of as many groups share them."""
    seen = []

    def run(launch):
        return lambda inputs, late: [seen.append((inputs[4].size, *late))]

    q, k = (1, 4, 1, 64), mx.zeros((1, 2, 256, 64))
    for capacity in (256, 512):
        decode = cuda_kernels.decoder(q, (1, 2, capacity, 64), "float16", DECODE_PATTERN, 0.125, Route.SPARSE, run)
        for tokens in (7, 8):
            decode(k, k, k, tokens)
    slots = [slot for *_, slot in seen]
    assert [(size, tokens) for size, tokens, _ in seen] == [(2 * cuda_catalog.DECODE_SLOTS, n) for n in (7, 8, 7, 8)]
    assert [(slot - slots[0]) % cuda_catalog.DECODE_SLOTS for slot in slots] == [0, 1, 2, 3]


def test_what_no_decoder_takes():
    options = ("float16", DECODE_PATTERN, 0.125, Route.SPARSE)
    with pytest.raises(ValueError, match="expected up to 8 queries, got 9"):
        cuda_kernels.decoder((1, 4, 9, 64), (1, 2, 256, 64), "float16", PREFILL_PATTERN, 0.125, Route.SPARSE)
    with pytest.raises(ValueError, match=r"with D of \(64, 128\), got \(1, 4, 1, 80\)"):
        cuda_kernels.decoder((1, 4, 1, 80), (1, 2, 256, 80), *options)
    with pytest.raises(ValueError, match="expected dtype bfloat16 or float16, got float32"):
        cuda_kernels.decoder((1, 4, 1, 64), (1, 2, 256, 64), "float32", *options[1:])


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


def test_decode_splits():
    """A block a multiprocessor at most, and no more than have 144 keys each."""
    assert cuda_catalog.decode_splits(H100, 8, 128 + 2048) == 16
    assert cuda_catalog.decode_splits(H100, 8, 500) == 4
    assert cuda_catalog.decode_splits(H100, 8, 1 << 20) == 16
    assert cuda_catalog.decode_splits(H100, 1, 1 << 20) == 64
    assert cuda_catalog.decode_splits(H100, 512, 1 << 20) == 1
    assert cuda_catalog.decode_splits(H100, 8, 1) == 1


def test_decode_launch():
    shapes = (2, 24, 3, 128), (2, 8, 512, 128)
    (kernel,) = {cuda_catalog.find("bfloat16", 128, block, H100, "decode") for block in (48, 128)}
    assert (kernel.name, kernel.suffix) == ("flux_decode_bfloat16_d128", "cubin")
    launch = cuda_catalog.decode(kernel, H100, *shapes, DECODE_PATTERN, 0.1, 512, 0)
    assert launch.blocks == (4, 8 * 2, 2)  # 9 rows of a KV head are two chunks
    parts = 4 * 8 * 2 * 2 * 8
    assert cuda_catalog.lse_offset(shapes[0], 8, 4) == parts * 130
    assert launch.output_shapes == ((2, 3, 24 * 128), (parts * 130 + 2 * 24 * 3,))
    late = [name for name, _ in kernel.scalars[len(launch.arguments) :]]
    assert late == ["kv_tokens", "slot"]
    assert dict(launch.arguments)["scale"] == np.float32(0.1)
    assert cuda_catalog.find("bfloat16", 128, 128, AMPERE, "decode").suffix == "ptx"
    assert cuda_catalog.find("bfloat16", 128, 48, H100) is None  # not for prefill


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


MUTATIONS = {
    "window off by one block": ("pattern.window_blocks + 1 : 0", "pattern.window_blocks : 0"),
    "sink dropped": ("return {begin < pattern.sink_span ? begin : pattern.sink_span, begin}", "return {0, begin}"),
    "own key hidden": ("return position <= query.position", "return position < query.position"),
    "a later key seen": ("return position <= query.position", "return position <= query.position + 1"),
    "last key of a piece lost": ("number < piece.end ? position", "number < piece.end - 1 ? position"),
    "a key past the end": ("number < piece.end ? position", "true ? position"),
    "no barrier before warps are merged": ("  store(part, tile);\n  __syncthreads();\n", "  store(part, tile);\n"),
    "no barrier behind the ticket": ("  __syncthreads();\n  return tile.is_last;", "  return tile.is_last;"),
    "merged by the first to come": ("gridDim.x - 1) == gridDim.x - 1;", "gridDim.x - 1) == 0;"),
    "tickets kept": ("take_ticket(ticket, gridDim.x - 1)", "take_ticket(ticket, gridDim.x + 7)"),
    "tickets of other rows": ("is_last(tickets + group, tile)", "is_last(tickets, tile)"),
    "maximum of half the keys": ("  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));\n", ""),
    "sum of half the keys": ("total += __shfl_xor_sync(kAllLanes, total, 2);", ""),
    "rows exchanged": ("__shfl_sync(kAllLanes, keep, 8 * t), __shfl_sync(kAllLanes, keep, 8 * t + 4)", "1.0f, 1.0f"),
    "route ignored": ("is_sparse ? int(q_pos", "true ? int(q_pos"),
}  # fmt: skip


def attend_with(mutation: tuple[str, str], schedule: str) -> None:
    """Check a case: rows that repeat, two turns of a warp, NaN behind the keys in use; the last of them matter most."""
    q, k, v = draw(2, 4, 2, 64), draw(2, 2, 733, 64), draw(2, 2, 733, 64, seed=1)
    k[:, :, -2:] = 0.5 * q[:, ::2]
    buffers = [mx.concatenate([x, mx.full((2, 2, 3, 64), float("nan"), k.dtype)], axis=2) for x in (k, v)]
    options = {"kv_tokens": 733, "run": HostCuda(mutation=mutation, schedule=schedule)}
    results = cuda_kernels.routed_attention(q, *buffers, (Route.FULL, Route.SPARSE), DECODE_PATTERN, **options)
    arrays = [as_float64(x) for x in (q, k, v)]
    by_row = zip(spec.full_attention(*arrays), spec.sparse_attention(*arrays, DECODE_PATTERN), strict=True)
    check(results, [np.stack([full[0], sparse[1]]) for full, sparse in by_row], "float16")


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_mistakes_in_decode_are_found(mutation):
    with pytest.raises((AssertionError, HostError)):
        [attend_with(mutation, schedule) for schedule in ("behind", "shuffled")]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decode_without_a_mistake(schedule):
    attend_with(("", ""), schedule)


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
    assert len(on_ampere) == len(set(on_ampere)) == 2 * 2 * (2 + 1)
    monkeypatch.setattr(cuda_kernels, "device", lambda: Device(7, 5, 40, 1 << 20))
    assert doctor.all_variants() == []
