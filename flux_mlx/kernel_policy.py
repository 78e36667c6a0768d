"""When our kernels are used: on a Metal or CUDA device, after a self-test, where they should win; else MLX operations.

The router's are used wherever they compute: operations take eight times as many launches.

A variant of a kernel (operation, dtype, head dim, rows) is compared with the specification at its first use
(`flux_mlx.kernel_self_test`). A mismatch, a failed compile or a failed load means operations from then on, one warning,
and a count in `flux_mlx.doctor`. FLUX_MLX_KERNELS=off leaves every call that names no `impl` to operations.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux_mlx import cuda_catalog, cuda_kernels, cuda_router, kernels
from flux_mlx.environment import kernels_are_on
from flux_mlx.kernel_self_test import Variant, self_test
from flux_mlx.spec import PatternConfig
from metal_kernels import catalog, launches

OPERATIONS = ("prefill", "decode", "blocks")
TENSOR_UNIT_GENERATION = 17  # applegpu_g17: M5, whose stock prefill runs on tensor units
_LONGEST_TEST_TOKENS = 8192  # of a self-test with the call's own window


class Record:
    """Verdicts and counts of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.verdicts: dict[Variant, str] = {}  # "" is passed, else the reason
        self.calls: Counter[str] = Counter()
        self.switched_off: set[str] = set()  # operations that kernels are not to take


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


def cuda_variant_of(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None, backend: str = "cuda"
) -> Variant | None:
    """The CUDA variant that a sparse call needs; None if no kernel of `backend` takes it on this GPU."""
    if cuda_kernels.refusal(q, k, v, pattern, prompt_tokens, cuda_kernels.FAMILIES[backend]):
        return None
    operation = "decode" if q.shape[2] <= cuda_catalog.DECODE_TOKENS else "prefill"
    return _cuda_variant(operation, kernels.dtype_name(q), q.shape[3], backend, pattern)


@cache
def _cuda_variant(operation: str, dtype: str, head_dim: int, backend: str, pattern: PatternConfig) -> Variant:
    """The variant of prefill, or of decode: its self-test has the call's own window unless that is long."""
    block = pattern.block_size
    small = PatternConfig(block_size=block, sink_tokens=block, window_tokens=2 * block)
    if operation == "prefill":
        return Variant(operation, dtype, head_dim, backend=backend, pattern=small)
    is_short = pattern.sink_span + pattern.window_span <= _LONGEST_TEST_TOKENS
    own = PatternConfig(block_size=block, sink_tokens=pattern.sink_span, window_tokens=pattern.window_span)
    return Variant(operation, dtype, head_dim, backend=backend, pattern=own if is_short else small)


def choose(q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None = None) -> str:
    """Which `impl` a sparse call without a named one takes. Full attention stays stock.

    Shapes as in `kernels.sparse_attention`.
    """
    if use_metal(q, k, v, pattern, prompt_tokens):
        return "metal"
    return _cuda_choice(q, k, v, pattern, prompt_tokens) if cuda_kernels.is_available() else "ops"


def choose_undecided(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None, kv_tokens: int
) -> str:
    """Which `impl` takes a prompt's call whose route only the device knows; "ops": the host has to read it.

    Hopper's kernel and decode's compute full attention as fast as stock's do, so a call goes to them wherever a sparse
    one would. The portable kernel does not: full attention by it takes up to 1.6 times as long.

    Args:
        q: `[1, HQ, L, D]`.
        k: `[1, HKV, L, D]`, the new keys.
        v: As k.
        pattern: Of the layer.
        prompt_tokens: Length of the whole prompt in exact prefill; None in chunked calls.
        kv_tokens: Keys that are held, in exact prefill those of its end: all its calls go the same way.
    """
    if not cuda_kernels.is_available() or not _may_use_kernels():
        return "ops"
    family = "decode" if q.shape[2] <= cuda_catalog.DECODE_TOKENS else "hopper"
    dtype, where = kernels.dtype_name(q), cuda_kernels.device()
    if cuda_catalog.find(dtype, q.shape[3], pattern.block_size, where, family) is None:
        _decline("no kernel as fast as stock's full attention")
        return "ops"
    return "cuda" if _trusts(cuda_variant_of(q, k, v, pattern, prompt_tokens), pattern, kv_tokens) else "ops"


def _cuda_choice(q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None) -> str:
    """ "cuda"; "cuda-portable" if prefill's fastest kernel is wrong on this GPU and the other is not; else "ops"."""
    if not _may_use_kernels():
        return "ops"
    variant = cuda_variant_of(q, k, v, pattern, prompt_tokens)
    if variant is not None and variant.operation == "prefill" and expects_to_win("prefill", pattern, k.shape[2]):
        kernel = cuda_catalog.find(variant.dtype, variant.head_dim, pattern.block_size, cuda_kernels.device())
        if kernel.family != "portable" and verdict(variant):
            variant = cuda_variant_of(q, k, v, pattern, prompt_tokens, "cuda-portable") or variant
    return variant.backend if _trusts(variant, pattern, k.shape[2]) else "ops"


def use_cuda_router(dtype: str, head_dim: int) -> bool:
    """Whether the layer router goes to the CUDA kernels, for queries or pooled rows of this dtype and head dim."""
    if not cuda_kernels.is_available() or not _may_use_kernels():
        return False
    if "router" in RECORD.switched_off:
        return _decline("router switched off")
    variant = router_variant(dtype, head_dim)
    if variant is None:
        return _decline("unsupported dtype or head dim")
    if verdict(variant):
        return _decline("self-test failed")
    RECORD.calls[variant.backend] += 1
    return True


def router_variant(dtype: str, head_dim: int) -> Variant | None:
    """The variant of a router; None if no kernel takes its queries on this GPU."""
    return None if cuda_router.refusal(dtype, head_dim) else Variant("router", dtype, head_dim, backend="cuda")


@contextmanager
def without(operation: str) -> Iterator[None]:
    """Within it `operation` ("router") is left to MLX operations: to compare the two."""
    RECORD.switched_off.add(operation)
    try:
        yield
    finally:
        RECORD.switched_off.discard(operation)


def use_metal(q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None = None) -> bool:
    """Whether a sparse call without a named `impl` should go to the Metal kernels."""
    if not kernels.is_available() or not _may_use_kernels():
        return False
    return _trusts(variant_of(q, k, v, pattern, prompt_tokens), pattern, k.shape[2])


def _may_use_kernels() -> bool:
    """Whether kernels may compute here, whatever the call is; counted if not."""
    if not kernels_are_on():
        return _decline("FLUX_MLX_KERNELS is off")
    return mx.default_device().type == mx.gpu or _decline("the default device is not the GPU")


def _trusts(variant: Variant | None, pattern: PatternConfig, kv_tokens: int) -> bool:
    """Whether a call goes to its variant; counted either way."""
    if variant is None:
        return _decline("unsupported dtype or head dim")
    if not expects_to_win(variant.operation, pattern, kv_tokens):
        return _decline("operations should be faster")
    if verdict(variant):
        return _decline("self-test failed")
    RECORD.calls[variant.backend] += 1
    return True


def _decline(reason: str) -> bool:
    RECORD.calls[f"ops: {reason}"] += 1
    return False


def expects_to_win(operation: str, pattern: PatternConfig, kv_tokens: int) -> bool:
    """Whether the kernel should beat the composition of stock calls: by calibration, else by arithmetic.

    A dense call is always stock's. By arithmetic (metal_kernels/README.md): decode in place saves the copy of sink and
    window; gathered blocks always lose; streaming prefill wins but where stock attention has Apple's tensor units.
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
    return mx.device_info(mx.gpu) if kernels.is_available() or cuda_kernels.is_available() else mx.device_info()


@cache
def gpu_generation() -> int:
    """13 for M1, 14 for M2, ... from the device's architecture name (applegpu_g13s); 0 if it has another form."""
    name = str(gpu_info().get("architecture", ""))
    digits = "".join(c for c in name.partition("applegpu_g")[2] if c.isdigit())
    return int(digits) if digits else 0


def verdict(variant: Variant, run: Any = None) -> str:
    """ "" if the variant passed its self-test, else the reason. Tested once; a failure warns once."""
    with RECORD.lock:
        if variant not in RECORD.verdicts:
            reason = self_test(variant, run)
            mx.clear_cache()  # of buffers that the host has read: kernels would get them next
            RECORD.verdicts[variant] = reason
            if reason:
                warnings.warn(
                    f"The {variant.backend} kernel {variant} is not used: {reason}. MLX operations compute instead; "
                    "`python -m flux_mlx.doctor` tells more.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return RECORD.verdicts[variant]


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
            {
                "backend": v.backend,
                "operation": v.operation,
                "dtype": v.dtype,
                "head_dim": v.head_dim,
                "rows": v.rows,
                "problem": problem,
            }
            for v, problem in RECORD.verdicts.items()
        ],
        "calls": dict(RECORD.calls),
        "calibration": calibration(),
    }
