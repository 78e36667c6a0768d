"""Every Triton kernel compiles for an A800 (sm_80) and for Hopper (sm_90) without a GPU, within their memories."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cuda_reference import (  # noqa: E402
    triton_backward,
    triton_decode,
    triton_hopper,
    triton_prefill,
    triton_xattention,
)

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of one block, by the CUDA programming guide
POINTERS = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"}  # of the tensors' dtype
FLOAT_POINTERS = {"lse", "dlse", "delta", "part_out", "part_lse", "sums", "maxima", "mass"}
INT_POINTERS = {"partial_counts", "partial_blocks", "full_counts", "full_blocks", "counts", "blocks"}
FLOATS = {"scale", "qk_scale", "threshold"}
STRIDE = re.compile(r"d?[qkvo]_[bht]")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S.*?) ;")  # of nvdisasm, less address and guard
# (architecture, head dim): 80 is padded to 128, once is enough
TARGETS = ((80, 64), (80, 80), (80, 128), (80, 256), (90, 64), (90, 128), (90, 256))
PARTS = ("backward", "prefill or hopper", "not (backward or prefill or hopper)")  # what runs side by side, as -k says

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="compiled in a process of its own, by test_without_the_interpreter")


@pytest.mark.skipif(not INTERPRETED, reason="this process is the one that compiles")
@pytest.mark.parametrize("part", PARTS)
def test_without_the_interpreter(part: str) -> None:
    """The decorators read TRITON_INTERPRET when a kernel is defined: run this file again without it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "-p", "no:cacheprovider", "-k", part, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-400:]


def _type(name: str, dtype: str) -> str:
    """Triton's type of the kernel argument called `name`."""
    if name in POINTERS:
        return f"*{dtype}"
    if name in FLOAT_POINTERS:
        return "*fp32"
    if name in INT_POINTERS:
        return "*i32"
    if name == "kept":
        return "*i8"
    return "fp32" if name in FLOATS else "i32"


def _dump(compiled, tool: str, option: str) -> str:
    """What one of Triton's own binary tools prints of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    cubin = Path(compiled.metadata_group[f"{compiled.name}.cubin"])
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def _resources(compiled) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, as the assembler reports them; a spill needs stack."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _dump(compiled, "cuobjdump", "--dump-resource-usage"))
    return int(found.group(1)), int(found.group(2))


def _fused_exchanges(compiled) -> list[str]:
    """Machine instructions a * b + c whose c comes straight from another lane.

    In a sum over lanes a and b make the lane's own product, rounded in its partner's copy and not here: the copies of
    the sum differ in the last bit, and which of them is stored is a race.
    """
    exchanged, found = set(), []
    for instruction in INSTRUCTION.findall(_dump(compiled, "nvdisasm", "-c")):
        name, _, arguments = instruction.partition(" ")
        operands = [re.sub(r"\.\w+|[-|~]", "", operand).strip() for operand in arguments.split(",")]
        if name.startswith("FFMA") and operands[3] in exchanged:
            found.append(instruction)
        shuffled = name.startswith("SHFL.BFLY")
        exchanged.discard(operands[shuffled])
        if shuffled:
            exchanged.add(operands[1])
    return found


def _check(compiled, arch: int, spill_bytes: int = 0) -> None:
    assert not _fused_exchanges(compiled)
    registers, stack = _resources(compiled)
    assert compiled.metadata.shared <= SHARED_BYTES[arch]
    assert registers <= 255
    assert stack <= spill_bytes


def _compile(kernel, arch: int, options: dict, dtype: str = "bf16"):
    """Compile `kernel`; upper-case keys of `options` are its compile-time arguments, the others launch options."""
    constants = {name: value for name, value in options.items() if name.isupper()}
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or STRIDE.fullmatch(name)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}  # what a launch finds in contiguous tensors
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    launch = {name: value for name, value in options.items() if name not in constants}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)


def _dims(head_dim: int) -> dict:
    return {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}


def _query(head_dim: int) -> torch.Tensor:
    return torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16)


@compiles
@pytest.mark.parametrize(("arch", "head_dim"), TARGETS)
def test_prefill(arch: int, head_dim: int) -> None:
    options = _dims(head_dim) | triton_prefill.tile_options(_query(head_dim))
    for kernel in (triton_prefill.streaming_kernel, triton_prefill.block_kernel):
        _check(_compile(kernel, arch, {"BLOCK": 128, **options}), arch)


@compiles
@pytest.mark.parametrize(("arch", "head_dim"), TARGETS)
def test_backward(arch: int, head_dim: int) -> None:
    for_keys, for_queries = triton_backward.backward_options(_query(head_dim))
    sizes = {"BLOCK": 128, **_dims(head_dim)}
    _check(_compile(triton_backward.key_kernel, arch, sizes | for_keys), arch)
    _check(_compile(triton_backward.query_kernel, arch, sizes | for_queries), arch)
    _check(_compile(triton_backward.delta_kernel, arch, {**_dims(head_dim), "ROWS": 64, "num_warps": 4}), arch)


@compiles
@pytest.mark.parametrize(("arch", "head_dim"), TARGETS)
def test_decode(arch: int, head_dim: int) -> None:
    options = _dims(head_dim) | triton_decode.tile_options(_query(head_dim), query_rows=4)
    _check(_compile(triton_decode.split_kernel, arch, {"BLOCK": 128, **options}), arch)
    for splits in (1, 8, 32) if head_dim == 64 else (32,):
        merge = {**_dims(head_dim), "ROWS": 16, "SPLITS": splits, "num_warps": 4}
        _check(_compile(triton_decode.merge_kernel, arch, merge), arch)


@compiles
@pytest.mark.parametrize(("arch", "head_dim"), TARGETS)
def test_xattention(arch: int, head_dim: int) -> None:
    options = _dims(head_dim) | triton_xattention.mass_options(_query(head_dim), per_block=8)
    _check(_compile(triton_xattention.mass_kernel, arch, {"STRIDE": 16, "PER_BLOCK": 8, **options}), arch)
    for by_count in (False, True):
        options = {"BY_COUNT": by_count, "COLUMNS": 512, "num_warps": 1}
        _check(_compile(triton_xattention.choose_kernel, arch, options), arch)


@triton.jit
def products_kernel(q, k, lse, D: tl.constexpr):
    """A planted mistake: products, one a lane, go into the sum over lanes as they are."""
    columns = tl.arange(0, D)
    tl.store(lse, tl.sum(tl.load(q + columns).to(tl.float32) * tl.load(k + columns).to(tl.float32), 0))


@compiles
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_products_fused_into_a_sum_over_lanes_are_seen(arch: int) -> None:
    assert _fused_exchanges(_compile(products_kernel, arch, {"D": 32, "num_warps": 1}))


@compiles
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tiles", ["span", "table"])
def test_hopper(head_dim: int, tiles: str) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = triton_hopper.prefill_kernel
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    constants = {"TILES": tiles, "STAGES": triton_hopper.STAGES}
    signature = {}
    for name in kernel.arg_names:
        rows = 64 if name in ("q_desc", "out_desc") else triton_hopper.TILE
        box = f"tensordesc<bf16[1,1,{rows},{head_dim}],{layout!r}>"
        signature[name] = box if name.endswith("_desc") else "constexpr" if name in constants else _type(name, "bf16")
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, constexprs=constants)
    _check(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}), 90)


@compiles
@pytest.mark.parametrize("variant", [("hopper", "bfloat16", 128, 0), ("portable", "float16", 64, 64)])
def test_exported(variant: tuple[str, str, int, int]) -> None:
    """What an export would write now is launched as the manifest says; the code differs with Triton's version."""
    from cuda_reference import export_ptx
    from flux_mlx import cuda_catalog

    record, _ = export_ptx.export(*variant)
    assert record in cuda_catalog.compiled_kernels()
