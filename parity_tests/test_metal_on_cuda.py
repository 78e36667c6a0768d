"""The calls that an NVIDIA GPU runs of the Metal text, through the same script, with the host shim as the GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from metal_kernels.catalog import KERNELS, MSL
from parity_tests.host_shim import build, text
from parity_tests.host_shim.cuda import cases
from parity_tests.host_shim.run import SCHEDULES, _execute

METAL_CALL = re.compile(r"\b(simd\w+|threadgroup_barrier)\(")
SCRIPT = Path(cases.__file__).with_name("run.py")
RUN_HERE = (
    "streaming, tokens first float16 D 80",
    "table float16 D 96",
    "full decode in pieces float32 D 80",
    "streaming decode, channels apart float16 D 80",
    "router float16 D 80",
    "block mass of 333 bfloat16 D 80",
)


class HostModule:
    """CuPy's `RawModule` for a "binary" that is a translation unit for the host."""

    def __init__(self, path: str) -> None:
        self.source = Path(path).read_text()

    def get_function(self, name: str) -> HostModule:
        assert name == "flux_entry"
        return self

    def __call__(self, groups: tuple[int, ...], threads: tuple[int], arrays: tuple[np.ndarray, ...]) -> None:
        written = [not buffer.pointer.startswith("const") for buffer in text.signature(self.source).buffers]
        grid, sizes = [groups[0] * threads[0], *groups[1:]], [threads[0], 1, 1]
        job = struct.pack("<9I", SCHEDULES.index("shuffled"), 1, *grid, *sizes, len(arrays))
        job += b"".join(struct.pack("<IIQ", out, 0, x.nbytes) for out, x in zip(written, arrays, strict=True))
        job += b"".join(np.ascontiguousarray(x).tobytes() for out, x in zip(written, arrays, strict=True) if not out)
        result = _execute(build.executable(self.source), job, 300)[8:]
        for x in (x for out, x in zip(written, arrays, strict=True) if out):
            x[...] = np.frombuffer(result[: x.nbytes], x.dtype).reshape(x.shape)
            result = result[x.nbytes :]


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """run.py with numpy in CuPy's place."""
    cupy = ModuleType("cupy")
    cupy.__dict__.update({name: getattr(np, name) for name in ("ndarray", "full", "uint8", "uint16")})
    cupy.asarray, cupy.asnumpy, cupy.RawModule = np.array, np.asarray, HostModule
    cupy.cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceProperties=lambda index: {"name": b"the host"}))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    module_spec = importlib.util.spec_from_file_location("metal_on_cuda_run", SCRIPT)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """What cases.py writes, with translation units for binaries."""
    monkeypatch.setattr(cases, "cuda_text", text.translation_unit)

    def write(source: str) -> str:
        name = hashlib.sha256(source.encode()).hexdigest()[:16]
        (tmp_path / name).write_text(source)
        return name

    (tmp_path / "cases.json").write_text(json.dumps(cases.all_cases(write)))
    return tmp_path


def keep(folder: Path, names: tuple[str, ...]) -> None:
    """Leave only the cases called `names` in the folder."""
    written = json.loads((folder / "cases.json").read_text())
    written["cases"] = [case for case in written["cases"] if case["name"] in names]
    (folder / "cases.json").write_text(json.dumps(written))


def test_the_cases_reach_every_kernel(script, folder):
    written = json.loads((folder / "cases.json").read_text())
    assert len({case["name"] for case in written["cases"]}) == len(written["cases"])
    for most_tokens in (script.SMALL_TOKENS, cases.LONG):
        reached = [case for case in written["cases"] if script.tokens_of(case) <= most_tokens]
        assert {step["kernel"] for case in reached for step in case["steps"]} == set(KERNELS)
    long = [case for case in written["cases"] if script.tokens_of(case) == cases.LONG]
    assert {step["kernel"] for case in long for step in case["steps"]} >= set(KERNELS) - {"decode"}


def test_what_the_kernels_call_of_metal_is_in_the_header():
    """nvcc is not everywhere: a function of Metal's that the header lacks must show without it."""
    called = {name for path in MSL.iterdir() for name in METAL_CALL.findall(path.read_text())}
    header = SCRIPT.with_name("metal_on_cuda.h").read_text()
    assert {"simd_shuffle_xor", "simdgroup_barrier", "threadgroup_barrier"} <= called
    assert not [name for name in called if f" {name}(" not in header]


def test_every_kernel_is_right(script, folder, monkeypatch, capsys):
    keep(folder, RUN_HERE)
    monkeypatch.setattr(sys, "argv", ["run.py", str(folder), "--json", str(folder / "report.json")])
    assert script.main() == 0, capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert sorted(row["case"] for row in report["cases"]) == sorted(RUN_HERE)
    assert {name for row in report["cases"] for name in row["kernels"]} == set(KERNELS)


def test_a_kernel_that_did_not_run_or_is_wrong_is_a_failure(script, folder, monkeypatch, capsys):
    keep(folder, ("router float16 D 80",))
    monkeypatch.setattr(sys, "argv", ["run.py", str(folder), "--small"])
    assert script.main() == 1
    assert "did not run: ['block_mass', 'decode'" in capsys.readouterr().out
    (case,) = json.loads((folder / "cases.json").read_text())["cases"]
    assert script.check(folder, case)["ok"]
    assert not script.check(folder, case | {"pool_tokens": 2})["ok"]
