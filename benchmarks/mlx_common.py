"""What the mlx_* scripts share: a Flux model of a shape with random weights, prompts for it, and the record they write.

Each script is one command, `python -m benchmarks.mlx_X --json FILE`, on whatever device MLX computes on; the stages of
`benchmarks/mlx_cuda.sh` name the sizes for one H100.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flux_mlx.benchmark import length
from flux_mlx.benchmark_compare import in_turn
from flux_mlx.benchmark_models import BITS, SHAPES, random_model
from flux_mlx.benchmark_report import check_target, hardware, versions, write_json
from flux_mlx.benchmark_routes import make_routers_decide, spread_full_layers
from flux_mlx.benchmark_runs import Run, Work
from flux_mlx.benchmark_text import Prompts, read_text, word_ids
from flux_mlx.cuda_settings import prepare_cuda
from flux_mlx.models import apply, routed_layers, set_route
from flux_mlx.spec import FluxConfig, PatternConfig


def parser(description: str | None, lengths: Sequence[int] | None) -> argparse.ArgumentParser:
    """A parser with the flags of all scripts; without `--lengths` if None are given."""
    prepare_cuda()
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add = made.add_argument
    add("--shape", choices=SHAPES, default="qwen3-8b", help="(default: %(default)s)")
    add("--bits", type=int, choices=BITS, default=16, help="of the weights (default: %(default)s)")
    add("--omega", type=float, default=0.7, help="share of sparse layers (default: %(default)s)")
    if lengths is not None:
        add("--lengths", type=length, nargs="+", default=list(lengths), metavar="TOKENS", help="as 512 32K 1M")
    add("--prefill-step-size", "--chunk", type=int, default=2048, help="tokens of a chunk (default: %(default)s)")
    add("--num-trials", "-n", type=int, default=3, help="runs of each kind, in turn (default: %(default)s)")
    for name in ("block_size", "sink_tokens", "window_tokens"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(PatternConfig(), name), help="of the pattern")
    add("--prompt", metavar="FILE", help="text of the prompts (default: Python's manual)")
    add("--json", type=Path, metavar="FILE", help="where to write the figures")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with one line if the target cannot be written."""
    args = made.parse_args(argv)
    try:
        check_target(args.json)
    except OSError as error:
        made.error(str(error))
    return args


def pattern_of(args: argparse.Namespace) -> PatternConfig:
    """The pattern that the arguments name."""
    return PatternConfig(block_size=args.block_size, sink_tokens=args.sink_tokens, window_tokens=args.window_tokens)


def flux_model(args: argparse.Namespace) -> nn.Module:
    """A Flux model of the shape, random weights; its routers run and decide for the spread of --omega."""
    model = apply(random_model(SHAPES[args.shape], args.bits), FluxConfig(pattern=pattern_of(args)))
    make_routers_decide(model, full_layers(args, model))
    mx.eval(model.parameters())
    return model


def full_layers(args: argparse.Namespace, model: nn.Module) -> tuple[int, ...]:
    """The full layers of the spread."""
    return spread_full_layers(sorted(routed_layers(model)), args.omega)


def force_routes(args: argparse.Namespace, model: nn.Module, forced: bool) -> None:
    """The same routes by force, or by routers that run."""
    set_route(model, full_layers(args, model) if forced else "auto")


def prompts(args: argparse.Namespace) -> Prompts:
    """Prompts of the text that the arguments name."""
    return Prompts(read_text(args.prompt)[0], lambda text: word_ids(text, SHAPES[args.shape]["vocab_size"]))


def figures(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Medians of each kind of run, and all times of prefill and first token."""
    return {
        name: {
            "prefill_s": statistics.median(run.prefill_s for run in found),
            "all_prefill_s": [run.prefill_s for run in found],
            "first_token_s": statistics.median(run.first_token_s for run in found),
            "all_first_token_s": [run.first_token_s for run in found],
            "token_s": statistics.median(run.token_s for run in found),
            "peak_bytes": max(run.peak_bytes for run in found),
            "kv_bytes": max(run.kv_bytes for run in found),
            "sparse_layers": found[-1].sparse_layers,
        }
        for name, found in runs.items()
    }


def timed(runners: dict[str, Callable[[Work], Run]], work: Work, trials: int) -> dict[str, dict[str, Any]]:
    """Figures of each kind of run, in turn, after one run of each that is not counted."""
    for runner in runners.values():
        runner(work)
    return figures(in_turn(runners, work, trials))


def save(args: argparse.Namespace, script: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print the rows; write them with the command, the hardware and the versions."""
    words = sys.argv[1:]
    if "--json" in words:
        del words[words.index("--json") : words.index("--json") + 2]
    record = {
        "command": " ".join([f"python -m benchmarks.{script}", *words]),
        "hardware": hardware(),
        "versions": versions(),
        "shape": {"name": args.shape, "bits": args.bits, "weights": "random"},
        "pattern": dataclasses.asdict(pattern_of(args)),
        "prefill_step_size": args.prefill_step_size,
        **facts,
        "rows": rows,
    }
    write_json(args.json, record)
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
