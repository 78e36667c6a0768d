"""The CUDA kernels inside MLX on one GPU: right against a float32 reference, and how fast beside stock attention.

    python -m benchmarks.mlx_cuda_attention --json FILE

Every stage is tried whatever became of the others, in a new process after one that lost the device, and FILE is written
anew after each. Seconds to expect on an H100:
decode 15, host 5, decode-times 35, hopper 10, prefill-32K 10, prefill-128K 25, long 10, portable 25, chunks 15, policy
15, decode-1M 15. A stage that would start after --budget-s is left out.

Times are of one call in a row of calls on random data. Prefill calls do not depend on each other, decode calls do, and
go round among caches that no L2 cache holds. The ideal is stock's dense time times the share of visible pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.mlx_cuda_common import HEAD_DIM, HEADS, PATTERN, Rows, attempt, draw, draw_queries, parity
from benchmarks.mlx_cuda_decode import DECODE_LENGTHS, decode_parity, decode_times, host_times, million_parity
from flux_mlx import cuda_kernels, kernel_policy, streaming
from flux_mlx.benchmark_report import check_target, hardware, versions, write_json
from flux_mlx.cuda_kernels import Run
from flux_mlx.spec import PatternConfig, visible_pairs

CHUNK_TOKENS = 2048
LONG_TOKENS = 65536

MODULE = "benchmarks.mlx_cuda_attention"
BROKEN = 3  # exit code of a process that lost the device


def prefill_parity(family: str, sizes: Sequence[tuple[str, int, int]], run: Run, kv_tokens: int = 555) -> Rows:
    """Every (dtype, head dim, block size) of a family: an offset inside a tile, a longer buffer, both routes."""
    rows = []
    for dtype, head_dim, block in sizes:
        kind = {"batch": 2, "dtype": dtype, "head_dim": head_dim}
        pattern = PatternConfig(block_size=block, sink_tokens=block, window_tokens=2 * block)
        k, v = draw(2, kv_tokens + 85, **kind), draw(2, kv_tokens + 85, **kind)
        options = {"kv_tokens": kv_tokens, "family": family, "run": run}
        for q_tokens in (kv_tokens * 3 // 5, kv_tokens):
            q = draw_queries(4, q_tokens, **kind)
            rows.append(parity(f"{family} {dtype} D {head_dim} block {block}", q, k, v, pattern, **options))
        sliced = [x[:, :, :kv_tokens] for x in (k, v)]
        rows.append(parity("the same from a slice", q, *sliced, pattern, family=family, run=run))
    return rows


def long_parity(tokens: int, run: Run) -> Rows:
    """A long prompt of the real shape, on its first, middle and last rows."""
    q, k, v = (draw_queries(HEADS[0], tokens), *(draw(HEADS[1], tokens) for _ in range(2)))
    parts = [slice(0, 64), slice(tokens // 2 - 32, tokens // 2 + 32), slice(tokens - 64, tokens)]
    return [parity(f"prefill {tokens}", q, k, v, PATTERN, parts, run=run)]


def with_fractions(row: dict[str, Any], share: float) -> dict[str, Any]:
    """A row of times `*_ms` with each one's fraction of the ideal, where the dense time is known."""
    if "dense_ms" not in row:
        return row
    ideal_ms = row["dense_ms"] * share
    names = [name for name in row if name.endswith("_ms") and name not in ("dense_ms", "full_ms")]
    fractions = {f"{name[:-3]}_of_ideal": ideal_ms / row[name] for name in names}
    if "full_ms" in row:
        fractions["full_of_dense"] = row["dense_ms"] / row["full_ms"]
    return row | {"ideal_ms": ideal_ms} | fractions


def prefill_times(tokens: int, q_tokens: int | None = None, families: Sequence[str] = ("hopper", "portable")) -> Rows:
    """Stock dense, our kernels, and the composition of stock calls; the last `q_tokens` of `tokens`, all by default."""
    q_tokens = q_tokens or tokens
    q, k, v = (draw_queries(HEADS[0], q_tokens), *(draw(HEADS[1], tokens) for _ in range(2)))
    scale, times = HEAD_DIM**-0.5, {}
    attempt(times, "dense", lambda *_: streaming.dense(q, k, v, scale))
    for family in families:
        attempt(times, family, lambda *_, f=family: cuda_kernels.sparse_attention(q, k, v, PATTERN, family=f)[0])
    attempt(times, "composition", lambda *_: streaming.attend(q, k, v, PATTERN, scale))
    attempt(times, "full", lambda *_: cuda_kernels.full_attention(q, k, v, family=families[0])[0])
    by_head = mx.contiguous(q)
    mx.eval(by_head)
    attempt(times, "hopper_q_by_head", lambda *_: cuda_kernels.sparse_attention(by_head, k, v, PATTERN)[0])
    share = visible_pairs(PATTERN, q_tokens, tokens) / visible_pairs(None, q_tokens, tokens)
    row = {"operation": "prefill", "tokens": tokens, "q_tokens": q_tokens, "visible_share": share} | times
    return [with_fractions(row, share)]


def policy() -> Rows:
    """What the policy says of the calls that models make, after its self-tests."""
    rows = []
    for q_tokens, dtype, head_dim in ((64, "bfloat16", 128), (1, "bfloat16", 128), (64, "float16", 64)):
        kind = {"dtype": dtype, "head_dim": head_dim}
        q, k = draw_queries(8, q_tokens, **kind), draw(2, 4096, **kind)
        rows.append({"q_tokens": q_tokens, **kind, "choice": kernel_policy.choose(q, k, k, PATTERN)})
    return [*rows, kernel_policy.report()]


def stages(run: Run = cuda_kernels.cuda_run) -> dict[str, Callable[[], Rows]]:
    """The stages by name, in order of what is wanted most."""
    sizes = [(dtype, head_dim) for dtype in ("bfloat16", "float16") for head_dim in (128, 64)]
    return {
        "decode": lambda: decode_parity(run),
        "host": lambda: host_times(run),
        "decode-times": lambda: [row for tokens in DECODE_LENGTHS for row in decode_times(tokens, run)],
        "hopper": lambda: prefill_parity("hopper", [(*size, 128) for size in sizes], run),
        "prefill-32K": lambda: prefill_times(32768),
        "prefill-128K": lambda: prefill_times(131072),
        "long": lambda: long_parity(LONG_TOKENS, run),
        "portable": lambda: prefill_parity("portable", [(*sizes[0], 128), (*sizes[3], 64)], run),
        "chunks": lambda: [row for tokens in (32768, 131072) for row in prefill_times(tokens, CHUNK_TOKENS)],
        "policy": policy,
        "decode-1M": lambda: million_parity(run) + decode_times(1 << 20, run),
    }


def run_stage(stage: Callable[[], Rows]) -> dict[str, Any]:
    """Its rows, or its error, and its seconds."""
    start, result = time.perf_counter(), {}
    try:
        result["rows"] = stage()
        mx.clear_cache()
    except Exception as error:  # whatever fails must not keep the other stages from running
        result["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc(file=sys.stdout)
    return result | {"seconds": round(time.perf_counter() - start, 3)}


def is_right(result: dict[str, Any]) -> bool:
    """Whether a stage ran, and every comparison in it holds."""
    return "error" not in result and all(row.get("right", True) for row in result["rows"])


def is_usable() -> bool:
    """Whether the device still computes: after a fault it does not, in this process."""
    try:
        return (mx.ones(3) + 1).sum().item() == 6
    except RuntimeError:
        return False


def run_stages(names: Sequence[str], target: Path, budget_s: float) -> int:
    """Run stages in this process, noting each in `target`. BROKEN if the device is lost: the others do not run then."""
    start = time.perf_counter()
    for name in names:
        record = json.loads(target.read_text())
        result = {"error": "left out: the time was used up", "seconds": 0.0}
        is_in_time = time.perf_counter() - start < budget_s
        if is_in_time:
            sys.stdout.write(f"== {name}\n")
            result = run_stage(stages()[name])
        record["stages"][name] = result
        record |= {"versions": versions(), "hardware": hardware(), "launches_for": vars(cuda_kernels.device())}
        write_json(target, record)
        for row in result.get("rows", []):
            sys.stdout.write(f"    {row}\n")
        sys.stdout.write(f"== {name}: {'ok' if is_right(result) else 'WRONG'} in {result['seconds']} s\n")
        sys.stdout.flush()
        if is_in_time and "error" in result and not is_usable():
            return BROKEN
    return 0


def supervise(names: Sequence[str], target: Path, budget_s: float, command: Sequence[str]) -> None:
    """Run stages in a process of their own, and those behind one that took device or process with it in another.

    Args:
        names: The stages.
        target: The record; stages are added to it.
        budget_s: For all of them.
        command: What runs `run_stages`, given --stages and --budget-s.
    """
    start, left = time.perf_counter(), list(names)
    while left:
        seconds = budget_s - (time.perf_counter() - start)
        code = subprocess.call([*command, "--stages", *left, "--budget-s", str(seconds)])
        record = json.loads(target.read_text())
        left = [name for name in left if name not in record["stages"]]
        if left and code != BROKEN:
            record["stages"][left.pop(0)] = {"error": f"the process ended with code {code}"}
            write_json(target, record)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 1 if a stage failed or a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--stages", nargs="+", choices=list(stages()), default=list(stages()), metavar="STAGE")
    parser.add_argument("--budget-s", type=float, default=240.0, help="(default: %(default)s)")
    parser.add_argument("--in-this-process", action="store_true", help="add to FILE, and end if the device is lost")
    args = parser.parse_args(argv)
    check_target(args.json)
    if not cuda_kernels.is_available():
        parser.error("needs MLX with a CUDA device, and there is none.")
    if args.in_this_process:
        return run_stages(args.stages, args.json, args.budget_s)
    with tempfile.TemporaryDirectory() as folder:
        target = args.json or Path(folder) / "record.json"
        write_json(target, {"command": [MODULE, *(sys.argv[1:] if argv is None else argv)], "stages": {}})
        command = [sys.executable, "-m", MODULE, "--in-this-process", "--json", str(target)]
        supervise(args.stages, target, args.budget_s, command)
        results = json.loads(target.read_text())["stages"]
    return 0 if all(is_right(result) for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
