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
from flux_mlx import spec  # noqa: E402
from flux_mlx.spec import PatternConfig, RouterConfig, visible  # noqa: E402

ITEM = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}
TOLERANCE = {"float32": 3e-5, "float16": 3e-3, "bfloat16": 2e-2}
MASS_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 1e-4
NEAR_TIE = 1e-4  # margins of logits below this decide either way
SAMPLED_ROWS = 48
SMALL_TOKENS = 2000  # longest call of --small
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


def strides_of(shape: list[int], axes: list[int] | None = None) -> list[int]:
    """Strides in elements of an array whose axes lie in memory in the order `axes`."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(axes or range(len(shape))):
        strides[axis] = step
        step *= shape[axis]
    return strides


def launch(
    folder: Path, step: dict[str, Any], given: dict[str, cp.ndarray], axes: list[int] | None = None
) -> list[tuple[cp.ndarray, str]]:
    """Run one launch; outputs start as NaN. `axes`: of q, k and v. Returns (array, dtype) of each output."""
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
        strides = strides_of(shape, axes if array in ("q", "k", "v") else None)
        arrays[f"{array}_strides"] = cp.asarray(np.array(strides, np.int64))
    _MODULES[name](tuple(step["groups"]), (step["threads"],), tuple(arrays[buffer] for buffer in step["buffers"]))
    return outputs


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` as float32 values that `dtype` has."""
    return to_numpy(to_device(x, dtype), dtype)


def inputs_of(case: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, cp.ndarray]]:
    """q, k, v of a case: as float32 values of its dtype, and on the device, their axes in the case's order."""
    batch, q_heads, kv_heads, q_tokens, kv_tokens, head_dim = case["sizes"]
    rng = np.random.default_rng(kv_tokens)
    shapes = {"q": (batch, q_heads, q_tokens, head_dim)} | dict.fromkeys("kv", (batch, kv_heads, kv_tokens, head_dim))
    host = {n: rounded(rng.standard_normal(s, np.float32), case["dtype"]) for n, s in shapes.items()}
    return host, {n: to_device(x.transpose(case["axes"]), case["dtype"]) for n, x in host.items()}


def table_of(case: dict[str, Any]) -> dict[str, cp.ndarray]:
    """The streaming rule as the block table's four arrays."""
    pattern, _, _ = pattern_of(case)
    q_tokens, kv_tokens = case["sizes"][3:5]
    kept = spec.kept_blocks(pattern, q_tokens, kv_tokens)[None, None]
    table = spec.block_table(pattern.block_size, kept, q_tokens, kv_tokens)
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
        results = launch(folder, step, arrays, case["axes"])
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
    expected = spec.block_mass(host["q"], host["k"], *case["blocks"])
    return float(np.nan_to_num(np.abs(to_numpy(mass, dtype) - expected), nan=np.inf).max())


def router_error(folder: Path, case: dict[str, Any]) -> float:
    """Largest error of the logits; infinite if a decision is another than the specification's."""
    rng = np.random.default_rng(case["sizes"][1])
    queries = rounded(rng.standard_normal(case["sizes"], np.float32) + 0.3, case["dtype"])
    shapes = RouterConfig.parameter_shapes(case["sizes"][3])
    weights = {n: rounded(rng.uniform(-0.3, 0.3, s).astype(np.float32), case["dtype"]) for n, s in shapes.items()}
    pool, decide = case["steps"]
    ((sums, _),) = launch(folder, pool, {"queries": to_device(queries, case["dtype"])})
    arrays = {name.replace(".", "_"): to_device(w, case["dtype"]) for name, w in weights.items()}
    (logits, dtype), (route, _) = launch(folder, decide, arrays | {"sums": sums})
    expected = spec.route_logits(weights, spec.pool_queries(queries, case["pool_tokens"]))
    margins = np.abs(expected[:, 1] - expected[:, 0])
    wrong = (cp.asnumpy(route) != np.array(spec.decide(expected), np.int32)) & (margins >= NEAR_TIE)
    errors = np.abs(to_numpy(logits, dtype) - expected) / np.maximum(1.0, np.abs(expected))
    return float("inf") if wrong.any() else float(np.nan_to_num(errors, nan=np.inf).max())


CHECKS = {"attention": attention_error, "mass": mass_error, "router": router_error}


def check(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Run one case: its row of the report."""
    allowed = {"mass": MASS_TOLERANCE, "router": LOGIT_TOLERANCE}.get(case["kind"], TOLERANCE[case["dtype"]])
    error = CHECKS[case["kind"]](folder, case)
    names = [step["kernel"] for step in case["steps"]]
    row = {"case": case["name"], "sizes": case["sizes"], "kernels": names, "error": error, "allowed": allowed}
    return row | {"ok": bool(error <= allowed)}


def tokens_of(case: dict[str, Any]) -> int:
    """The longest axis of a case: keys, or the prompt of a router."""
    return case["sizes"][1 if case["kind"] == "router" else 4]


def main() -> int:
    """Exit code 1 if a case is wrong or a kernel did not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="short calls only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    written = json.loads((options.folder / "cases.json").read_text())
    for case in written["cases"]:
        if options.small and tokens_of(case) > SMALL_TOKENS:
            continue
        rows.append(check(options.folder, case))
        sys.stdout.write("{case:42} {sizes!s:36} error {error:.2e} allowed {allowed:.0e}\n".format(**rows[-1]))
        sys.stdout.flush()
    missing = sorted(set(written["kernels"]) - {name for row in rows for name in row["kernels"]})
    if missing:
        sys.stdout.write(f"kernels that did not run: {missing}\n")
    if options.json:
        device = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
        options.json.write_text(json.dumps({"device": device, "cases": rows}, indent=1) + "\n")
    return int(bool(missing) or not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
