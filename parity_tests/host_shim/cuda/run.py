"""Runs the calls of `cases.py` on an NVIDIA GPU and compares them with float64, row by row.

`python parity_tests/host_shim/cuda/run.py FOLDER [--small] [--json OUT]`; under compute-sanitizer with --small. Needs
numpy and CuPy. Long calls are checked on sampled query rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))
from flux_mlx.spec import BlockTable, PatternConfig, block_mass, block_table, kept_blocks, visible  # noqa: E402

ITEM = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}
TOLERANCE = {"float32": 3e-5, "float16": 3e-3, "bfloat16": 2e-2}
SAMPLED_ROWS = 48
_MODULES: dict[str, Any] = {}


def to_device(x: np.ndarray, dtype: str) -> cp.ndarray:
    """Bits of `x` in `dtype` (bfloat16 as uint16, rounded to nearest even)."""
    if dtype != "bfloat16":
        return cp.asarray(np.ascontiguousarray(x, dtype))
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return cp.asarray(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def to_numpy(x: cp.ndarray, dtype: str) -> np.ndarray:
    """Inverse of `to_device`, as float32 or int32."""
    if dtype == "bfloat16":
        return (cp.asnumpy(x).astype(np.uint32) << 16).view(np.float32)
    return cp.asnumpy(x).astype(np.float32)


def launch(folder: Path, step: dict[str, Any], given: dict[str, cp.ndarray]) -> list[tuple[cp.ndarray, str]]:
    """Run one launch; outputs start as NaN. Returns (array, dtype) of each output."""
    name = step["binary"]
    if name not in _MODULES:
        _MODULES[name] = cp.RawModule(path=str(folder / name)).get_function("flux_entry")
    arrays = dict(given)
    for scalar, value in step["literal"].items():
        arrays[scalar] = to_device(np.array(value), step["shapes"][scalar][1])
    outputs = []
    for output, shape, dtype in step["outputs"]:
        raw = cp.full(int(np.prod(shape)) * ITEM[dtype], 0xFF, cp.uint8)
        arrays[output] = raw.view({"bfloat16": cp.uint16}.get(dtype, dtype)).reshape(shape)
        outputs.append((arrays[output], dtype))
    for array, (shape, _) in step["shapes"].items():
        arrays[f"{array}_shape"] = cp.asarray(np.array(shape, np.int32))
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        arrays[f"{array}_strides"] = cp.asarray(np.array(strides, np.int64))
    _MODULES[name](tuple(step["groups"]), (step["threads"],), tuple(arrays[buffer] for buffer in step["buffers"]))
    return outputs


def inputs_of(case: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, cp.ndarray]]:
    """q, k, v of a case: as float32 values of its dtype, and on the device."""
    batch, q_heads, kv_heads, q_tokens, kv_tokens, head_dim = case["sizes"]
    rng = np.random.default_rng(kv_tokens)
    shapes = {"q": (batch, q_heads, q_tokens, head_dim)} | dict.fromkeys("kv", (batch, kv_heads, kv_tokens, head_dim))
    device = {n: to_device(rng.standard_normal(s, np.float32), case["dtype"]) for n, s in shapes.items()}
    return {n: to_numpy(x, case["dtype"]) for n, x in device.items()}, device


def table_of(case: dict[str, Any]) -> dict[str, cp.ndarray]:
    """The streaming rule as the block table's four arrays."""
    pattern, _, _ = pattern_of(case)
    q_tokens, kv_tokens = case["sizes"][3:5]
    kept = kept_blocks(pattern, q_tokens, kv_tokens)[None, None]
    table: BlockTable = block_table(pattern.block_size, kept, q_tokens, kv_tokens)
    parts = (table.kv_num_blocks, table.kv_indices, table.full_kv_num_blocks, table.full_kv_indices)
    names = ("counts", "indices", "full_counts", "full_indices")
    return {name: cp.asarray(part.astype(np.int32)) for name, part in zip(names, parts, strict=True)}


def pattern_of(case: dict[str, Any]) -> tuple[PatternConfig, int, int]:
    """The pattern of a sparse case, with its sink and window blocks."""
    block, sink, window = case["rule"]
    return PatternConfig(block_size=block, sink_tokens=sink * block, window_tokens=window * block), sink, window


def attention_error(folder: Path, case: dict[str, Any]) -> float:
    """Largest error of out and lse over sampled query rows."""
    host, device = inputs_of(case)
    arrays = device | (table_of(case) if case["table"] else {})
    results: list[tuple[cp.ndarray, str]] = []
    for step in case["steps"]:
        if results:
            arrays = {"pieces": results[0][0], "stats": results[1][0]}
        results = launch(folder, step, arrays)
    out, lse = (to_numpy(array, dtype) for array, dtype in results)
    batch, q_heads, kv_heads, q_tokens, kv_tokens, head_dim = case["sizes"]
    rows = np.unique(np.random.default_rng(1).integers(0, q_tokens, SAMPLED_ROWS))
    positions = kv_tokens - q_tokens + rows
    mask = np.arange(kv_tokens)[None, :] <= positions[:, None]
    if case["rule"]:
        mask &= visible(pattern_of(case)[0], positions[:, None], np.arange(kv_tokens)[None, :])
    worst = 0.0
    for b, h in ((b, h) for b in range(batch) for h in range(q_heads)):
        k, v = (host[n][b, h // (q_heads // kv_heads)].astype(np.float64) for n in "kv")
        scores = np.where(mask, host["q"][b, h, rows].astype(np.float64) @ k.T * head_dim**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        expected_lse = (scores.max(-1, keepdims=True) + np.log(total))[:, 0]
        errors = (
            np.abs(out[b, h, rows] - weights @ v / total),
            np.abs(lse.reshape(out.shape[:3])[b, h, rows] - expected_lse),
        )
        worst = max(worst, *(float(np.nan_to_num(e, nan=np.inf).max()) for e in errors))
    return worst if np.isfinite(out).all() else float("inf")


def mass_error(folder: Path, case: dict[str, Any]) -> float:
    """Largest error of the block masses."""
    host, device = inputs_of(case)
    ((mass, dtype),) = launch(folder, case["steps"][0], {n: device[n] for n in "qk"})
    expected = block_mass(host["q"], host["k"], *case["blocks"])
    return float(np.nan_to_num(np.abs(to_numpy(mass, dtype) - expected), nan=np.inf).max())


def main() -> int:
    """Exit code 1 if a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="short calls only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for case in json.loads((options.folder / "cases.json").read_text()):
        if options.small and case["sizes"][4] > 2000:
            continue
        error = (
            attention_error(options.folder, case) if case["kind"] == "attention" else mass_error(options.folder, case)
        )
        allowed = TOLERANCE[case["dtype"]] if case["kind"] == "attention" else 1e-4
        rows.append({"case": case["name"], "sizes": case["sizes"], "error": error, "allowed": allowed})
        sys.stdout.write(f"{case['name']:40} {case['sizes']!s:36} error {error:.2e} allowed {allowed:.0e}\n")
        sys.stdout.flush()
    if options.json:
        device = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
        options.json.write_text(json.dumps({"device": device, "cases": rows}, indent=1) + "\n")
    return int(any(not row["error"] <= row["allowed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
