"""What routing itself costs: exact prefill with routers that run against the same routes by force, in turn.

python -m benchmarks.mlx_router_cost --lengths 8K --num-trials 15 --json FILE
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from benchmarks.mlx_common import flux_model, force_routes, parse, parser, prompts, save, timed
from flux_mlx.benchmark_runs import Run, Work, run_flux


def row(args: Any, model: nn.Module, tokens: int) -> dict[str, Any]:
    """Both at one length; the cost is the median of the differences of neighbouring runs."""

    def kind(forced: bool) -> Callable[[Work], Run]:
        def run(work: Work) -> Run:
            force_routes(args, model, forced)
            return run_flux(model, work)

        return run

    work = Work([prompts(args).prompt(tokens)], 2, args.prefill_step_size)
    found = timed({"routers run": kind(False), "forced": kind(True)}, work, args.num_trials)
    pairs = zip(found["routers run"]["all_prefill_s"], found["forced"]["all_prefill_s"], strict=True)
    cost_s = statistics.median(mine - its for mine, its in pairs)
    return {"tokens": tokens, "router_s": cost_s, "share": cost_s / found["forced"]["prefill_s"], "runs": found}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(parser(__doc__, (8192,)), argv)
    model = flux_model(args)
    save(args, "mlx_router_cost", [row(args, model, tokens) for tokens in args.lengths], omega=args.omega)


if __name__ == "__main__":
    main()
