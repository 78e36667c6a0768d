"""Compiles the layer router's kernels that MLX's CUDA backend launches: `python -m cuda_reference.export_router`.

Needs nvcc, and no GPU. Writes, as `cuda_reference.export_decode` does, machine code for Hopper and PTX for every GPU
since Ampere into `flux_mlx/data/cuda`, with a manifest that `flux_mlx.cuda_catalog` reads.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from cuda_reference.export_decode import ARCHITECTURES, ELEMENTS, OPTIONS, compile_ptx, nvcc_version, scalars
from cuda_reference.export_ptx import assemble, run, write_all
from flux_mlx.cuda_catalog import ROUTER_DTYPES, ROUTER_UNITS, Compiled

CUDA = Path(__file__).parent / "cuda"
HEADERS = tuple(CUDA / name for name in ("loads.cuh", "router.cuh", "warp.cuh"))
TYPES = ELEMENTS | {"float32": "float"}


@dataclass(frozen=True)
class Step:
    """One of the router's kernels: its dtypes, and its pointer parameters in order."""

    dtypes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


STEPS = {
    "router_pool": Step(ROUTER_DTYPES, ("queries",), ("rows",)),
    "router_encode": Step(
        ("float32",),
        ("prefix", "recent", "encoder_0_weight", "encoder_0_bias", "encoder_2_weight"),
        ("encoded",),
    ),
    "router_decide": Step(
        ("float32",),
        (
            "encoded", "encoder_2_bias", "head_0_weight", "head_0_bias", "head_2_weight", "head_2_bias",
            "head_4_weight", "head_4_bias", "tickets",
        ),
        ("route", "logits", "work"),
    ),
}  # fmt: skip


def source_of(family: str) -> Path:
    """The text of a kernel."""
    return CUDA / f"{family}.cu"


def source_hash() -> str:
    """Fingerprint of the kernels' texts and of the options that they are compiled with."""
    texts = [path.read_bytes() for path in (*map(source_of, STEPS), *HEADERS)]
    return hashlib.sha256(b"\0".join([*texts, " ".join(OPTIONS).encode()])).hexdigest()


def export(family: str, dtype: str, suffix: str) -> tuple[Compiled, bytes]:
    """Compile one variant: (how to launch it, its machine code or PTX)."""
    name, architecture, step = f"flux_{family}_{dtype}", ARCHITECTURES[suffix], STEPS[family]
    ptx = compile_ptx(source_of(family), {"FLUX_ENTRY": name, "FLUX_T": TYPES[dtype]}, architecture)
    record = Compiled(
        name=name,
        family=family,
        dtype=dtype,
        head_dim=0,
        block_size=0,
        suffix=suffix,
        architecture=architecture,
        inputs=step.inputs,
        outputs=step.outputs,
        scalars=scalars(source_of(family)),
        rows=1 if family == "router_pool" else ROUTER_UNITS,
        threads=int(re.search(r"\.maxntid (\d+)", ptx).group(1)),
        shared_bytes=0,
        scratch_bytes=0,
    )
    return record, assemble(ptx, architecture) if suffix == "cubin" else ptx.encode()


def variants() -> list[tuple[str, str, str]]:
    """(family, dtype, suffix) of every exported kernel, machine code first."""
    return [(family, dtype, suffix) for suffix in ARCHITECTURES for family in STEPS for dtype in STEPS[family].dtypes]


def write(folder: Path) -> None:
    """Export every variant into `folder`."""
    manifest = {"command": "python -m cuda_reference.export_router", "nvcc": nvcc_version()}
    manifest |= {"sources_sha256": source_hash()}
    write_all(folder / "manifest_router.json", (export(*variant) for variant in variants()), manifest)


def main() -> None:
    """Command `python -m cuda_reference.export_router`."""
    run(write, __doc__)


if __name__ == "__main__":
    main()
