"""The host shim itself: it must run right kernels right, and refuse each planted fault."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels.catalog import Buffer, KernelSpec, Launch
from parity_tests.host_shim import build, text
from parity_tests.host_shim.run import SCHEDULES, HostError, HostRun, as_array, source_of

HEADER = """
#include <metal_simdgroup_matrix>
using namespace metal;
METAL_FUNC int row_of(uint lane) { return int((lane / 4) & 4) + int(lane / 2) % 4; }
METAL_FUNC int column_of(uint lane) { return int((lane / 4) & 2) * 2 + int(lane % 2) * 2; }
METAL_FUNC int wrong_column_of(uint lane) { return int(lane % 4) * 2; }
"""

PRODUCT = """
const uint lane = thread_index_in_simdgroup;
const int at = ROW * 8 + COLUMN;
simdgroup_matrix<float, 8, 8> a, b;
for (int e = 0; e < 2; e++) {
  a.thread_elements()[e] = x[at + e];
  b.thread_elements()[e] = y[at + e];
}
simdgroup_matrix<float, 8, 8> sum;
sum.thread_elements()[0] = 0.0f;
sum.thread_elements()[1] = 0.0f;
simdgroup_multiply_accumulate(sum, a, b, sum);
out[at] = sum.thread_elements()[0];
out[at + 1] = sum.thread_elements()[1];
"""

# SIMD-group g writes the eighth of `shared` that SIMD-group g - 1 reads.
NEIGHBOUR = """
threadgroup float shared[128];
const uint i = thread_index_in_threadgroup;
shared[i] = x[i];
BARRIER
out[i] = simd_sum(shared[(i + 32) % 128]);
"""


@dataclass(frozen=True)
class PlantedSpec(KernelSpec):
    """A kernel whose text is given here."""

    text: str = ""

    def header(self) -> str:
        return HEADER

    def body(self) -> str:
        return self.text


def planted(body: str, inputs: tuple[str, ...] = ("x",), threads: int = 32, outputs: int = 64) -> Launch:
    """A launch of one threadgroup with float32 buffers."""
    buffers = tuple(Buffer(name, "float32", "[n]") for name in inputs)
    spec = PlantedSpec("planted", "", (), buffers, (Buffer("out", "float32", "[n]"),), threads, "1", text=body)
    return Launch(spec, (), (threads, 1, 1), (threads, 1, 1), ((outputs,),), ("float32",), 32768)


def run(launch: Launch, *arrays: np.ndarray, **options) -> np.ndarray:
    return np.array(HostRun(**options)(launch, [mx.array(a) for a in arrays])[0])


def numbers(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal(n).astype(np.float32)


def product(column: str, row: str = "row_of(lane)") -> np.ndarray:
    body = PRODUCT.replace("ROW", row).replace("COLUMN", column)
    return run(planted(body, ("x", "y")), numbers(64), numbers(64)[::-1].copy()).reshape(8, 8)


def test_matrix_product_has_the_lane_layout():
    x, y = numbers(64).reshape(8, 8), numbers(64)[::-1].reshape(8, 8)
    np.testing.assert_allclose(product("column_of(lane)"), x @ y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "column"), [("row_of(lane)", "wrong_column_of(lane)"), ("column_of(lane)", "row_of(lane) / 2 * 2")]
)
def test_wrong_lane_layout_shows(row, column):
    x, y = numbers(64).reshape(8, 8), numbers(64)[::-1].reshape(8, 8)
    assert not np.allclose(product(column, row), x @ y, atol=0.1)


def neighbour_sums(barrier: str, schedule: str) -> bool:
    x = numbers(128)
    out = run(planted(NEIGHBOUR.replace("BARRIER", barrier), threads=128, outputs=128), x, schedule=schedule)
    return np.allclose(out, np.roll(x.reshape(4, 32), -1, axis=0).sum(1).repeat(32), atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_barrier_orders_simdgroups(schedule):
    assert neighbour_sums("threadgroup_barrier(mem_flags::mem_threadgroup);", schedule)


def test_missing_barrier_shows_under_adversarial_schedules():
    assert not neighbour_sums("", "ahead")
    assert not neighbour_sums("", "behind")


@pytest.mark.parametrize(
    ("body", "threads", "message"),
    [
        ("if (thread_index_in_threadgroup < 32) { BARRIER } out[0] = x[0];", 64, "deadlock"),
        (
            "if (thread_index_in_threadgroup < 32) { BARRIER }\nelse { BARRIER }\nout[0] = x[0];",
            64,
            "divergent barrier",
        ),
        (
            "float s = x[0];\nif (thread_index_in_simdgroup < 3) { s = simd_sum(s); }\nelse { s = simd_max(s); }\n"
            "out[0] = s;",
            32,
            "lanes diverge",
        ),
        ("if (thread_index_in_simdgroup < 3) { return; } out[0] = simd_sum(x[0]);", 32, "deadlock"),
        ("out[0] = simd_shuffle_xor(x[0], ushort(16));", 16, "metal_shim"),
        ("threadgroup float big[8193]; big[0] = x[0]; out[0] = big[0];", 32, "threadgroup memory"),
        ("out[0] = x[64];", 32, "exit code -11"),
        ("out[64] = x[0];", 32, "exit code -11"),
        ("threadgroup float small[16]; small[16] = x[0]; out[0] = small[0];", 32, "exit code -11"),
    ],
)
def test_faults_are_errors(body, threads, message):
    body = body.replace("BARRIER", "threadgroup_barrier(mem_flags::mem_threadgroup);")
    body += "\nout[0] += thread_index_in_threadgroup * 0 + thread_index_in_simdgroup * 0;"
    with pytest.raises(HostError, match=message):
        run(planted(body, threads=threads), numbers(64))


def test_sanitizers_see_a_read_before_the_buffer():
    with pytest.raises(HostError, match="AddressSanitizer"):
        run(planted("out[0] = (x - 3)[thread_index_in_simdgroup];"), numbers(64), sanitize=True)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_strided_input_is_refused_where_strides_are_not_read(dtype):
    launch = planted("out[thread_index_in_simdgroup] = float(x[thread_index_in_simdgroup]);")
    with pytest.raises(HostError, match="reads x as dense"):
        HostRun()(launch, [mx.array(numbers(64)).astype(dtype)[::2]])


def test_unwritten_outputs_are_nan():
    out = run(planted("out[thread_index_in_simdgroup] = x[0];"), numbers(64))
    assert not np.isnan(out[:32]).any()
    assert np.isnan(out[32:]).all()


def test_threadgroup_memory_starts_as_nan():
    body = "threadgroup float scratch[32];\nout[thread_index_in_simdgroup] = scratch[thread_index_in_simdgroup] + x[0];"
    assert np.isnan(run(planted(body), numbers(64))).all()


def test_schedules_differ_and_shuffled_follows_its_seed():
    body = "threadgroup float last[1];\nlast[0] = thread_index_in_threadgroup + 0 * x[0];\n"
    body += "threadgroup_barrier(mem_flags::mem_threadgroup);\nout[thread_index_in_threadgroup] = last[0];"
    launch = planted(body, threads=64)
    results = {s: run(launch, numbers(64), schedule=s).tobytes() for s in ("ahead", "behind")}
    shuffled = [run(launch, numbers(64), schedule="shuffled", seed=seed).tobytes() for seed in (1, 1, 2)]
    assert results["ahead"] != results["behind"]
    assert shuffled[0] == shuffled[1] != shuffled[2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_types_round_to_nearest_even(dtype):
    values = np.concatenate([numbers(1000) * 300, numbers(1000) * 1e-5]).astype(np.float32)
    spec = PlantedSpec(
        "rounding",
        "",
        (),
        (Buffer("x", "float32", "[n]"),),
        (Buffer("out", dtype, "[n]"),),
        32,
        "1",
        text=f"out[threadgroup_position_in_grid.x] = {dtype}_t(x[threadgroup_position_in_grid.x]);",
    )
    launch = Launch(spec, (), (2000 * 32, 1, 1), (32, 1, 1), ((2000,),), (dtype,), 0)
    (out,) = HostRun()(launch, [mx.array(values)])
    expected = mx.array(values).astype(getattr(mx, dtype))
    assert mx.array_equal(out, expected).item()


needs_clang = pytest.mark.skipif(
    build.may_skip_address_spaces(), reason="clang 18 or newer is not installed (apt-get install clang-19)"
)


@needs_clang
@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("const device float* p = x; out[0] = *p;", False),
        ("const constant float* p = x; out[0] = *p;", True),
        ("const float* p = x; out[0] = *p;", True),
        ("threadgroup float s[4]; threadgroup float* p = s; out[0] = *p;", False),
        ("threadgroup float s[4]; device float* p = s; out[0] = *p;", True),
        ("device float* p = x; out[0] = *p;", True),
    ],
)
def test_address_space_check(body, wrong):
    launch = planted(body)
    errors = build.check_address_spaces(source_of(launch, [as_array(mx.array(numbers(64)))]) + f"// {body}")
    assert bool(errors) == wrong, errors


def test_signature_reads_scalars_constants_and_metadata():
    launch = planted("out[0] = x[0] + y + z[1] + x_shape[0] + x_strides[0];", ("x", "y", "z"))
    arrays = [mx.array(numbers(64)), mx.array(1.0), mx.array(numbers(3))]
    sign = text.signature(text.generated_text(launch, [(tuple(a.shape), "float32") for a in arrays]))
    assert [b.name for b in sign.buffers] == ["x", "x_shape", "x_strides", "y", "z", "out"]
    assert [b.pointer.split()[1] for b in sign.buffers[:5]] == ["device", *["constant"] * 4]
    assert [b.is_reference for b in sign.buffers] == [False, False, False, True, False, False]
