"""Calls for an NVIDIA GPU: compiles MLX's texts with nvcc and writes the binaries and a list of the launches.

`python -m parity_tests.host_shim.cuda.cases FOLDER [--arch sm_90]`; `run.py FOLDER` beside this needs numpy and CuPy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux_mlx import kernels, spec
from flux_mlx.spec import PatternConfig, Route
from metal_kernels import operations
from metal_kernels.catalog import KERNELS, Launch
from parity_tests.host_shim import text
from parity_tests.host_shim.run import as_array, dtype_name

HERE = Path(__file__).parent
STREAMING = PatternConfig()
SMALL = PatternConfig(block_size=48, sink_tokens=40, window_tokens=90)
XATTENTION = PatternConfig(name="xattention", block_size=64, stride=16)
LONG = 65536
DENSE, TOKENS_FIRST, CHANNELS_APART = (0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 2, 1)  # orders of the axes in memory

# name, (B, HQ, HKV, L, S, D), dtype, pattern (None: full), kind, and if need be the order of the axes in memory, splits
ATTENTION = (
    ("full", (1, 2, 1, 100, 333, 64), "float32", None, "prefill"),
    ("streaming", (2, 4, 2, 100, 333, 80), "float16", SMALL, "prefill"),
    ("streaming", (1, 3, 1, 70, 401, 128), "bfloat16", SMALL, "prefill"),
    ("streaming", (1, 2, 2, 45, 400, 256), "float32", SMALL, "prefill"),
    ("table", (1, 2, 1, 150, 333, 96), "float16", SMALL, "table"),
    ("full decode", (2, 8, 2, 1, 1000, 128), "float16", None, "decode"),
    ("streaming decode", (1, 6, 2, 5, 1000, 80), "bfloat16", SMALL, "decode"),
    ("full decode in pieces", (2, 6, 2, 3, 1000, 80), "float32", None, "decode", DENSE, 5),
    ("streaming, tokens first", (2, 4, 2, 100, 333, 80), "float16", SMALL, "prefill", TOKENS_FIRST),
    ("full, channels apart", (2, 3, 1, 100, 333, 64), "bfloat16", None, "prefill", CHANNELS_APART),
    ("streaming decode, channels apart", (1, 6, 2, 5, 1000, 80), "float16", SMALL, "decode", CHANNELS_APART),
    ("full 64K", (1, 2, 1, LONG, LONG, 64), "float16", None, "prefill"),
    ("streaming 64K", (1, 4, 2, LONG, LONG, 128), "bfloat16", STREAMING, "prefill"),
    ("streaming 64K", (1, 2, 1, LONG, LONG, 64), "float32", STREAMING, "prefill"),
    ("table 64K", (1, 2, 1, LONG, LONG, 128), "float16", STREAMING, "table"),
    ("full decode 64K", (1, 32, 8, 1, LONG, 128), "float16", None, "decode"),
    ("streaming decode 64K", (1, 32, 8, 4, LONG, 128), "bfloat16", STREAMING, "decode"),
)

# (B, L, HQ, D), dtype, pooled tokens
ROUTERS = (((3, 230, 5, 128), "bfloat16", 100), ((2, 9, 4, 80), "float16", 100), ((1, LONG, 8, 64), "float32", 100))
# (B, HQ, HKV, L, S, D), dtype
MASSES = (
    ((2, 4, 2, 150, 333, 80), "bfloat16"),
    ((1, 2, 1, 333, 333, 128), "float16"),
    ((1, 2, 1, 4096, 4096, 128), "float16"),
    ((1, 1, 1, LONG, LONG, 64), "float16"),
)


def cuda_text(generated: str) -> str:
    """MLX's text as CUDA C++ with one entry point, `flux_entry`, whose arguments are the buffers in order."""
    sign = text.signature(generated)
    arguments = [f"{'*' if b.is_reference else ''}({b.pointer})b{i}" for i, b in enumerate(sign.buffers)]
    arguments += [f"attribute::{name}()" for name in sign.attributes]
    parameters = ", ".join(f"void* b{i}" for i in range(len(sign.buffers)))
    call = f"{sign.name}{sign.template}({', '.join(arguments)});"
    body = text.rewritten(generated).replace("[[kernel]] void", "METAL_FUNC void")
    body = re.sub(r"\s*\[\[[^\]]*\]\]", "", body)
    entry = f'extern "C" __global__ void flux_entry({parameters}) {{\n  {call}\n}}'
    plain = re.sub(r"\b(device|constant|threadgroup|thread)\b", "", f"{body}\n{entry}\n")  # macros would hit __device__
    return f'#include "metal_on_cuda.h"\n{plain}'


class Recorder:
    """A launcher that writes down launches instead of running them. Arrays carry shapes only."""

    def __init__(self, compile_text: Callable[[str], str]) -> None:
        self.compile = compile_text
        self.steps: list[dict[str, Any]] = []

    def __call__(self, launch: Launch, inputs: list[Any]) -> list[mx.array]:
        arrays = [as_array(value) for value in inputs]
        kinds = [(tuple(a.shape), dtype_name(a)) for a in arrays]
        generated = text.generated_text(launch, kinds)
        names = [b.name for b in text.signature(generated).buffers]
        literal = {
            name: value
            for name, value in zip(launch.spec.inputs, inputs, strict=True)
            if isinstance(value, (int, float, tuple))
        }
        self.steps.append(
            {
                "kernel": launch.spec.name,
                "binary": self.compile(cuda_text(generated)),
                "buffers": names,
                "inputs": list(launch.spec.inputs),
                "shapes": dict(zip(launch.spec.inputs, kinds, strict=True)),
                "literal": literal,
                "outputs": list(zip(launch.spec.outputs, launch.output_shapes, launch.output_dtypes, strict=True)),
                "groups": [g // t for g, t in zip(launch.grid, launch.threadgroup, strict=True)],
                "threads": launch.threadgroup[0],
            }
        )
        return [mx.zeros(s, getattr(mx, d)) for s, d in zip(launch.output_shapes, launch.output_dtypes, strict=True)]


class Compiler:
    """nvcc: text to the name of a binary in `folder`."""

    def __init__(self, folder: Path, arch: str) -> None:
        self.folder, self.arch = folder, arch

    def __call__(self, source: str) -> str:
        name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.cubin"
        if not (self.folder / name).exists():
            kernel = self.folder / "kernel.cu"
            kernel.write_text(source)
            command = [
                "nvcc",
                "-std=c++17",
                f"-arch={self.arch}",
                f"-I{HERE}",
                f"-I{HERE.parent}/include",
                "-lineinfo",
                "-w",
            ]
            subprocess.run([*command, "-cubin", "-o", str(self.folder / name), str(kernel)], check=True)
        return name


def attention_case(
    compile_text: Callable[[str], str],
    name: str,
    sizes: tuple[int, ...],
    dtype: str,
    pattern: PatternConfig | None,
    kind: str,
    axes: tuple[int, ...] = DENSE,
    splits: int | None = None,
) -> dict:
    """One attention call: its launches, and what the oracle needs."""
    batch, q_heads, kv_heads, q_tokens, kv_tokens, head_dim = sizes
    recorder = Recorder(compile_text)
    q = mx.zeros((batch, q_heads, q_tokens, head_dim), getattr(mx, dtype))
    k = mx.zeros((batch, kv_heads, kv_tokens, head_dim), getattr(mx, dtype))
    table: list[Any] = []
    if kind == "table":
        kept = spec.kept_blocks(pattern, q_tokens, kv_tokens)[None, None]
        made = spec.block_table(pattern.block_size, kept, q_tokens, kv_tokens)
        table = [made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices]
        kernels.table_attention(q, k, k, made, run=recorder)
    else:
        route = (int(Route.FULL if pattern is None else Route.SPARSE),) * batch
        rule = operations.FULL_RULE if pattern is None else kernels.rule_of(pattern, None)
        options = {"dtype": dtype, "route": route, "rule": rule, "scale": head_dim**-0.5, "splits": splits}
        operations.attention(recorder, q, k, k, **options)
    words = None if pattern is None else [pattern.block_size, pattern.sink_blocks, pattern.window_blocks]
    return {
        "name": f"{name} {dtype} D {head_dim}",
        "kind": "attention",
        "dtype": dtype,
        "sizes": sizes,
        "axes": axes,
        "rule": words,
        "table": {"block_size": pattern.block_size, "kept": "streaming"} if table else None,
        "steps": recorder.steps,
    }


def router_case(compile_text: Callable[[str], str], shape: tuple[int, ...], dtype: str, pool_tokens: int) -> dict:
    """One layer's router: pool, then decide."""
    recorder = Recorder(compile_text)
    shapes = spec.RouterConfig.parameter_shapes(shape[3])
    weights = {name: mx.zeros(size, getattr(mx, dtype)) for name, size in shapes.items()}
    kernels.route_layer(mx.zeros(shape, getattr(mx, dtype)), weights, pool_tokens, run=recorder)
    case = {"name": f"router {dtype} D {shape[3]}", "kind": "router", "dtype": dtype, "sizes": shape}
    return case | {"pool_tokens": pool_tokens, "steps": recorder.steps}


def mass_case(compile_text: Callable[[str], str], sizes: tuple[int, ...], dtype: str) -> dict:
    """XAttention's block mass."""
    batch, q_heads, kv_heads, q_tokens, kv_tokens, head_dim = sizes
    recorder = Recorder(compile_text)
    q = mx.zeros((batch, q_heads, q_tokens, head_dim), getattr(mx, dtype))
    k = mx.zeros((batch, kv_heads, kv_tokens, head_dim), getattr(mx, dtype))
    kernels.block_mass(q, k, XATTENTION, run=recorder)
    case = {
        "name": f"block mass of {kv_tokens} {dtype} D {head_dim}",
        "kind": "mass",
        "dtype": dtype,
        "sizes": sizes,
        "axes": DENSE,
    }
    return case | {"blocks": [XATTENTION.block_size, XATTENTION.stride], "steps": recorder.steps}


def all_cases(compile_text: Callable[[str], str], most_tokens: int = LONG) -> dict[str, Any]:
    """What cases.json holds: every kernel of the catalogue by name, and the calls of up to `most_tokens` keys."""
    cases = [attention_case(compile_text, *case) for case in ATTENTION if case[1][4] <= most_tokens]
    cases += [router_case(compile_text, *case) for case in ROUTERS if case[0][1] <= most_tokens]
    cases += [mass_case(compile_text, *case) for case in MASSES if case[0][4] <= most_tokens]
    return {"kernels": sorted(KERNELS), "cases": cases}


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    compiler = Compiler(options.folder, options.arch)
    (options.folder / "cases.json").write_text(json.dumps(all_cases(compiler), indent=1))


if __name__ == "__main__":
    main()
