"""Decode on a CPU: one sparse layer's attention for one new token, over caches of several lengths, interleaved.

    sh examples/with-openblas .venv/bin/python benchmarks/bench_cpu_decode.py --json benchmarks/cpu_decode.json

SmolLM2-135M's shape and the demo's pattern; random keys. Nothing else should run on the machine: times are wall-clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from flux_mlx.attention import full_attention, sparse_attention
from flux_mlx.spec import PatternConfig

QUERY_HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
PATTERN = PatternConfig(block_size=64, sink_tokens=64, window_tokens=512)
WARM_UP = 50


def one_token(kv_tokens: int, *, sparse: bool) -> Callable[[], mx.array]:
    """The attention of one query over `kv_tokens` keys."""
    q = mx.random.normal((1, QUERY_HEADS, 1, HEAD_DIM))
    k, v = (mx.random.normal((1, KV_HEADS, kv_tokens, HEAD_DIM)) for _ in range(2))
    mx.eval(q, k, v)
    scale = HEAD_DIM**-0.5
    if sparse:
        return lambda: sparse_attention(q, k, v, PATTERN, scale=scale)
    return lambda: full_attention(q, k, v, scale=scale)


def medians_us(runs: dict[str, Callable[[], mx.array]], repeats: int) -> dict[str, float]:
    """Median microseconds of each, all taken in turn so that the machine's drift meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UP + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            mx.eval(run())
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv-tokens", type=int, nargs="+", default=[1000, 7900])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    medians = {
        route: medians_us({str(n): one_token(n, sparse=route == "sparse") for n in args.kv_tokens}, args.repeats)
        for route in ("sparse", "full")
    }
    result = {
        "command": " ".join(["benchmarks/bench_cpu_decode.py", *sys.argv[1:]]),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, float32",
        "versions": {name: version(name) for name in ("mlx", "flux-mlx")},
        "blas": os.environ.get("LD_PRELOAD", "reference"),
        "pattern": dataclasses.asdict(PATTERN),
        "median_us_by_route_and_keys": medians,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
