"""The benchmark of the CUDA kernels inside MLX, without a GPU: what it compares, and how it survives its stages."""

from __future__ import annotations

import itertools
import json
import sys

import mlx.core as mx
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import mlx_cuda_attention, mlx_cuda_decode, mlx_kernel_times
from flux_mlx import cuda_kernels
from flux_mlx.cuda_catalog import Device
from flux_mlx.spec import PatternConfig
from parity_tests.host_shim.cuda_source import HostCuda

PATTERN = PatternConfig(block_size=16, sink_tokens=16, window_tokens=48)

needs_no_device = pytest.mark.skipif(cuda_kernels.is_available(), reason="this machine has a CUDA device")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "device", lambda: Device(8, 0, 6, 1 << 20))
    monkeypatch.setattr(mlx_cuda_decode, "HEADS", (4, 2))
    monkeypatch.setattr(mlx_cuda_decode, "CALLS_AT_ONCE", 2)


def decode_rows(run) -> list[dict]:
    """`decode_parity` of one dtype, two calls of it, and two calls at once."""
    options = {"kv_tokens": 140, "sizes": (("float16", 64),), "queries": ((2, 1), (1, 3))}
    return mlx_cuda_decode.decode_parity(run, PATTERN, **options)


def test_the_benchmark_compares_rightly():
    rows = mlx_cuda_attention.prefill_parity("portable", [("float16", 64, 64)], HostCuda(), kv_tokens=100)
    assert len(rows) == 3
    rows += decode_rows(HostCuda())
    assert all(row["right"] and row.get("repeats", True) for row in rows)

    def wrong(launch):
        return lambda inputs, late: [x + 0.1 for x in HostCuda()(launch)(inputs, late)]

    assert not any(row["right"] for row in decode_rows(wrong) if "error" in row)


def test_a_decoder_that_differs_is_seen():
    calls = itertools.count()

    def wrong(launch):
        return lambda inputs, late: [x * (1 + next(calls)) for x in HostCuda()(launch)(inputs, late)]

    assert not any(row["right"] for row in decode_rows(wrong))


def test_host_times():
    """With a launcher that runs nothing: ours launch once a call."""
    launched = []

    def run(launch):
        shapes = list(zip(launch.output_shapes, launch.output_dtypes, strict=True))

        def call(inputs, late):
            launched.append(launch)
            return [mx.zeros(shape, getattr(mx, dtype)) for shape, dtype in shapes]

        return call

    rows = mlx_cuda_decode.host_times(run, tokens=40, calls=3, samples=2)
    assert [row["call"] for row in rows] == ["dense", "decoder", "sparse", "composition", "full_ours"]
    assert all(0 < row["made_us"] <= row["evaluated_us"] for row in rows)
    assert len(launched) == 3 * 3 * 3  # three of ours, three samples of three calls


def test_the_benchmark_survives_a_stage():
    result = mlx_cuda_attention.run_stage(lambda: [{}[0]])
    assert result["error"] == "KeyError: 0"
    assert not mlx_cuda_attention.is_right(result)
    assert mlx_cuda_attention.is_right(mlx_cuda_attention.run_stage(lambda: [{"right": True}, {"tokens": 3}]))


FAKE = """
import json, sys
names = sys.argv[sys.argv.index("--stages") + 1 : sys.argv.index("--budget-s")]
for name in names:
    if name == "dies":
        sys.exit(134)
    record = json.load(open(sys.argv[1]))
    record["stages"][name] = {"rows": [], "started_with": names[0]}
    json.dump(record, open(sys.argv[1], "w"))
    if name == "loses the device":
        sys.exit(3)
"""


def test_a_lost_device_does_not_take_the_other_stages_with_it(tmp_path):
    target, script = tmp_path / "record.json", tmp_path / "fake.py"
    target.write_text('{"stages": {}}')
    script.write_text(FAKE)
    names = ["a", "loses the device", "b", "dies", "c"]
    mlx_cuda_attention.supervise(names, target, 60.0, [sys.executable, str(script), str(target)])
    done = json.loads(target.read_text())["stages"]
    assert set(done) == set(names)
    assert done["dies"] == {"error": "the process ended with code 134"}
    assert [done[name]["started_with"] for name in ("a", "loses the device", "b", "c")] == ["a", "a", "b", "c"]


def test_stages_are_noted_one_by_one(tmp_path, monkeypatch):
    target = tmp_path / "record.json"
    target.write_text('{"stages": {"before": {}}}')
    usable = iter([True, False])
    stages = {"fine": lambda: [{"right": True}], "wrong": lambda: 1 / 0, "worse": lambda: 1 / 0, "unreached": list}
    monkeypatch.setattr(mlx_cuda_attention, "stages", lambda: stages)
    monkeypatch.setattr(mlx_cuda_attention, "is_usable", lambda: next(usable))
    assert mlx_cuda_attention.run_stages(list(stages), target, 60.0) == mlx_cuda_attention.BROKEN
    done = json.loads(target.read_text())["stages"]
    assert list(done) == ["before", "fine", "wrong", "worse"]
    assert mlx_cuda_attention.run_stages(["unreached"], target, 0.0) == 0
    assert "left out" in json.loads(target.read_text())["stages"]["unreached"]["error"]


def test_fractions_of_the_ideal():
    row = mlx_cuda_attention.with_fractions({"dense_ms": 10.0, "hopper_ms": 2.0, "full_ms": 8.0}, 0.1)
    assert row["ideal_ms"] == 1.0
    assert row["hopper_of_ideal"] == 0.5
    assert row["full_of_dense"] == 1.25
    assert mlx_cuda_attention.with_fractions({"hopper_ms": 2.0}, 0.1) == {"hopper_ms": 2.0}


@needs_no_device
def test_the_benchmark_needs_a_device(capsys):
    with pytest.raises(SystemExit):
        mlx_cuda_attention.main([])
    assert "needs MLX with a CUDA device" in capsys.readouterr().err


REPORT = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"""


def kernel_report(durations_us: list[float]) -> str:
    lines = [f'"{i}","7","flux_x","{mlx_kernel_times.METRIC}","us","{us:,}"' for i, us in enumerate(durations_us)]
    return REPORT + "\n".join(lines)


def test_device_times_are_read_from_the_profiler_s_table():
    cases, repeats = mlx_kernel_times.cases(), mlx_kernel_times.REPEATS
    times_us = [1000.0 * (i + 1) for i in range(len(cases)) for _ in range(repeats)]
    rows = mlx_kernel_times.rows_of(mlx_kernel_times.durations_ms(kernel_report(times_us)))
    assert [row["median_ms"] for row in rows] == [i + 1 for i in range(len(cases))]
    whole = next(row for row in rows if row.get("ideal_ms") and row["q_tokens"] == row["tokens"] == 32768)
    dense_ms = next(row["median_ms"] for row in rows if row["route"] == "full" and row["tokens"] == 32768)
    assert whole["ideal_ms"] == pytest.approx(dense_ms * 0.1248, rel=1e-3)


def test_a_report_of_other_launches_is_refused():
    with pytest.raises(ValueError, match="expected 60 launches, got 3"):
        mlx_kernel_times.rows_of(mlx_kernel_times.durations_ms(kernel_report([1.0, 2.0, 3.0])))
    with pytest.raises(ValueError, match="expected a table"):
        mlx_kernel_times.durations_ms("==ERROR== no device")
