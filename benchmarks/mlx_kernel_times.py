"""What our CUDA kernels take on the device inside MLX, by NVIDIA's profiler: no host, no gaps between launches.

    python -m benchmarks.mlx_kernel_times --json FILE

Needs `ncu` (Nsight Compute) and a CUDA GPU. The clocks stay as they are. The ideal of prefill is the visible pairs at
the rate of our own dense kernel over the whole prompt, in the same run; decode should not depend on the number of keys.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.mlx_cuda_common import DTYPE, HEAD_DIM, HEADS, PATTERN, draw, draw_queries
from flux_mlx import cuda_kernels
from flux_mlx.benchmark_report import check_target, hardware, versions, write_json
from flux_mlx.spec import Route, visible_pairs

MODULE = "benchmarks.mlx_kernel_times"
REPEATS = 5
DECODE_KEYS = (4096, 32768, 131072, 524288, 1 << 20)
PREFILLS = ((32768, 2048), (32768, 8192), (32768, 32768), (131072, 2048), (131072, 131072))  # keys, queries
METRIC = "gpu__time_duration.sum"
TO_MS = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1.0, "msecond": 1.0, "s": 1e3, "second": 1e3}


def cases() -> list[dict[str, Any]]:
    """The calls, in order. Each is REPEATS launches of one kernel."""
    decode = [{"operation": "decode", "route": "sparse", "tokens": n, "q_tokens": 1} for n in DECODE_KEYS]
    sparse = [{"operation": "prefill", "route": "sparse", "tokens": s, "q_tokens": n} for s, n in PREFILLS]
    full = [{"operation": "prefill", "route": "full", "tokens": s, "q_tokens": s} for s, n in PREFILLS if s == n]
    return decode + sparse + full


def launch(case: dict[str, Any]) -> None:
    """The launches of one case, on random data."""
    tokens, q_tokens = case["tokens"], case["q_tokens"]
    k, v, q = draw(HEADS[1], tokens), draw(HEADS[1], tokens), draw_queries(HEADS[0], q_tokens)
    if case["operation"] == "decode":
        decode = cuda_kernels.decoder(q.shape, k.shape, DTYPE, PATTERN, HEAD_DIM**-0.5, Route.SPARSE)
    for _ in range(REPEATS):
        if case["operation"] == "decode":
            mx.eval(decode(q, k, v, tokens))
        elif case["route"] == "full":
            mx.eval(cuda_kernels.full_attention(q, k, v)[0])
        else:
            mx.eval(cuda_kernels.sparse_attention(q, k, v, PATTERN)[0])


def durations_ms(report: str) -> list[float]:
    """The durations in a report of ncu's (--csv), launch by launch.

    Raises:
        ValueError: A unit that is not known, or no table.
    """
    lines = report.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"[durations_ms] expected a table of ncu's, got {report[-300:]!r}.")
    found = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row["Metric Name"] == METRIC:
            if row["Metric Unit"] not in TO_MS:
                raise ValueError(f"[durations_ms] expected a unit of {list(TO_MS)}, got {row['Metric Unit']!r}.")
            found.append(float(row["Metric Value"].replace(",", "")) * TO_MS[row["Metric Unit"]])
    return found


def rows_of(durations: Sequence[float]) -> list[dict[str, Any]]:
    """The cases with their median times, prefill with its fraction of the ideal.

    Raises:
        ValueError: Another number of launches than the cases make.
    """
    if len(durations) != REPEATS * len(cases()):
        raise ValueError(f"[rows_of] expected {REPEATS * len(cases())} launches, got {len(durations)}.")
    found = [
        case | {"median_ms": statistics.median(durations[REPEATS * i : REPEATS * (i + 1)])}
        for i, case in enumerate(cases())
    ]
    dense_ms = {row["tokens"]: row["median_ms"] for row in found if row["route"] == "full"}
    for row in found:
        tokens, q_tokens = row["tokens"], row["q_tokens"]
        if row["operation"] == "prefill" and row["route"] == "sparse":
            share = visible_pairs(PATTERN, q_tokens, tokens) / visible_pairs(None, tokens, tokens)
            row["ideal_ms"] = dense_ms[tokens] * share
            row["fraction_of_ideal"] = row["ideal_ms"] / row["median_ms"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--launch", action="store_true", help="make the launches, to be watched by ncu")
    args = parser.parse_args(argv)
    if args.launch:
        for case in cases():
            launch(case)
        return
    check_target(args.json)
    ncu = ["ncu", "--csv", "--kernel-name", "regex:^flux_", "--clock-control", "none", "--metrics", METRIC]
    done = subprocess.run([*ncu, sys.executable, "-m", MODULE, "--launch"], capture_output=True, text=True, check=False)
    if done.returncode:
        parser.error(f"ncu ended with code {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    rows = rows_of(durations_ms(done.stdout))
    for row in rows:
        sys.stdout.write(f"{row}\n")
    if args.json is not None:
        record = {"command": ["python", "-m", MODULE], "hardware": hardware(), "versions": versions(), "rows": rows}
        write_json(args.json, record)


if __name__ == "__main__":
    main()
