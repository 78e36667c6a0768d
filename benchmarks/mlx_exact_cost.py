"""What exact prefill costs beside chunked prefill at equal routes: time and peak memory, all layers full, and spread.

    python -m benchmarks.mlx_exact_cost --lengths 32K --num-trials 5 --json FILE

Chunked prefill is mlx-lm's `generate_step`; over the Flux model with forced routes it takes those of the exact
one. The design allows exact prefill one buffer of hidden states more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from benchmarks.mlx_common import flux_model, force_routes, parse, parser, prompts, save, timed
from flux_mlx.benchmark_compare import median_ratio
from flux_mlx.benchmark_models import stock_view
from flux_mlx.benchmark_parts import AttentionShape
from flux_mlx.benchmark_runs import Run, Work, run_flux, run_stock
from flux_mlx.models import set_route


def kinds(args: Any, model: nn.Module) -> dict[str, Callable[[Work], Run]]:
    """The four kinds of run."""
    stock = stock_view(model)

    def full(work: Work) -> Run:
        set_route(model, "full")
        return run_flux(model, work)

    def spread(run: Callable[[nn.Module, Work], Run]) -> Callable[[Work], Run]:
        def routed(work: Work) -> Run:
            force_routes(args, model, forced=True)
            return run(model, work)

        return routed

    return {
        "chunked, full": lambda work: run_stock(stock, work),
        "exact, full": full,
        "chunked, spread": spread(run_stock),
        "exact, spread": spread(run_flux),
    }


def row(args: Any, model: nn.Module, tokens: int) -> dict[str, Any]:
    """All kinds at one length."""
    work = Work([prompts(args).prompt(tokens)], 4, args.prefill_step_size)
    found = timed(kinds(args, model), work, args.num_trials)
    buffer_bytes = tokens * model.args.hidden_size * AttentionShape.of(model).dtype.size
    result: dict[str, Any] = {"tokens": tokens, "hidden_buffer_bytes": buffer_bytes, "runs": found}
    for routes in ("full", "spread"):
        exact, chunked = found[f"exact, {routes}"], found[f"chunked, {routes}"]
        result[f"exact_over_chunked_{routes}"] = median_ratio(exact["all_prefill_s"], chunked["all_prefill_s"])
        result[f"peak_over_allowed_{routes}"] = exact["peak_bytes"] / (chunked["peak_bytes"] + buffer_bytes)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(parser(__doc__, (8192, 32768)), argv)
    model = flux_model(args)
    save(args, "mlx_exact_cost", [row(args, model, tokens) for tokens in args.lengths], omega=args.omega)


if __name__ == "__main__":
    main()
