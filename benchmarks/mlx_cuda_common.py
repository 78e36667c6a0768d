"""What the benchmarks of the CUDA kernels inside MLX share: their shapes, comparisons with float32, and clocks."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # for the reference; read at the first product

import mlx.core as mx

from flux_mlx import cuda_kernels
from flux_mlx.kernel_self_test import TOLERANCE
from flux_mlx.spec import PatternConfig, Route, visible

PATTERN = PatternConfig()
HEADS = (32, 8)
HEAD_DIM = 128
DTYPE = "bfloat16"
SAMPLE_S = 0.06
SAMPLES = 3

Rows = list[dict[str, Any]]


def draw(heads: int, tokens: int, batch: int = 1, dtype: str = DTYPE, head_dim: int = HEAD_DIM) -> mx.array:
    """Normal `[B, heads, tokens, D]`, evaluated."""
    x = mx.random.normal((batch, heads, tokens, head_dim), getattr(mx, dtype))
    mx.eval(x)
    return x


def draw_queries(heads: int, tokens: int, **options: Any) -> mx.array:
    """The same, laid out as projections leave queries: token by token."""
    return draw(tokens, heads, **options).swapaxes(1, 2)


def expected_rows(
    q: mx.array, k: mx.array, v: mx.array, rows: slice, pattern: PatternConfig | None
) -> tuple[mx.array, mx.array]:
    """(out, lse) in float32 of some query rows; `pattern` None: dense."""
    B, HQ, L, D = q.shape
    HKV, S = k.shape[1:3]
    q_pos, k_pos = mx.arange(S - L, S)[rows][:, None], mx.arange(S)[None, :]
    mask = k_pos <= q_pos if pattern is None else visible(pattern, q_pos, k_pos)
    chosen = q[:, :, rows].astype(mx.float32).reshape(B, HKV, -1, D) * D**-0.5  # heads of a KV head, one by one
    scores = (chosen @ k.astype(mx.float32).swapaxes(-1, -2)).reshape(B, HQ, -1, S)
    scores = mx.where(mask, scores, -float("inf"))
    out = mx.softmax(scores, axis=-1).reshape(B, HKV, -1, S) @ v.astype(mx.float32)
    return out.reshape(B, HQ, -1, D), mx.logsumexp(scores, axis=-1)


def parity(
    name: str, q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, rows: Sequence[slice] = (slice(None),),
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Largest error of a call whose batch rows are SPARSE and FULL in turn; and whether it repeats bit for bit."""
    kv_tokens = options.get("kv_tokens", k.shape[2])
    codes = tuple(int(Route.FULL if b % 2 else Route.SPARSE) for b in range(q.shape[0]))
    start = time.perf_counter()
    out, lse = cuda_kernels.routed_attention(q, k, v, codes, pattern, **options)
    mx.eval(out, lse)
    first_call_s = time.perf_counter() - start
    again = cuda_kernels.routed_attention(q, k, v, codes, pattern, **options)
    repeats = all(mx.array_equal(a, b).item() for a, b in zip((out, lse), again, strict=True))
    error = 0.0
    for b, code in enumerate(codes):
        one = slice(b, b + 1)
        for part in rows:
            rule = pattern if code == Route.SPARSE else None
            wanted = expected_rows(q[one], k[one, :, :kv_tokens], v[one, :, :kv_tokens], part, rule)
            found = out[one, :, part].astype(mx.float32), lse[one, :, part]
            gaps = [mx.abs(a - w).max().item() for a, w in zip(found, wanted, strict=True)]
            error = max([error, *(gap if gap == gap else float("inf") for gap in gaps)])
    allowed = TOLERANCE[str(q.dtype).rpartition(".")[2]]
    row = {"case": name, "q": list(q.shape), "k": list(k.shape), "error": error, "allowed": allowed}
    return row | {"right": error <= allowed, "repeats": repeats, "first_call_s": round(first_call_s, 3)}


def milliseconds(call: Callable[[int, mx.array | None], mx.array], *, chained: bool) -> float:
    """Median time of a call (its index, the output before it or None), after one that is not counted."""

    def sample(calls: int) -> float:
        start, outputs = time.perf_counter(), []
        for index in range(calls):
            outputs.append(call(index, outputs[-1] if chained and outputs else None))
        mx.eval(outputs[-1:] if chained else outputs)
        mx.synchronize()
        return (time.perf_counter() - start) / calls

    sample(1)
    once = max(sample(1), 1e-6)
    calls = max(1, min(128 if chained else 16, round(SAMPLE_S / once)))
    return 1e3 * statistics.median(sample(calls) for _ in range(SAMPLES))


def attempt(times: dict[str, Any], name: str, call: Callable[..., mx.array], *, chained: bool = False) -> None:
    """Time `call` into `times`; an error is said there instead."""
    try:
        times[f"{name}_ms"] = milliseconds(call, chained=chained)
    except Exception as error:  # the other candidates must still be timed
        times[f"{name}_error"] = f"{type(error).__name__}: {error}"[:300]
    sys.stdout.write(f"    {name}: {times.get(f'{name}_ms', times.get(f'{name}_error'))}\n")
    sys.stdout.flush()
