"""`flux_mlx.doctor`: what this machine runs, whether it runs right, and how fast; a report to paste into an issue."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flux_mlx import attention, cuda_catalog, cuda_kernels, kernel_policy, kernels, spec
from flux_mlx.environment import VARIABLES, check_environment, kernels_are_on
from flux_mlx.kernel_policy import Variant
from flux_mlx.spec import PatternConfig
from metal_kernels import catalog

PATTERN = PatternConfig()
LENGTHS_TOKENS = (1024, 4096, 16384, 32768)
CPU_LENGTHS_TOKENS = (256, 1024)
SHAPE = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
CPU_SHAPE = {"q_heads": 4, "kv_heads": 2, "head_dim": 64}
MARGIN = 0.05  # by how much the kernel must be faster to be chosen
_REPEATS = 5
_CALLS = 50  # most calls of one evaluation: a single short call measures its launch
_EVALUATION_S = 0.1  # how long one should take


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that matter."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("flux-mlx", "mlx", "mlx-lm", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def backend() -> str:
    """Which of our kernels could run here: "metal", "cuda" or "" for none."""
    return "metal" if kernels.is_available() else "cuda" if cuda_kernels.is_available() else ""


def device() -> dict[str, Any]:
    """MLX's device, and which of our kernels could run on it."""
    info = {key: value for key, value in kernel_policy.gpu_info().items() if isinstance(value, (str, int))}
    switch = "on" if kernels_are_on() else "off"
    return {"kernels": backend() or "none", "FLUX_MLX_KERNELS": switch, "default": str(mx.default_device()), **info}


def all_variants() -> list[Variant]:
    """Every kernel variant that the policy can choose on this backend (Metal's where there is none)."""
    if backend() == "cuda":
        return _cuda_variants()
    sizes = [(dtype, head_dim) for dtype in catalog.DTYPES for head_dim in catalog.HEAD_DIMS]
    variants = [Variant(operation, *size) for operation in ("prefill", "blocks") for size in sizes]
    return variants + [Variant("decode", *size, rows) for size in sizes for rows in (1, 2, 4)]


def _cuda_variants() -> list[Variant]:
    """The block sizes that prefill is compiled for here, decode of the default pattern, and the router."""
    blocks = {kernel.block_size or 128 for kernel in cuda_catalog.compiled_kernels()}
    variants = []
    for dtype in cuda_catalog.DTYPES:
        for head_dim in cuda_catalog.HEAD_DIMS:
            q, k = (mx.zeros((1, heads, 64, head_dim), getattr(mx, dtype)) for heads in (8, 1))
            calls = [(q, PatternConfig(block_size=block)) for block in sorted(blocks)]
            calls.append((q[:, :, :1], PATTERN))
            variants += [kernel_policy.cuda_variant_of(x, k, k, pattern, None) for x, pattern in calls]
    sizes = [(dtype, head_dim) for dtype in cuda_catalog.ROUTER_DTYPES for head_dim in catalog.HEAD_DIMS]
    variants += [kernel_policy.router_variant(*size) for size in sizes]
    return [variant for variant in variants if variant is not None]


def operations_tolerance() -> float:
    """Largest error of the float32 checks: matrix units that round float32 to TF32 keep 11 bits of it.

    MLX uses them on M5 and later unless MLX_ENABLE_TF32 is 0.
    """
    has_tf32 = kernels.is_available() and kernel_policy.gpu_generation() >= kernel_policy.TENSOR_UNIT_GENERATION
    return 2e-2 if has_tf32 and os.environ.get("MLX_ENABLE_TF32", "1") != "0" else 1e-4


def check_operations() -> list[dict[str, Any]]:
    """The MLX operations against the specification on small cases: name and largest error of each."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, n, 64)).astype(np.float32) for heads, n in ((4, 50), (2, 90), (2, 90)))
    arrays = [mx.array(x) for x in (q, k, v)]
    results = [("full", attention.full_attention(*arrays, impl="ops"), spec.full_attention(q, k, v)[0])]
    for name in ("streaming", "triangle", "xattention"):
        pattern = PatternConfig(name, block_size=16, sink_tokens=16, window_tokens=32, last_tokens=9, stride=8)
        out = attention.sparse_attention(*arrays, pattern, prompt_tokens=90, impl="ops")
        results.append((name, out, spec.sparse_attention(q, k, v, pattern, prompt_tokens=90)[0]))
    return [{"check": name, "error": float(np.abs(np.array(out) - oracle).max())} for name, out, oracle in results]


def _milliseconds(call: Callable[[], Any]) -> float:
    """Time of a call: median of a few evaluations of several independent calls each, after a warm-up."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        mx.eval([call() for _ in range(calls)])
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = max(1, min(_CALLS, int(_EVALUATION_S / seconds(1))))
    return round(1e3 * float(np.median([seconds(calls) for _ in range(_REPEATS)])), 4)


def _note(text: str) -> None:
    """Progress, to stderr: compiling and timing take minutes."""
    sys.stderr.write(f"doctor: {text}\n")


def _tensors(q_tokens: int, kv_tokens: int) -> list[mx.array]:
    shape, dtype = (SHAPE, mx.float16) if backend() else (CPU_SHAPE, mx.float32)
    heads = (shape["q_heads"], q_tokens), (shape["kv_heads"], kv_tokens), (shape["kv_heads"], kv_tokens)
    arrays = [mx.random.normal((1, h, n, shape["head_dim"])).astype(dtype) for h, n in heads]
    mx.eval(arrays)
    return arrays


def _benchmark_row(operation: str, kv_tokens: int) -> dict[str, Any]:
    _note(f"timing {operation} over {kv_tokens} keys")
    q, k, v = _tensors(kv_tokens if operation == "prefill" else 1, kv_tokens)
    name = backend()
    variant_of = kernel_policy.cuda_variant_of if name == "cuda" else kernel_policy.variant_of
    variant = variant_of(q, k, v, PATTERN, None) if name else None
    usable = variant is not None and not kernel_policy.verdict(variant)
    attend = (cuda_kernels if name == "cuda" else kernels).sparse_attention
    return {
        "operation": operation,
        "kv_tokens": kv_tokens,
        "default": kernel_policy.choose(q, k, v, PATTERN),
        "full_ms": _milliseconds(lambda: attention.full_attention(q, k, v, impl="ops")),
        "ops_ms": _milliseconds(lambda: attention.sparse_attention(q, k, v, PATTERN, impl="ops")),
        "kernel_ms": _milliseconds(lambda: attend(q, k, v, PATTERN)[0]) if usable else None,
    }


def benchmark(lengths_tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Milliseconds of one attention call: full, sparse by operations, sparse by our kernel (None without one); and what
    a sparse call without `impl` takes.
    """
    return [_benchmark_row(operation, n) for operation in ("prefill", "decode") for n in lengths_tokens]


def choose(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """From which length on each operation's kernel wins by MARGIN in every row of a benchmark; None: never."""
    choice: dict[str, int | None] = {}
    for operation in ("prefill", "decode"):
        shortest = None
        for row in sorted((r for r in rows if r["operation"] == operation), key=lambda r: -r["kv_tokens"]):
            if row["kernel_ms"] is None or row["kernel_ms"] >= (1 - MARGIN) * row["ops_ms"]:
                break
            shortest = row["kv_tokens"]
        choice[operation] = shortest
    return choice


def examine(lengths_tokens: tuple[int, ...]) -> dict[str, Any]:
    """The whole report as JSON values."""
    if backend():
        _note(f"compiling and checking {len(all_variants())} kernel variants")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel_policy.report(all_variants)
    rows = benchmark(lengths_tokens)
    return {
        "versions": versions(),
        "device": device(),
        "operations": check_operations(),
        "kernels": kernel_policy.report(),
        "benchmark": rows,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["flux_mlx doctor", ""]
    lines += [f"{name:10} {value}" for name, value in report["versions"].items()]
    lines += ["", *(f"{name:34} {value}" for name, value in report["device"].items()), ""]
    lines += [f"operations, {row['check']:11} error {row['error']:.2g}" for row in report["operations"]]
    variants = report["kernels"]["variants"]
    if report["device"]["kernels"] == "none":
        lines.append("kernels: neither Metal nor CUDA is available, so none was run")
    else:
        broken = [v for v in variants if v["problem"]]
        lines.append(f"kernels: {len(variants) - len(broken)} of {len(variants)} variants agree with the specification")
        lines += [f"  {v['operation']} {v['dtype']} D {v['head_dim']}: {v['problem']}" for v in broken]
    lines += [f"calls, {name}: {n}" for name, n in report["kernels"]["calls"].items()]
    lines += [f"calibration: {report['kernels']['calibration'] or 'none'}", ""]
    lines.append("ms a call     keys     full      ops   kernel  default")
    for row in report["benchmark"]:
        cells = (row[key] for key in ("full_ms", "ops_ms", "kernel_ms"))
        shown = " ".join("       -" if ms is None else f"{ms:8.3f}" for ms in cells)
        lines.append(f"{row['operation']:9} {row['kv_tokens']:8} {shown}  {row['default']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command `flux_mlx.doctor`. Exit code 1 if a kernel or an operation is wrong."""
    variables = "\n".join(f"  {name}\n      {text}" for name, text in VARIABLES.items())
    parser = argparse.ArgumentParser(
        prog="flux_mlx.doctor",
        description=__doc__,
        epilog=f"variables of the environment that every command reads:\n{variables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")
    parser.add_argument("--calibrate", action="store_true", help="write down from which lengths the kernels win")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="lengths of the benchmark")
    options = parser.parse_args(arguments)
    try:
        check_environment()
    except ValueError as error:
        parser.error(str(error))
    if options.lengths and min(options.lengths) < 1:
        parser.error(f"--lengths: expected 1 or more, got {min(options.lengths)}.")
    if options.calibrate and not backend():
        parser.error("--calibrate needs a Metal or CUDA device, and MLX has none here.")
    lengths = tuple(options.lengths or (LENGTHS_TOKENS if backend() else CPU_LENGTHS_TOKENS))
    report = examine(lengths)
    if options.calibrate:
        path = kernel_policy.write_calibration(choose(report["benchmark"]))
        report["kernels"]["calibration"] = kernel_policy.calibration()
        sys.stderr.write(f"calibration written to {path}\n")
    sys.stdout.write(as_text(report) + "\n")
    if options.json:
        partial = options.json.with_name(options.json.name + ".part")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(options.json)
    wrong = [row for row in report["operations"] if not row["error"] < operations_tolerance()]
    return 1 if wrong or any(v["problem"] for v in report["kernels"]["variants"]) else 0


if __name__ == "__main__":
    sys.exit(main())
