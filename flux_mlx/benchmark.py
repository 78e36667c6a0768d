"""`flux_mlx.benchmark`: stock mlx-lm beside Flux on this machine, with Amdahl's ceiling from the same run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flux_mlx.benchmark_compare import Bench, compare
from flux_mlx.benchmark_crossover import crossover_of, find_crossover
from flux_mlx.benchmark_models import BITS, SHAPES, default_dtype, parameter_bytes, random_model, stock_view
from flux_mlx.benchmark_report import (
    check_plot,
    check_target,
    crossover_lines,
    hardware,
    plot,
    table,
    versions,
    write_json,
)
from flux_mlx.benchmark_routes import make_routers_decide, spread_full_layers
from flux_mlx.benchmark_text import Prompts, read_text, word_ids
from flux_mlx.cuda_settings import prepare_cuda
from flux_mlx.generate import add_kv_policy_argument, add_route_arguments
from flux_mlx.models import FluxModel, apply, routed_layers, set_kv_policy, set_route
from flux_mlx.safe_loading import load_without_code
from flux_mlx.spec import FluxConfig, PatternConfig
from flux_mlx.spec.config import PATTERNS

LENGTHS_TOKENS = (512, 2048, 8192, 32768)
CPU_LENGTHS_TOKENS = (512, 1024, 2048)
SHAPE_OMEGA = 0.7
_UNITS = {"K": 1 << 10, "M": 1 << 20}

SETTINGS = (
    "omega",
    "route",
    "kv_policy",
    "generation_tokens",
    "num_trials",
    "memory_share",
    "prefill_step_size",
    "batch_step_size",
)


def length(text: str) -> int:
    """A number of tokens: 512, 32K or 1M.

    Raises:
        argparse.ArgumentTypeError: Anything else, or fewer than 2.
    """
    unit = _UNITS.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal() or int(digits) * unit < 2:
        raise argparse.ArgumentTypeError(f"expected tokens, 2 or more, like 512, 32K or 1M; got {text!r}")
    return int(digits) * unit


def _count(minimum: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of {minimum} or more, got {text!r}")
        return int(text)

    return count


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1], got {text!r}")
    return value


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line; flags that mlx_lm.benchmark has too are spelled as there."""
    parser = argparse.ArgumentParser(prog="flux_mlx.benchmark", description=(__doc__ or "").partition(": ")[2])
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model directory or hub id: a Flux model, or any that flux_mlx can route")
    what.add_argument("--shape", choices=SHAPES, help="a model of this shape with random weights, no checkpoint")
    add("--bits", type=int, choices=BITS, default=16, help="of a shape's weights (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of a shape (default: float32 on a CPU, else bf16)")
    add("--prompt", metavar="FILE", help="text of the prompts, - for stdin (default: Python's manual, repeated)")
    add("--lengths", type=length, nargs="+", metavar="TOKENS", help="of the prompts, as 512 32K 1M")
    add_route_arguments(parser)
    add_kv_policy_argument(parser)
    add("--omega", type=_share, help="routers decide so that this share of the layers is sparse, spread over the depth")
    add("--batch-size", "-b", type=_count(1), default=1, help="prompts at a time (default: %(default)s)")
    add("--generation-tokens", "-g", type=_count(2), default=64, help="for each prompt (default: %(default)s)")
    add("--num-trials", "-n", type=_count(1), default=3, help="runs of each side, in turn (default: %(default)s)")
    add("--trial-seconds", type=float, default=float("inf"), help="no further runs of a length after this time")
    add("--prefill-step-size", "--chunk", type=_count(1), default=2048, help="tokens of a chunk (default: %(default)s)")
    add("--batch-step-size", type=_count(1), help="tokens of a row in a chunk of stock's batch (default: as above)")
    add("--pattern", choices=PATTERNS, help="what sparse layers see (default: the model's, or streaming)")
    for name in ("block_size", "sink_tokens", "window_tokens"):
        add(f"--{name.replace('_', '-')}", type=_count(0), help="of the pattern (default: the model's)")
    add("--crossover", action="store_true", help="search, from the least to the greatest length, where routing pays")
    add("--memory-share", type=_share, default=1.0, help="of MLX's memory limit, beyond which it waits for the device")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE", help="draw speed-ups and ceilings (needs matplotlib)")
    add("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    return parser


def _pattern(args: argparse.Namespace, base: PatternConfig) -> PatternConfig:
    given = {"name": args.pattern, **{n: getattr(args, n) for n in ("block_size", "sink_tokens", "window_tokens")}}
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


def _load(args: argparse.Namespace) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """The model, Flux or stock, and what makes token ids of text."""
    if args.shape:
        config = SHAPES[args.shape]
        model = random_model(config, args.bits, args.dtype, args.seed)
        return model, lambda text: word_ids(text, config["vocab_size"])
    model, tokenizer, _ = load_without_code(args.model)
    return model, lambda text: tokenizer.encode(text, verbose=False)  # no warning that the whole text is long


def route_model(args: argparse.Namespace, model: nn.Module) -> Callable[[int], None] | None:
    """Route a Flux model as the arguments say.

    Returns:
        With --omega and several rows, what to call before each row, so that their routes differ.

    Raises:
        ValueError: --omega and --route together, or a layer that is not routed.
    """
    if args.omega is not None and args.route is not None:
        raise ValueError("[benchmark] --omega and --route exclude each other.")
    if args.omega is None and args.route is None and args.shape:
        args.omega = SHAPE_OMEGA
    omega = args.omega
    if omega is None:
        if args.route is not None:
            set_route(model, args.route)
        return None
    layers = sorted(routed_layers(model))
    set_route(model, "auto")
    make_routers_decide(model, spread_full_layers(layers, omega))
    if args.batch_size == 1:
        return None
    return lambda row: make_routers_decide(model, spread_full_layers(layers, omega, row))


def prepare(args: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """Load, route and describe what the arguments name.

    Raises:
        OSError: A file that is not there.
        ValueError: What the arguments name cannot be benchmarked.
    """
    text, source = read_text(args.prompt)
    model, encode = _load(args)
    base = model.flux if isinstance(model, FluxModel) else FluxConfig()
    config = dataclasses.replace(base, pattern=_pattern(args, base.pattern))
    if isinstance(model, FluxModel):
        model.flux = config
        for attn in routed_layers(model).values():
            attn.flux = config
    else:
        apply(model, config)
    if args.kv_policy == "evict" and args.batch_size > 1:
        raise ValueError("[benchmark] --kv-policy evict serves one row at a time; leave --batch-size at 1.")
    set_kv_policy(model, args.kv_policy)
    before_row = route_model(args, model)
    mx.eval(model.parameters())
    bench = Bench(
        flux=model,
        stock=stock_view(model),
        prompts=Prompts(text, encode),
        batch_size=args.batch_size,
        generation_tokens=args.generation_tokens,
        prefill_step_size=args.prefill_step_size,
        num_trials=args.num_trials,
        trial_seconds=args.trial_seconds,
        before_row=before_row,
        batch_step_size=args.batch_step_size,
    )
    weights = {"bits": args.bits, "dtype": args.dtype or default_dtype(), "weights": "random"} if args.shape else {}
    facts = {
        "model": {"name": args.shape or Path(args.model).name, **weights, "bytes": parameter_bytes(bench.stock)},
        "text": {"source": source, "tokens": len(bench.prompts.ids)},
        "pattern": dataclasses.asdict(config.pattern),
        "settings": {name: getattr(args, name) for name in SETTINGS},
    }
    return bench, facts


@contextmanager
def limited_memory(share: float) -> Iterator[None]:
    """Let MLX build ahead of the device only until `share` of its memory limit is in use.

    It waits when an allocation has passed the limit, so arrays that are large beside what the limit leaves free end a
    process: stock's mask of a batch, as MLX's CUDA backend adds it to scores, is `[B, HQ, L, S]` in every layer.
    """
    usual = mx.set_memory_limit(0)
    mx.set_memory_limit(int(share * usual))
    try:
        yield
    finally:
        mx.set_memory_limit(usual)


def measure(args: argparse.Namespace, bench: Bench, lengths: Sequence[int], record: dict[str, Any]) -> dict[str, Any]:
    """The record with the rows of all lengths, or with those of the search for the crossover.

    After each row the JSON file is written anew, so that a run that is cut short has left what it had, marked so.
    """
    done: list[dict[str, Any]] = []

    def row(tokens: int) -> dict[str, Any]:
        done.append(compare(bench, tokens))
        so_far = {"crossover": crossover_of(done)} if args.crossover else {}
        write_json(args.json, {**record, "complete": False, "rows": done, **so_far})
        return done[-1]

    if args.crossover:
        found = find_crossover(row, min(lengths), max(lengths))
    else:
        found = {"rows": [row(tokens) for tokens in sorted(set(lengths))]}
    return {**record, "complete": True, **found}


def as_text(record: dict[str, Any], show_routes: bool) -> str:
    """The record for people."""
    parts = [table(record["rows"])]
    if "crossover" in record:
        parts.append(crossover_lines(record["crossover"]))
    if show_routes:
        lines = [(row["prompt_tokens"], line) for row in record["rows"] for line in row["routes"]]
        parts.append("\n".join(f"{tokens}: {line}" for tokens, line in lines))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Bad input ends in one line on stderr and status 2, before anything is measured."""
    prepare_cuda()
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    lengths = args.lengths or list(CPU_LENGTHS_TOKENS if on_cpu else LENGTHS_TOKENS)
    try:
        check_target(args.json)
        check_plot(args.plot)
        bench, facts = prepare(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    command = " ".join(["flux_mlx.benchmark", *(sys.argv[1:] if argv is None else argv)])
    record = {"command": command, "hardware": hardware(), "versions": versions(), **facts}
    try:
        with limited_memory(args.memory_share):
            record = measure(args, bench, lengths, record)
    except (MemoryError, RuntimeError, ValueError) as error:  # MLX raises these when memory runs out
        kept = f"; {args.json} holds the lengths that were done" if args.json and args.json.exists() else ""
        held = f"{mx.get_peak_memory() / 1e9:.1f} GB"
        parser.exit(1, f"{parser.prog}: stopped: {error}; MLX held at most {held}{kept}\n")
    write_json(args.json, record)
    sys.stdout.write(as_text(record, args.show_routes) + "\n")
    if args.plot:
        plot(args.plot, record)


if __name__ == "__main__":
    main()
