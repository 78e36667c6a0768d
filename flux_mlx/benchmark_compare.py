"""Stock against Flux at one length: runs in turn, medians and spread, and the ceiling from the same run."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn

from flux_mlx import cuda_kernels
from flux_mlx.benchmark_parts import (
    AttentionShape,
    Ceiling,
    decode_seconds,
    dense,
    prefill_seconds,
    sparse,
    sparse_decode,
    visible_share,
)
from flux_mlx.benchmark_runs import Run, Work, run_flux, run_stock
from flux_mlx.benchmark_text import Prompts

Runner = Callable[[Work], Run]
_WARM_UP_CHUNKS = 2
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Bench:
    """What is compared, and how.

    Args:
        flux: The Flux model.
        stock: `stock_view(flux)`.
        prompts: Where prompts come from.
        batch_size: Prompts at a time.
        generation_tokens: Tokens to generate for each, 2 or more.
        prefill_step_size: Tokens of a prefill chunk.
        num_trials: Runs of each, at most.
        trial_seconds: No further runs of a length after this time.
        before_row: See `Work`.
        batch_step_size: See `Work`.
    """

    flux: nn.Module
    stock: nn.Module
    prompts: Prompts
    batch_size: int = 1
    generation_tokens: int = 64
    prefill_step_size: int = 2048
    num_trials: int = 3
    trial_seconds: float = math.inf
    before_row: Callable[[int], None] | None = None
    batch_step_size: int | None = None

    def work(self, prompt_tokens: int) -> Work:
        """The work of a run."""
        rows = [self.prompts.prompt(prompt_tokens, row) for row in range(self.batch_size)]
        return Work(rows, self.generation_tokens, self.prefill_step_size, self.before_row, self.batch_step_size)

    def runners(self) -> dict[str, Runner]:
        """Both sides."""
        return {"stock": lambda work: run_stock(self.stock, work), "flux": lambda work: run_flux(self.flux, work)}


def note(text: str) -> None:
    """Progress, to stderr."""
    sys.stderr.write(f"benchmark: {text}\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def in_turn(runners: dict[str, Runner], work: Work, trials: int, limit_s: float = math.inf) -> dict[str, list[Run]]:
    """`trials` runs of each, one after the other, the order turned round each time: drift meets them alike.

    No round begins `limit_s` after the first one; one round is made whatever it takes.
    """
    found: dict[str, list[Run]] = {name: [] for name in runners}
    start = time.perf_counter()
    for trial in range(trials):
        if trial and time.perf_counter() - start > limit_s:
            break
        for name in list(runners)[:: -1 if trial % 2 else 1]:
            found[name].append(runners[name](work))
            note(f"{name}, {len(work.prompts[0])} tokens, run {trial + 1} of {trials}: {_seconds(found[name][-1])}")
    return found


def _seconds(run: Run) -> str:
    return f"prefill {run.prefill_s:.3f} s, a token {1e3 * run.token_s:.2f} ms"


def warm_up(runners: dict[str, Runner], work: Work) -> None:
    """Run each once: on CUDA a process's first prompt compiles, and each shape of attention is planned.

    Elsewhere the first two chunks are enough.
    """
    tokens = len(work.prompts[0])
    if not cuda_kernels.is_available():
        tokens = min(tokens, _WARM_UP_CHUNKS * work.prefill_step_size)
    short = replace(work, prompts=[row[:tokens] for row in work.prompts], generation_tokens=_WARM_UP_TOKENS)
    for name, runner in runners.items():
        note(f"warming up {name}")
        runner(short)


def summary(runs: list[Run], prompt_tokens: int, rows: int) -> dict[str, Any]:
    """Figures of one side over its runs."""
    return {
        "prefill_s": spread([run.prefill_s for run in runs]),
        "prefill_tokens_per_s": spread([rows * (prompt_tokens - 1) / run.prefill_s for run in runs]),
        "first_token_s": spread([run.first_token_s for run in runs]),
        "token_s": spread([run.token_s for run in runs]),
        "mean_token_s": spread([run.mean_token_s for run in runs]),
        "decode_tokens_per_s": spread([rows / run.token_s for run in runs]),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "kv_bytes": max(run.kv_bytes for run in runs),
    }


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of one time over the other: a machine that is slow for a while is slow for both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def paired_speedup(found: dict[str, list[Run]], name: str) -> float:
    """Stock's time over Flux's, round by round."""
    return median_ratio(*([getattr(run, name) for run in found[side]] for side in ("stock", "flux")))


def attention_times(bench: Bench, prompt_tokens: int) -> dict[str, dict[str, float]]:
    """Attention of one layer, dense and sparse, in prefill and decode."""
    note(f"timing attention at {prompt_tokens} tokens")
    shape, pattern = AttentionShape.of(bench.flux, bench.batch_size), bench.flux.flux.pattern
    step = bench.prefill_step_size
    return {
        "prefill": prefill_seconds(
            shape, prompt_tokens, step, {"dense": dense, "sparse": sparse(pattern, prompt_tokens)}
        ),
        "decode": decode_seconds(shape, prompt_tokens, {"dense": dense, "sparse": sparse_decode(pattern)}),
    }


def compare(bench: Bench, prompt_tokens: int) -> dict[str, Any]:
    """One row of the benchmark, as JSON values.

    Attention by itself is timed first: the shapes that it meets are those of the runs, and on CUDA each new one
    costs planning. Shares count xattention and triangle as streaming.
    """
    work, rows = bench.work(prompt_tokens), bench.batch_size
    parts = attention_times(bench, prompt_tokens)
    warm_up(bench.runners(), work)
    found = in_turn(bench.runners(), work, bench.num_trials, bench.trial_seconds)
    stock, flux = (summary(found[name], prompt_tokens, rows) for name in ("stock", "flux"))
    speedups = {name: paired_speedup(found, name) for name in ("prefill_s", "first_token_s", "token_s")}
    layers, pattern, last = len(bench.flux.layers), bench.flux.flux.pattern, found["flux"][-1]
    routed = AttentionShape.of(bench.flux).layers
    row = {
        "prompt_tokens": prompt_tokens,
        "batch_size": rows,
        "trials": len(found["flux"]),
        "text_used": bench.prompts.repeats(prompt_tokens, rows),
        "layers": layers,
        "routed_layers": routed,
        "sparse_layers": last.sparse_layers,
        "omega": last.sparse_layers / routed,
        "routes": last.routes,
        "stock": stock,
        "flux": flux,
        "first_token_speedup": speedups["first_token_s"],
        "kv_bytes_share": flux["kv_bytes"] / stock["kv_bytes"],
    }
    for phase, key, queries, keys in (
        ("prefill", "prefill_s", prompt_tokens - 1, prompt_tokens - 1),
        ("decode", "token_s", 1, prompt_tokens),
    ):
        share = visible_share(pattern, queries, keys)
        dense_s, sparse_s = parts[phase]["dense"], parts[phase]["sparse"]
        ceiling = Ceiling(stock[key]["median"], dense_s, share, routed, last.sparse_layers)
        row[phase] = ceiling.columns(flux[key]["median"], sparse_s, speedups[key])
    return row
