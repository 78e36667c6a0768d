"""The compiled CUDA kernels in the package: made from these sources, whole, and fit to be launched as MLX launches."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from cuda_reference import export_decode, export_ptx, export_router
from flux_mlx import cuda_catalog
from flux_mlx.cuda_catalog import Compiled

SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_90a": 227 * 1024,
}  # of one block, by the CUDA programming guide
SIZE = {"int32": 4, "float32": 4}
MOST_BYTES = 2 << 20
MOST_SMALL_BYTES = 24 << 10  # of machine code that is called often: MLX copies and hashes it at every call
PREFILL = ("hopper", "portable")
KERNELS = cuda_catalog.compiled_kernels()
MACHINE_CODE = [kernel for kernel in KERNELS if kernel.suffix == "cubin"]
PTX = [kernel for kernel in KERNELS if kernel.suffix == "ptx"]


@cache
def _manifest(name: str = "manifest.json") -> dict:
    return json.loads((export_ptx.FOLDER / name).read_text())


def _run(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run([export_ptx.tool(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def identity(kernel: Compiled) -> str:
    """Of a test."""
    return f"{kernel.name}.{kernel.suffix}"


def passed_by_mlx(kernel: Compiled) -> list[int]:
    """Bytes of the parameters that MLX passes: pointers of inputs and outputs, then scalars."""
    pointers = [8] * (len(kernel.inputs) + len(kernel.outputs))
    return pointers + [SIZE[kind] for _, kind in kernel.scalars]


def test_the_files_are_made_from_these_sources():
    assert _manifest()["sources_sha256"] == export_ptx.source_hash(), "run python -m cuda_reference.export_ptx"
    of_decode = _manifest("manifest_decode.json")
    assert of_decode["sources_sha256"] == export_decode.source_hash(), "run python -m cuda_reference.export_decode"
    of_router = _manifest("manifest_router.json")
    assert of_router["sources_sha256"] == export_router.source_hash(), "run python -m cuda_reference.export_router"


def test_every_variant_is_there_and_nothing_else():
    named = {f"flux_{family}_{dtype}_d{d}" + (f"_b{b}" if b else "") for family, dtype, d, b in export_ptx.variants()}
    named |= {f"flux_decode_{dtype}_d{d}" for dtype, d, _ in export_decode.variants()}
    named |= {f"flux_{family}_{dtype}" for family, dtype, _ in export_router.variants()}
    assert {kernel.name for kernel in KERNELS} == named
    files = {path.name for path in export_ptx.FOLDER.glob("*.xz")}
    assert files == {f"{kernel.name}.{kernel.suffix}.xz" for kernel in KERNELS}
    assert sum(path.stat().st_size for path in export_ptx.FOLDER.iterdir()) < MOST_BYTES


@pytest.mark.parametrize("kernel", KERNELS, ids=identity)
def test_the_file_is_the_one_that_was_written(kernel):
    names = ("manifest.json", "manifest_decode.json", "manifest_router.json")
    records = [record for name in names for record in _manifest(name)["kernels"]]
    (record,) = (r for r in records if (r["name"], r["suffix"]) == (kernel.name, kernel.suffix))
    assert hashlib.sha256(cuda_catalog.code(kernel)).hexdigest() == record["sha256"]
    assert kernel.shared_bytes <= SHARED_BYTES[kernel.architecture]


@pytest.mark.parametrize("kernel", PTX, ids=identity)
def test_ptx_takes_what_mlx_passes(kernel):
    text = cuda_catalog.code(kernel).decode()
    given = [8 if kind == "u64" else 4 for kind, _ in export_ptx.entry_parameters(text)]
    assert given == passed_by_mlx(kernel)
    assert f".entry {kernel.name}(" in text
    assert re.search(rf"\.(req|max)ntid {kernel.threads}\b", text)
    scalars = [kind for kind, _ in export_ptx.entry_parameters(text)][-len(kernel.scalars) :]
    assert scalars == [{"int32": "u32", "float32": "f32"}[kind] for _, kind in kernel.scalars]


@pytest.mark.parametrize("kernel", MACHINE_CODE, ids=identity)
def test_machine_code_takes_what_mlx_passes(kernel, tmp_path):
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cuda_catalog.code(kernel))
    found = re.findall(r"Ordinal : (0x\w+)\s+Offset\s+: (0x\w+)\s+Size\s+: (0x\w+)", _run("cuobjdump", "-elf", file))
    listed = sorted(tuple(int(number, 16) for number in row) for row in found)
    assert [size for _, _, size in listed] == passed_by_mlx(kernel)
    report = re.search(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _run("cuobjdump", "--dump-resource-usage", file)
    )
    assert report.group(1) == kernel.name
    assert int(report.group(2)) * kernel.threads <= 65536
    assert int(report.group(3)) == 0
    if kernel.family not in PREFILL:
        assert int(report.group(4)) <= 48 * 1024  # static: no more is allowed
        assert len(cuda_catalog.code(kernel)) < MOST_SMALL_BYTES


@pytest.mark.parametrize("kernel", [k for k in PTX if k.family not in PREFILL or k.block_size == 64], ids=identity)
def test_ptx_is_assembled_without_spills(kernel, tmp_path):
    (tmp_path / "kernel.ptx").write_bytes(cuda_catalog.code(kernel))
    output = tmp_path / "kernel.cubin"
    report = _run("ptxas", "-v", f"--gpu-name={kernel.architecture}", tmp_path / "kernel.ptx", "-o", output)
    assert "0 bytes spill stores, 0 bytes spill loads" in report


@pytest.mark.parametrize("kernel", [k for k in MACHINE_CODE if k.family == "decode"], ids=identity)
def test_decode_has_all_its_loads_under_way_before_it_uses_one(kernel, tmp_path):
    """A warp's sixteen keys and values: D / 4 bytes of each a lane, in front of the first matrix product."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cuda_catalog.code(kernel))
    before, product, _ = _run("cuobjdump", "-sass", file).partition("HMMA")
    assert product
    assert len(re.findall(r"LDG\.E\.NA\.128", before)) == (1 + 2 + 2) * kernel.head_dim // 32  # queries, keys, values


@pytest.mark.parametrize("kernel", [k for k in MACHINE_CODE if k.family.startswith("router")], ids=identity)
def test_the_router_has_eight_loads_under_way_before_it_adds_one(kernel, tmp_path):
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cuda_catalog.code(kernel))
    loads_and_sums = re.findall(r"(LDG\.E\.\d+\.STRONG|FADD)", _run("cuobjdump", "-sass", file))
    runs = [list(run) for _, run in itertools.groupby(loads_and_sums)]
    loads = [len(run) for run in runs if run[0].startswith("LDG")]
    assert loads
    assert set(loads) == {8}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("family", "dtype"), [("router_pool", "float16"), ("router_decide", "float32")])
def test_the_router_as_it_would_be_exported_now(family, dtype):
    record, code = export_router.export(family, dtype, "ptx")
    assert record in KERNELS
    assert export_ptx.entry_parameters(code.decode())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_decode_as_it_would_be_exported_now():
    record, code = export_decode.export("float16", 64, "ptx")
    assert record in KERNELS
    assert export_ptx.entry_parameters(code.decode())


TRITON_PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0, // a comment
	.param .u32 k_param_1,
	.param .f32 k_param_2,
	.param .u64 .ptr .global .align 1 k_param_3,
	.param .u64 .ptr .global .align 1 k_param_4
)
.reqntid 128
{
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b64 %rd2, [k_param_3];
}
"""


def test_scratch_becomes_the_last_output():
    text = export_ptx.for_mlx(TRITON_PTX, "k", "flux_x", 1, with_scratch=True)
    parameters = export_ptx.entry_parameters(text)
    assert parameters == [
        ("u64", "flux_x_param_0"), ("u64", "flux_x_param_3"), ("u32", "flux_x_param_1"), ("f32", "flux_x_param_2"),
    ]  # fmt: skip
    assert "[flux_x_param_3]" in text
    assert "param_4" not in text


def test_a_hidden_parameter_that_is_read_is_not_dropped():
    with pytest.raises(ValueError, match="expected k not to read its hidden parameter k_param_3"):
        export_ptx.for_mlx(TRITON_PTX, "k", "flux_x", 1, with_scratch=False)
