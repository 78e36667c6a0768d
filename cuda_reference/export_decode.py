"""Compiles the decode kernel that MLX's CUDA backend launches: `python -m cuda_reference.export_decode`.

Needs nvcc, and no GPU. Writes machine code for Hopper and PTX for every GPU since Ampere into `flux_mlx/data/cuda`,
with a manifest that `flux_mlx.cuda_catalog` reads. nvcc makes the PTX; Triton's ptxas, the oldest in use, makes the
machine code, so that drivers of CUDA 12 load it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

from cuda_reference.export_ptx import DTYPES, HEAD_DIMS, PTX_VERSION, assemble, run, write_all
from flux_mlx.cuda_catalog import DECODE_ROWS, Compiled

SOURCE = Path(__file__).parent / "cuda" / "decode.cu"
HEADERS = tuple(SOURCE.with_name(name) for name in ("span.cuh", "warp.cuh"))
ELEMENTS = {"bfloat16": "__nv_bfloat16", "float16": "__half"}
OPTIONS = ("-std=c++17", "-ftz=true", "-prec-div=false")
INPUTS, OUTPUTS = ("q", "k", "v", "route", "tickets"), ("out", "work")
ARCHITECTURES = {"cubin": "sm_90", "ptx": "sm_80"}


def source_hash() -> str:
    """Fingerprint of the kernel's text and of the options that it is compiled with."""
    parts = [*(path.read_bytes() for path in (SOURCE, *HEADERS)), " ".join(OPTIONS).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def scalars(source: Path = SOURCE) -> tuple[tuple[str, str], ...]:
    """(name, type) of the scalars of a text's entry, in order."""
    (listed,) = re.findall(r"FLUX_ENTRY\((.*?)\) \{", source.read_text(), re.DOTALL)
    found = re.findall(r"\b(int|float) (\w+)", listed)
    return tuple((name, {"int": "int32", "float": "float32"}[kind]) for kind, name in found)


def compile_ptx(source: Path, macros: dict[str, str | int], architecture: str) -> str:
    """PTX of one variant of a text, in the version that the oldest driver in use reads.

    Raises:
        RuntimeError: nvcc refuses the text; the message is its own.
    """
    command = ["nvcc", *OPTIONS, f"-arch={architecture.replace('sm', 'compute')}", "-ptx", "-o", "-", str(source)]
    done = subprocess.run(
        [*command, *(f"-D{key}={value}" for key, value in macros.items())], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"[compile_ptx] nvcc for {architecture}: {done.stderr.strip()}")
    text = re.sub(r"^\s*//.*\n", "", done.stdout, flags=re.MULTILINE)
    version = PTX_VERSION["portable"]
    return re.sub(r"\.version [\d.]+", f".version {version // 10}.{version % 10}", text, count=1)


def export(dtype: str, head_dim: int, suffix: str) -> tuple[Compiled, bytes]:
    """Compile one variant: (how to launch it, its machine code or PTX)."""
    name, architecture = f"flux_decode_{dtype}_d{head_dim}", ARCHITECTURES[suffix]
    macros = {"FLUX_ENTRY": name, "FLUX_T": ELEMENTS[dtype], "FLUX_D": head_dim}
    ptx = compile_ptx(SOURCE, macros, architecture)
    record = Compiled(
        name=name,
        family="decode",
        dtype=dtype,
        head_dim=head_dim,
        block_size=0,
        suffix=suffix,
        architecture=architecture,
        inputs=INPUTS,
        outputs=OUTPUTS,
        scalars=scalars(),
        rows=DECODE_ROWS,
        threads=int(re.search(r"\.maxntid (\d+)", ptx).group(1)),
        shared_bytes=0,
        scratch_bytes=0,
    )
    return record, assemble(ptx, architecture) if suffix == "cubin" else ptx.encode()


def variants() -> list[tuple[str, int, str]]:
    """(dtype, head dim, suffix) of every exported kernel, machine code first."""
    return [(dtype, head_dim, suffix) for suffix in ARCHITECTURES for dtype in DTYPES for head_dim in HEAD_DIMS]


def nvcc_version() -> str:
    """ "13.0.88" or the like."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text).group(1)


def write(folder: Path) -> None:
    """Export every variant into `folder`."""
    manifest = {"command": "python -m cuda_reference.export_decode", "nvcc": nvcc_version()}
    manifest |= {"sources_sha256": source_hash()}
    write_all(folder / "manifest_decode.json", (export(*variant) for variant in variants()), manifest)


def main() -> None:
    """Command `python -m cuda_reference.export_decode`."""
    run(write, __doc__)


if __name__ == "__main__":
    main()
