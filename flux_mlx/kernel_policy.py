"""When the Metal kernels are used: on a Metal device, after a self-test, where they should win; else MLX operations.

A variant of a kernel (operation, dtype, head dim, rows) is compared with the specification on a small case at its first
use; not with stock attention, whose float32 is TF32 on some GPUs. A mismatch or a failed compile means operations from
then on, one warning, and a count in `flux_mlx.doctor`.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flux_mlx import kernels, spec, xattention
from flux_mlx.spec import PatternConfig
from metal_kernels import catalog, launches
from metal_kernels.operations import Run

OPERATIONS = ("prefill", "decode", "blocks")
SELF_TEST_TOLERANCE = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 4e-2}
TENSOR_UNIT_GENERATION = 17  # applegpu_g17: M5, whose stock prefill runs on tensor units
_TEST_KV_TOKENS = 171
_TEST_PATTERN = PatternConfig(block_size=48, sink_tokens=20, window_tokens=40)
_TEST_BLOCKS = PatternConfig(name="xattention", block_size=48, stride=4, threshold=0.6)


@dataclass(frozen=True)
class Variant:
    """What a self-test covers.

    Args:
        operation: "prefill" (streaming or triangle), "decode" (up to 8 queries), "blocks" (xattention's prefill).
        dtype: Dtype name of q, k and v.
        head_dim: D.
        rows: Query rows of a threadgroup that share a KV head (decode; 1 elsewhere).
    """

    operation: str
    dtype: str
    head_dim: int
    rows: int = 1


class Record:
    """Verdicts and counts of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.verdicts: dict[Variant, str] = {}  # "" is passed, else the reason
        self.calls: Counter[str] = Counter()


RECORD = Record()


def variant_of(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None
) -> Variant | None:
    """The variant that a sparse call needs; None if no kernel takes its dtype or head dims."""
    _, heads, q_tokens, head_dim = q.shape
    dtype = kernels.dtype_name(q)
    if k.shape != v.shape:
        return None
    if dtype not in catalog.DTYPES or head_dim not in catalog.HEAD_DIMS:
        return None
    if pattern.name == "xattention" and prompt_tokens is not None:
        return Variant("blocks", dtype, head_dim)
    if q_tokens <= catalog.DECODE_QUERIES:
        return Variant("decode", dtype, head_dim, launches.decode_rows(heads // k.shape[1] * q_tokens))
    return Variant("prefill", dtype, head_dim)


def use_metal(q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None = None) -> bool:
    """Whether a sparse call without a named `impl` should go to the Metal kernels. Full attention stays stock.

    Shapes as in `kernels.sparse_attention`.
    """
    if not kernels.is_available():
        return False
    if mx.default_device().type != mx.gpu:
        return _decline("the default device is not the GPU")
    variant = variant_of(q, k, v, pattern, prompt_tokens)
    if variant is None:
        return _decline("unsupported dtype or head dim")
    if not expects_to_win(variant.operation, pattern, k.shape[2]):
        return _decline("operations should be faster")
    if verdict(variant):
        return _decline("self-test failed")
    RECORD.calls["metal"] += 1
    return True


def _decline(reason: str) -> bool:
    RECORD.calls[f"ops: {reason}"] += 1
    return False


def expects_to_win(operation: str, pattern: PatternConfig, kv_tokens: int) -> bool:
    """Whether the kernel should beat the composition of stock calls: by calibration, else by arithmetic.

    A dense call is always stock's. By arithmetic (metal_kernels/README.md): decode in place saves the copy of sink and
    window; gathered blocks always lose; streaming prefill wins but where stock attention has tensor units.
    """
    if operation != "blocks" and pattern.is_dense(kv_tokens):
        return False
    choice = calibration()
    if operation in choice:
        shortest = choice[operation]
        return shortest is not None and kv_tokens >= shortest
    return operation in ("blocks", "decode") or gpu_generation() < TENSOR_UNIT_GENERATION


def gpu_info() -> dict[str, Any]:
    """What MLX knows of the GPU, whatever the default device is; of the CPU where there is no GPU."""
    return mx.device_info(mx.gpu) if kernels.is_available() else mx.device_info()


@cache
def gpu_generation() -> int:
    """13 for M1, 14 for M2, ... from the device's architecture name (applegpu_g13s); 0 if it has another form."""
    name = str(gpu_info().get("architecture", ""))
    digits = "".join(c for c in name.partition("applegpu_g")[2] if c.isdigit())
    return int(digits) if digits else 0


def verdict(variant: Variant, run: Run = kernels.metal_run) -> str:
    """ "" if the variant passed its self-test, else the reason. Tested once; a failure warns once."""
    with RECORD.lock:
        if variant not in RECORD.verdicts:
            reason = self_test(variant, run)
            RECORD.verdicts[variant] = reason
            if reason:
                warnings.warn(
                    f"The Metal kernel {variant} is not used: {reason}. Stock MLX operations compute instead; "
                    "`python -m flux_mlx.doctor` tells more.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return RECORD.verdicts[variant]


def self_test(variant: Variant, run: Run = kernels.metal_run) -> str:
    """Compare the variant with `flux_mlx.spec` in float64: "" if they agree, else what is wrong."""
    try:
        error = _self_test_error(variant, run)
    except Exception as failure:  # a Metal compiler error is a RuntimeError, but whatever fails here must not pass
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    allowed = SELF_TEST_TOLERANCE[variant.dtype]
    return "" if error <= allowed else f"differs from the specification by {error:.3g}, allowed {allowed:g}"


def _self_test_error(variant: Variant, run: Run) -> float:
    """Largest error of outputs and lse (and block masses) over the kernels of a variant; inf if one is not finite."""
    q, k, v = _self_test_tensors(variant)
    if variant.operation == "blocks":
        prompt = k.shape[2]
        results = [kernels.sparse_attention(q, k, v, _TEST_BLOCKS, prompt_tokens=prompt, run=run)]
        kept = np.array(xattention.select_blocks(q, k, _TEST_BLOCKS))
        mask = spec.expand_blocks(kept, _TEST_BLOCKS.block_size, q.shape[2], prompt)
    else:
        splits = (1, 2) if variant.operation == "decode" else (None,)
        results = [kernels.sparse_attention(q, k, v, _TEST_PATTERN, splits=n, run=run) for n in splits]
        mask = spec.visible_mask(_TEST_PATTERN, q.shape[2], k.shape[2])
    q_, k_, v_ = (np.array(x.astype(mx.float32)) for x in (q, k, v))
    expected = spec.masked_attention(q_, k_, v_, mask, variant.head_dim**-0.5)
    pairs = [pair for result in results for pair in zip(result, expected, strict=True)]
    if variant.operation == "blocks":
        mass = spec.block_mass(q_, k_, _TEST_BLOCKS.block_size, _TEST_BLOCKS.stride)
        pairs.append((kernels.block_mass(q, k, _TEST_BLOCKS, run=run), mass))
    errors = [np.abs(np.array(got.astype(mx.float32)) - want).max() for got, want in pairs]
    return float(max(errors)) if np.isfinite(errors).all() else float("inf")


def _self_test_tensors(variant: Variant) -> list[mx.array]:
    """q, k and v of a case whose tiles and rows have rests; k and v are cut from longer buffers, NaN behind."""
    is_decode = variant.operation == "decode"
    group, q_tokens = {1: (1, 1), 2: (2, 1), 4: (2, 3)}[variant.rows] if is_decode else (2, 41)
    rng, dtype = np.random.default_rng(0), getattr(mx, variant.dtype)

    def draw(heads: int, tokens: int, spare: int) -> mx.array:
        values = np.full((2, heads, tokens + spare, variant.head_dim), np.nan, np.float32)
        values[:, :, :tokens] = rng.standard_normal((2, heads, tokens, variant.head_dim))
        return mx.array(values).astype(dtype)[:, :, :tokens]

    return [draw(group, q_tokens, 0), *(draw(1, _TEST_KV_TOKENS, 19) for _ in range(2))]


def calibration_path() -> Path:
    """The file that `flux_mlx.doctor --calibrate` writes: $FLUX_MLX_CALIBRATION, else in the user's cache folder."""
    default = Path.home() / ".cache" / "flux_mlx" / "calibration.json"
    return Path(os.environ.get("FLUX_MLX_CALIBRATION", default))


def machine() -> dict[str, Any]:
    """What a calibration holds for: device and mlx version."""
    return {"device": gpu_info().get("device_name", "unknown"), "mlx": mx.__version__}


@cache
def calibration() -> dict[str, int | None]:
    """Shortest number of keys from which each operation's kernel won here; None: never. {} if not calibrated.

    A file of another machine or mlx version, or one that cannot be read as such, counts as none.
    """
    try:
        data = json.loads(calibration_path().read_text())
        choice = {name: data["choice"][name] for name in OPERATIONS if name in data["choice"]}
        if data["machine"] != machine() or not all(n is None or isinstance(n, int) for n in choice.values()):
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return choice


def write_calibration(choice: dict[str, int | None]) -> Path:
    """Write what `calibration` reads, through a temporary sibling. Returns the path."""
    path = calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"machine": machine(), "choice": choice}, indent=1) + "\n")
    partial.replace(path)
    calibration.cache_clear()
    return path


def report(variants: Callable[[], list[Variant]] | None = None) -> dict[str, Any]:
    """Verdicts and counts as JSON values; `variants` are tested first."""
    for variant in variants() if variants else ():
        verdict(variant)
    return {
        "variants": [
            {"operation": v.operation, "dtype": v.dtype, "head_dim": v.head_dim, "rows": v.rows, "problem": problem}
            for v, problem in RECORD.verdicts.items()
        ],
        "calls": dict(RECORD.calls),
        "calibration": calibration(),
    }
