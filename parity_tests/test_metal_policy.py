"""When Metal kernels are used, what happens when one is wrong, and what `flux_mlx.doctor` says."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flux_mlx import attention, doctor, kernel_policy, kernels
from flux_mlx.kernel_policy import Variant
from flux_mlx.spec import PatternConfig, RouterConfig
from metal_kernels import catalog, launches, operations
from parity_tests.host_shim import text
from parity_tests.host_shim.run import HostError, HostRun, as_array, dtype_name, is_dense

PATTERN = PatternConfig(block_size=16, sink_tokens=16, window_tokens=32)
PREFILL = Variant("prefill", "float32", 64)


@pytest.fixture
def record(monkeypatch, tmp_path):
    """A fresh record, no calibration, and a Metal device that is the host shim."""
    fresh = kernel_policy.Record()
    monkeypatch.setattr(kernel_policy, "RECORD", fresh)
    monkeypatch.setenv("FLUX_MLX_CALIBRATION", str(tmp_path / "calibration.json"))
    kernel_policy.calibration.cache_clear()
    yield fresh
    kernel_policy.calibration.cache_clear()


@pytest.fixture
def device(monkeypatch, record):
    """Pretend that a Metal device of an M3's generation is there."""
    monkeypatch.setattr(kernels, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(kernel_policy, "gpu_generation", lambda: 15)
    monkeypatch.setattr(kernel_policy, "self_test", lambda variant, run: "")
    return record


def queries(q_tokens: int = 40, head_dim: int = 64, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros((1, 4, q_tokens, head_dim), dtype)


def keys(kv_tokens: int = 400) -> mx.array:
    return mx.zeros((1, 2, kv_tokens, 64))


@pytest.mark.parametrize("operation", kernel_policy.OPERATIONS)
@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 64), ("bfloat16", 80), ("float16", 128)])
def test_self_test_passes_on_right_kernels(operation, dtype, head_dim):
    assert kernel_policy.self_test(Variant(operation, dtype, head_dim, 4), HostRun()) == ""


@pytest.mark.parametrize("rows", [1, 2])
def test_self_test_of_a_decode_threadgroup_with_fewer_rows(rows):
    assert kernel_policy.self_test(Variant("decode", "float16", 64, rows), HostRun()) == ""


def test_self_test_sees_a_wrong_result():
    def wrong(launch, inputs):
        return [x * 1.01 for x in HostRun()(launch, inputs)]

    assert "differs from the specification" in kernel_policy.self_test(PREFILL, wrong)


def test_self_tests_launch_every_kernel_that_the_policy_can_reach(monkeypatch):
    tested, reached = set(), set()

    def run_and_note(launch, inputs):
        tested.add(launch.spec.name)
        return HostRun()(launch, inputs)

    def note(launch, inputs):
        reached.add(launch.spec.name)
        return [mx.zeros(s, getattr(mx, d)) for s, d in zip(launch.output_shapes, launch.output_dtypes, strict=True)]

    for operation in kernel_policy.OPERATIONS:
        assert kernel_policy.self_test(Variant(operation, "float16", 64), run_and_note) == ""
    k = mx.zeros((1, 1, 700, 64))
    for q, pattern in ((k[:, :, :9], PATTERN), (k[:, :, :1], PATTERN), (k[:, :, :1], PatternConfig(window_tokens=512))):
        kernels.sparse_attention(q, k, k, pattern, run=note)
    monkeypatch.setattr(kernels, "MAX_SCORE_BYTES", 0)
    kernels.sparse_attention(k, k, k, PatternConfig(name="xattention"), prompt_tokens=700, run=note)
    assert tested == reached == set(catalog.KERNELS) - {"router_pool", "router_decide"}


def test_self_test_sees_a_wrong_lse_and_a_wrong_mass():
    def wrong(launch, inputs):
        *most, last = HostRun()(launch, inputs)
        return [*most, last * 1.01] if launch.spec.name in ("prefill", "block_mass") else [*most, last]

    for operation in ("prefill", "blocks"):
        assert "differs" in kernel_policy.self_test(Variant(operation, "float32", 64), wrong)


def test_self_test_sees_nan():
    def unwritten(launch, inputs):
        return [x * float("nan") for x in HostRun()(launch, inputs)]

    assert "inf" in kernel_policy.self_test(PREFILL, unwritten)


def test_a_failure_warns_once_and_falls_back(record):
    def broken(launch, inputs):
        raise HostError("program_source:12: error: expected ';'")

    with pytest.warns(RuntimeWarning, match="expected ';'"):
        assert kernel_policy.verdict(PREFILL, broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_policy.verdict(PREFILL, broken)
    assert "expected" in kernel_policy.report()["variants"][0]["problem"]


def test_without_a_device_nothing_is_tried(record):
    if kernels.is_available():
        pytest.skip("there is a Metal device")
    assert not kernel_policy.use_metal(queries(), keys(), keys(), PATTERN)
    assert record.verdicts == {}


def test_sparse_calls_go_to_metal_where_it_should_win(device):
    assert kernel_policy.use_metal(queries(), keys(), keys(), PATTERN)
    assert kernel_policy.use_metal(queries(1), keys(), keys(), PATTERN)
    assert kernel_policy.use_metal(queries(), keys(), keys(), PatternConfig(name="xattention"), prompt_tokens=400)
    assert device.calls == {"metal": 3}
    assert {v.operation for v in device.verdicts} == {"prefill", "decode", "blocks"}


def test_what_stays_with_operations(device, monkeypatch):
    assert not kernel_policy.use_metal(queries(), keys(40), keys(40), PATTERN)
    assert not kernel_policy.use_metal(queries(head_dim=72), keys(), keys(), PATTERN)
    assert not kernel_policy.use_metal(queries(dtype=mx.complex64), keys(), keys(), PATTERN)
    assert not kernel_policy.use_metal(queries(), keys(), keys()[..., :32], PATTERN)
    monkeypatch.setattr(kernel_policy, "gpu_generation", lambda: kernel_policy.TENSOR_UNIT_GENERATION)
    assert not kernel_policy.use_metal(queries(), keys(), keys(), PATTERN)
    assert kernel_policy.use_metal(queries(1), keys(), keys(), PATTERN)
    assert device.calls == {"ops: operations should be faster": 2, "ops: unsupported dtype or head dim": 3, "metal": 1}


def test_a_failed_self_test_is_counted(device, monkeypatch):
    monkeypatch.setattr(kernel_policy, "self_test", lambda variant, run: "wrong")
    with pytest.warns(RuntimeWarning, match="wrong"):
        assert not kernel_policy.use_metal(queries(), keys(), keys(), PATTERN)
    assert device.calls == {"ops: self-test failed": 1}


def test_calibration_decides(device):
    kernel_policy.write_calibration({"prefill": 300, "decode": None})
    assert kernel_policy.use_metal(queries(), keys(400), keys(400), PATTERN)
    assert not kernel_policy.use_metal(queries(), keys(200), keys(200), PATTERN)
    assert not kernel_policy.use_metal(queries(1), keys(400), keys(400), PATTERN)
    kernel_policy.write_calibration({"prefill": 1})
    assert not kernel_policy.use_metal(queries(), keys(40), keys(40), PATTERN), "dense, whatever a calibration says"


def test_a_default_device_that_is_no_gpu_stays_with_operations(device, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not kernel_policy.use_metal(queries(), keys(), keys(), PATTERN)
    assert device.calls == {"ops: the default device is not the GPU": 1}


@pytest.mark.parametrize(
    ("generation", "variable", "tolerance"), [(15, None, 1e-4), (17, None, 2e-2), (17, "1", 2e-2), (17, "0", 1e-4)]
)
def test_tolerance_of_float32_operations_knows_tf32(device, monkeypatch, generation, variable, tolerance):
    monkeypatch.setattr(kernel_policy, "gpu_generation", lambda: generation)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if variable:
        monkeypatch.setenv("MLX_ENABLE_TF32", variable)
    assert doctor.operations_tolerance() == tolerance


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"choice": 3}', '{"machine": {}, "choice": {"decode": "x"}}'])
def test_a_bad_calibration_counts_as_none(record, content):
    kernel_policy.calibration_path().write_text(content)
    assert kernel_policy.calibration() == {}


def test_a_calibration_of_another_machine_counts_as_none(record, monkeypatch):
    kernel_policy.write_calibration({"prefill": 300})
    assert kernel_policy.calibration() == {"prefill": 300}
    kernel_policy.calibration.cache_clear()
    monkeypatch.setattr(kernel_policy, "machine", lambda: {"device": "another", "mlx": "0"})
    assert kernel_policy.calibration() == {}


@pytest.mark.parametrize(("name", "generation"), [("applegpu_g13s", 13), ("applegpu_g17p", 17), ("x86_64", 0)])
def test_generation_of_a_gpu(monkeypatch, name, generation):
    monkeypatch.setattr(kernel_policy, "gpu_info", lambda: {"architecture": name})
    kernel_policy.gpu_generation.cache_clear()
    try:
        assert kernel_policy.gpu_generation() == generation
    finally:
        kernel_policy.gpu_generation.cache_clear()


def test_choice_from_a_benchmark():
    rows = [
        {"operation": operation, "kv_tokens": n, "ops_ms": 2.0, "kernel_ms": ms}
        for operation, times in (("prefill", (3.0, 1.0, 1.0)), ("decode", (1.0, 1.0, 2.5)))
        for n, ms in zip((100, 200, 400), times, strict=True)
    ]
    close = [{"operation": "prefill", "kv_tokens": 100, "ops_ms": 2.0, "kernel_ms": ms} for ms in (1.91, 1.89)]
    assert [doctor.choose([row])["prefill"] for row in close] == [None, 100]
    assert doctor.choose(rows) == {"prefill": 200, "decode": None}
    assert doctor.choose([row | {"kernel_ms": None} for row in rows]) == {"prefill": None, "decode": None}


def test_doctor_reports_as_text_and_json(record, tmp_path, capsys):
    target = tmp_path / "report.json"
    assert doctor.main(["--lengths", "64", "--json", str(target)]) == 0
    (shown, progress), report = capsys.readouterr(), json.loads(target.read_text())
    assert "timing decode over 64 keys" in progress
    assert "operations, streaming" in shown
    if not kernels.is_available():
        assert "neither Metal nor CUDA is available" in shown
        assert report["kernels"]["variants"] == []
    assert [row["kv_tokens"] for row in report["benchmark"]] == [64, 64]
    assert all(row["error"] < 1e-4 for row in report["operations"])


def test_doctor_counts_what_the_policy_chose(device, monkeypatch):
    """On a device each timed row also asks the policy, so that the report has its counts and reasons."""
    monkeypatch.setattr(doctor, "all_variants", list)
    monkeypatch.setattr(mx, "device_info", lambda *_: {"architecture": "applegpu_g15s"})
    monkeypatch.setattr(doctor, "SHAPE", doctor.CPU_SHAPE)
    monkeypatch.setattr(kernels, "sparse_attention", lambda q, k, v, pattern: [q])
    report = doctor.examine((32,))
    assert report["kernels"]["calls"] == {"ops: operations should be faster": 2}
    assert [row["default"] for row in report["benchmark"]] == ["ops", "ops"]


def test_doctor_lists_broken_kernels():
    report = {
        "versions": {},
        "device": {"kernels": "metal"},
        "operations": [],
        "kernels": {"variants": [vars(PREFILL) | {"problem": "wrong"}], "calls": {}, "calibration": {}},
        "benchmark": [],
    }
    assert "0 of 1 variants agree" in doctor.as_text(report)
    assert "prefill float32 D 64: wrong" in doctor.as_text(report)


@pytest.mark.parametrize("arguments", [["--lengths", "0"], ["--lengths", "x"], ["--nonsense"]])
def test_doctor_refuses_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        doctor.main(arguments)
    assert exit_info.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err


def test_doctor_knows_every_variant():
    variants = doctor.all_variants()
    assert len(variants) == len(set(variants)) == 5 * len(catalog.DTYPES) * len(catalog.HEAD_DIMS)
    assert replace(PREFILL, rows=1) in variants


def test_calibrating_needs_a_device(capsys):
    if kernels.is_available():
        pytest.skip("there is a Metal device")
    with pytest.raises(SystemExit):
        doctor.main(["--calibrate"])
    assert "needs a Metal or CUDA device" in capsys.readouterr().err


def test_the_launcher_builds_every_operation(device, monkeypatch, tmp_path):
    """`metal_run` hands MLX calls that it accepts: recorded while a function is exported, which needs no device."""
    monkeypatch.setattr(mx, "contiguous", lambda x: x)  # MLX cannot export it

    results = []

    def calls(q, k, few):
        route = kernels.route_layer(q.swapaxes(1, 2), weights, 10)[1]
        blocks = PatternConfig(name="xattention", block_size=16, stride=4)
        results[:] = [
            kernels.full_attention(q, k, k)[0],
            kernels.routed_attention(q, k, k, route, PATTERN)[0],
            kernels.sparse_attention(few, k, k, PATTERN)[1],
            kernels.sparse_attention(few, k, k, PATTERN, splits=4)[0],
            kernels.sparse_attention(q, k, k, blocks, prompt_tokens=90)[0],
            kernels.block_mass(q, k, blocks),
        ]
        return results

    shapes = RouterConfig.parameter_shapes(64)
    weights = {name: mx.zeros(shape) for name, shape in shapes.items()}
    q, k = mx.zeros((2, 4, 40, 64)), mx.zeros((2, 2, 90, 64))
    mx.export_function(str(tmp_path / "calls.mlxfn"), calls, q, k, q[:, :, :3])
    assert [tuple(r.shape) for r in results] == [q.shape, q.shape, (2, 4, 3), (2, 4, 3, 64), q.shape, (2, 4, 3, 6)]


def test_dense_inputs_of_a_kernel_are_made_dense():
    """What a kernel indexes without strides is copied if it has some; queries, keys and values are not."""
    wide = mx.arange(8)
    q, k = mx.zeros((4, 2, 64, 40)).swapaxes(2, 3), mx.zeros((4, 2, 64, 90)).swapaxes(2, 3)
    launch = launches.prefill(q.shape, "float32")
    inputs = kernels.kernel_inputs(launch, [q, k, k, wide[::2], (16, 1, 2, 0, 0), 90, 0.125])
    assert [is_dense(x) for x in inputs[:5]] == [False, False, False, True, True]
    assert inputs[3].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("impl", [None, "metal"])
@pytest.mark.parametrize("name", ["streaming", "triangle"])
def test_the_gradient_through_the_kernels_is_that_of_operations(device, monkeypatch, name, impl):
    """Forward by the kernels, backward by operations."""
    ran = []

    def on_host(*qkv, **options):
        ran.append(name)
        return kernel(*qkv, **options, run=HostRun())

    kernel = kernels.sparse_attention
    monkeypatch.setattr(kernels, "sparse_attention", on_host)
    pattern = PatternConfig(name=name, block_size=16, sink_tokens=16, window_tokens=32, last_tokens=5)
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, heads, n, 64)) for heads, n in ((2, 12), (1, 70), (1, 70)))

    def value_and_grad(impl):
        def loss(q, k, v):
            out = attention.sparse_attention(q, k, v, pattern, prompt_tokens=70, scale=0.2, impl=impl)
            return (out * mx.arange(64)).sum()

        return mx.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    value, gradient = value_and_grad(impl)
    assert ran == [name]
    expected_value, expected = value_and_grad("ops")
    assert abs(value.item() - expected_value.item()) < 1e-4 * abs(expected_value.item())
    for got, want in zip(gradient, expected, strict=True):
        assert mx.abs(want).max().item() > 0
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("batch", "name"), [(7, "prefill_3_4"), (8, "prefill_4")])
def test_texts_of_different_address_spaces_have_different_names(batch, name):
    """Where the name says constant (3 is the route, 4 the rule), MLX's text does too."""
    q, k = mx.zeros((batch, 2, 40, 64)), mx.zeros((batch, 2, 90, 64))
    launch = launches.prefill(q.shape, "float32")
    inputs = kernels.kernel_inputs(launch, [q, k, k, (1,) * batch, (16, 1, 2, 0, 0), 90, 0.125])
    assert kernels.kernel_name(launch, inputs) == name
    arrays = [as_array(x) for x in inputs]
    generated = text.generated_text(launch, [(tuple(a.shape), dtype_name(a)) for a in arrays])
    spaces = [b.pointer.split()[1] for b in text.signature(generated).buffers if b.name in ("route", "rule")]
    assert spaces == ["constant" if f"_{i}" in name else "device" for i in (3, 4)]


LONG_TOKENS = 65_536
DEFAULT = PatternConfig()
TRIANGLE = PatternConfig(name="triangle")


@pytest.mark.parametrize(
    ("route", "rule", "splits"),
    [
        ((1,), operations.FULL_RULE, 32),
        ((1,), kernels.rule_of(DEFAULT, None), 32),
        ((2,), kernels.rule_of(DEFAULT, None), 8),
        ((2, 1), kernels.rule_of(DEFAULT, None), 32),
        ((2,), kernels.rule_of(TRIANGLE, LONG_TOKENS), 32),
        ((2,), kernels.rule_of(TRIANGLE, LONG_TOKENS - 8), 8),
        ((2,), kernels.rule_of(PATTERN, None), 1),
        (mx.array([2]), kernels.rule_of(PATTERN, None), 32),
    ],
)
@pytest.mark.parametrize("q_tokens", [1, 8])
def test_pieces_of_a_decode_call(route, rule, splits, q_tokens):
    """2,176 keys of sink and window make 8 pieces; all 65,536 make the most, wherever some row may read them."""
    assert operations.decode_splits(route, rule, q_tokens, LONG_TOKENS) == splits
