"""Compiles the Triton kernels that MLX's CUDA backend launches: `python -m cuda_reference.export_ptx`.

Needs no GPU. Writes machine code for Hopper and PTX for every GPU since Ampere into `flux_mlx/data/cuda`, compressed,
with a manifest that says how to launch each: `flux_mlx.cuda_catalog` reads it, and never imports Triton.

MLX passes the pointers of the inputs, those of the outputs, and then the scalars. Triton's kernels end with hidden
pointers to scratch; the entry's parameter list is rewritten so that the global scratch is the last output. Parameters
are read by name in PTX, so only the list changes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import lzma
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from cuda_reference import triton_hopper, triton_prefill
from flux_mlx.cuda_catalog import Compiled

FOLDER = Path(__file__).resolve().parents[1] / "flux_mlx" / "data" / "cuda"
SOURCES = ("triton_hopper.py", "triton_prefill.py")
DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)  # of the portable kernel, to which the block size is a constant
PTX_VERSION = {"hopper": 87, "portable": 80}  # what the oldest ptxas and driver in use read: CUDA 12.8, CUDA 12.0
POINTERS = {"q": "T", "k": "T", "v": "T", "route": "int32", "out": "T", "lse": "float32"}
_CONSTANTS = {"hopper": ("D", "STAGES"), "portable": ("BLOCK", "D", "BLOCK_D", "ROWS", "KEYS")}
PARAMETER = re.compile(r"\.param \.(?P<type>\w+)[^,\n]*?(?P<name>\w+)\s*(,|\n|$)")


def tool(name: str) -> Path:
    """A program that Triton brings along: ptxas, cuobjdump."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def source_hash() -> str:
    """Fingerprint of the kernels' text and of the constants that they read; comments and docstrings do not count."""
    parts = []
    for name in SOURCES:
        for node in ast.parse((Path(__file__).parent / name).read_text()).body:
            is_kernel = isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).endswith(".jit") for decorator in node.decorator_list
            )
            if is_kernel and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            if is_kernel or isinstance(node, ast.Assign):
                parts.append(ast.unparse(node))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _signature(names: Sequence[str], constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Triton's type of each argument."""
    types = {"T": f"*{DTYPES[dtype]}", "int32": "*i32", "float32": "*fp32"}
    signature = {name: types[kind] for name, kind in POINTERS.items()}
    signature |= dict.fromkeys(constants, "constexpr") | {"qk_scale": "fp32"}
    return {name: signature.get(name, "i32") for name in names}


def compile_kernel(family: str, dtype: str, head_dim: int, block_size: int) -> Any:
    """Triton's compiled kernel."""
    kernel = triton_hopper.routed_kernel if family == "hopper" else triton_prefill.routed_kernel
    if family == "hopper":
        constants = {"D": head_dim, "STAGES": triton_hopper.STAGES}
        target, options = GPUTarget("cuda", 90, 32), {"num_warps": 4}
    else:
        tiles = triton_prefill.tile_options_of(item_bytes=2, head_dim=head_dim)
        constants = {"BLOCK": block_size, "D": head_dim, "BLOCK_D": head_dim}
        constants |= {name: tiles.pop(name) for name in ("ROWS", "KEYS")}
        target, options = GPUTarget("cuda", 80, 32), tiles
    signature = _signature(kernel.arg_names, constants, dtype)
    is_aligned = [name in POINTERS or name in ("q_b", "q_h", "q_t", "k_b", "k_h", "k_t") for name in kernel.arg_names]
    attributes = {(i,): [["tt.divisibility", 16]] for i, aligned in enumerate(is_aligned) if aligned}
    if family == "hopper":
        indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = GluonASTSource(kernel, signature, constexprs=indices, attrs=attributes)
    else:
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(source, target=target, options=options | {"ptx_version": PTX_VERSION[family]})


def entry_parameters(ptx: str) -> list[tuple[str, str]]:
    """(type, name) of the entry's parameters, in order: the types are u64, u32 or f32."""
    listed = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL).group(1)
    return [(match["type"], match["name"]) for match in PARAMETER.finditer(listed)]


def for_mlx(ptx: str, entry: str, name: str, pointers: int, *, with_scratch: bool) -> str:
    """PTX whose entry is called `name` and takes its `pointers`, the global scratch if it has one, then the scalars.

    Raises:
        ValueError: A hidden parameter that would be dropped is read.
    """
    given = entry_parameters(ptx)
    *visible, scratch, profile = given
    order = [*visible[:pointers], *([scratch] if with_scratch else []), *visible[pointers:]]
    header, listed, body = re.split(r"(\.entry \w+\(.*?\))", ptx, maxsplit=1, flags=re.DOTALL)
    for _, dropped in [profile] + ([] if with_scratch else [scratch]):
        if re.search(rf"\b{dropped}\b", body):
            raise ValueError(f"[for_mlx] expected {entry} not to read its hidden parameter {dropped}, but it does.")
    lines = {match["name"]: match.group(0).rstrip(", \n") for match in PARAMETER.finditer(listed)}
    listed = f".entry {entry}(\n" + ",\n".join(lines[parameter] for _, parameter in order) + "\n)"
    text = re.sub(r"\s*//.*", "", header + listed + body)
    return re.sub(rf"\b{entry}(?=\b|_param)", name, text)


def assemble(ptx: str, architecture: str) -> bytes:
    """Machine code of `architecture`.

    Raises:
        RuntimeError: ptxas refuses the text; the message is its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [tool("ptxas"), f"--gpu-name={architecture}", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"[assemble] ptxas for {architecture}: {done.stderr.strip()}")
        return target.read_bytes()


def export(family: str, dtype: str, head_dim: int, block_size: int = 0) -> tuple[Compiled, bytes]:
    """Compile one variant: (how to launch it, its PTX or machine code)."""
    compiled = compile_kernel(family, dtype, head_dim, block_size)
    kernel, facts = compiled.src.fn, compiled.metadata
    name = f"flux_{family}_{dtype}_d{head_dim}" + (f"_b{block_size}" if block_size else "")
    with_scratch = facts.global_scratch_size > 0
    ptx = for_mlx(compiled.asm["ptx"], facts.name, name, len(POINTERS), with_scratch=with_scratch)
    scalars = [n for n in kernel.arg_names if n not in POINTERS and n not in _CONSTANTS[family]]
    is_hopper = family == "hopper"
    record = Compiled(
        name=name,
        family=family,
        dtype=dtype,
        head_dim=head_dim,
        block_size=block_size,
        suffix="cubin" if is_hopper else "ptx",
        architecture="sm_90a" if is_hopper else "sm_80",
        inputs=("q", "k", "v", "route"),
        outputs=("out", "lse", "scratch") if with_scratch else ("out", "lse"),
        scalars=tuple((n, "float32" if n == "qk_scale" else "int32") for n in scalars),
        rows=triton_hopper.TILE if is_hopper else triton_prefill.tile_options_of(2, head_dim)["ROWS"],
        threads=int(re.search(r"\.reqntid (\d+)", ptx).group(1)),
        shared_bytes=facts.shared,
        scratch_bytes=facts.global_scratch_size,
    )
    return record, assemble(ptx, "sm_90a") if is_hopper else ptx.encode()


def variants() -> list[tuple[str, str, int, int]]:
    """(family, dtype, head dim, block size) of every exported kernel."""
    sizes = [(dtype, head_dim) for dtype in DTYPES for head_dim in HEAD_DIMS]
    return [("hopper", *size, 0) for size in sizes] + [("portable", *size, b) for size in sizes for b in BLOCK_SIZES]


def write_kernel(folder: Path, record: Compiled, code: bytes) -> dict[str, Any]:
    """Write a kernel's file, compressed; its record in the manifest."""
    partial = folder / "partial"
    partial.write_bytes(lzma.compress(code, preset=9 | lzma.PRESET_EXTREME))
    partial.replace(folder / f"{record.name}.{record.suffix}.xz")
    return asdict(record) | {"sha256": hashlib.sha256(code).hexdigest()}


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write it as JSON."""
    partial = path.with_name("partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.replace(path)


def write_all(path: Path, kernels: Iterable[tuple[Compiled, bytes]], manifest: dict[str, str]) -> None:
    """Write kernels beside their manifest at `path`: one file each, the manifest, begun with `manifest`, last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [write_kernel(path.parent, *kernel) for kernel in kernels]
    write_manifest(path, {**manifest, "kernels": records})


def run(write: Callable[[Path], None], description: str) -> None:
    """The command of an exporter: `write` into the folder of the package, or into another."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: %(default)s)")
    write(parser.parse_args().out)


def write(folder: Path) -> None:
    """Export every variant into `folder`."""
    manifest = {"command": "python -m cuda_reference.export_ptx", "triton": triton.__version__}
    manifest |= {"sources_sha256": source_hash()}
    write_all(folder / "manifest.json", (export(*variant) for variant in variants()), manifest)


def main() -> None:
    """Command `python -m cuda_reference.export_ptx`."""
    run(write, __doc__)


if __name__ == "__main__":
    main()
