"""SmolLM2 on a CPU: prefill time and peak memory, stock against Flux in one run.

    sh examples/with-openblas .venv/bin/python benchmarks/bench_cpu_smollm2.py --json benchmarks/cpu_smollm2.json

Needs the model directory that `make demo` makes. Nothing else should run on the machine: times are wall-clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import flux_mlx
from flux_mlx.spec import visible_pairs

DOCUMENT = Path(__file__).resolve().parents[1] / "examples" / "data" / "us_constitution_1787.txt"
ROUTES = {"sparse": "sparse", "static list": (0, 2, 6, 7, 14, 18, 21, 23), "full": "full"}


def stock_prefill(model: Any, tokens: mx.array, step: int) -> list[Any]:
    """mlx-lm's own prefill of a model whose layers are all full: all tokens but the last."""
    cache = model.make_cache()
    for start in range(0, tokens.size - 1, step):
        model(tokens[None, start : min(start + step, tokens.size - 1)], cache=cache)
        mx.eval([entry.state for entry in cache])
        mx.clear_cache()
    return cache


def measure(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds and peak memory of one run, and what it returned."""
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    result = run()
    return {"seconds": time.perf_counter() - start, "peak_bytes": mx.get_peak_memory()}, result


def prefill_rows(model: Any, tokens: mx.array, names: list[str], steps: list[int]) -> dict[str, dict[str, float]]:
    """Exact prefill with each kind of routes, then stock's prefill at its chunk sizes."""
    rows = {}
    for name in names:
        flux_mlx.set_route(model, ROUTES[name])
        rows[f"exact, {name}"], _ = measure(lambda: flux_mlx.prefill(model, tokens, model.make_cache()))
        print(name, rows[f"exact, {name}"], file=sys.stderr)
    flux_mlx.set_route(model, "full")
    for step in steps:
        rows[f"stock, step {step}"], _ = measure(lambda step=step: stock_prefill(model, tokens, step))
        print(step, rows[f"stock, step {step}"], file=sys.stderr)
    stock_s = rows[f"stock, step {steps[0]}"]["seconds"]
    for row in rows.values():
        row["tokens_per_s"] = tokens.size / row["seconds"]
        row["speedup_over_stock"] = stock_s / row["seconds"]
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-flux")
    parser.add_argument("--tokens", type=int, default=7900)
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES), help="which to prefill with")
    parser.add_argument("--stock-steps", type=int, nargs="+", default=[2048, 512], help="chunks of stock's prefill")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    model, tokenizer = flux_mlx.load(args.model)
    ids = tokenizer.encode(2 * DOCUMENT.read_text(encoding="utf-8"))[: args.tokens]
    rows = prefill_rows(model, mx.array(ids), args.routes, args.stock_steps)
    buffer_bytes = args.tokens * model.args.hidden_size * 4
    bound = 1.1 * (rows[f"stock, step {args.stock_steps[0]}"]["peak_bytes"] + buffer_bytes)
    result = {
        "command": shlex.join(["benchmarks/bench_cpu_smollm2.py", *sys.argv[1:]]),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, float32",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "flux-mlx")},
        "blas": os.environ.get("LD_PRELOAD", "reference"),
        "tokens": args.tokens,
        "pattern": model.flux.to_dict()["pattern"],
        "prefill": rows,
        "visible_pairs_dense_over_sparse": visible_pairs(None, args.tokens, args.tokens)
        / visible_pairs(model.flux.pattern, args.tokens, args.tokens),
        "exact_peak_bytes_allowed": bound,
        "exact_peak_within_bound": all(row["peak_bytes"] <= bound for name, row in rows.items() if "exact" in name),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
