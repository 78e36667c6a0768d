"""What a Flux model gains in stock's commands, which prefill in chunks: beside the stock model, by force and routed.

    python -m benchmarks.mlx_stock_commands --lengths 1K 8K 32K --num-trials 5 --json FILE

All three run by mlx-lm's own `generate_step`. Routes are those of the spread, by force or by routers that decide so at
the end of every chunk; within sink and window ("is_dense") they make no difference to attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from benchmarks.mlx_common import flux_model, force_routes, parse, parser, pattern_of, prompts, save, timed
from flux_mlx.benchmark_compare import median_ratio
from flux_mlx.benchmark_models import stock_view
from flux_mlx.benchmark_runs import Run, Work, run_stock

STOCK, FORCED, ROUTED = "stock", "forced", "routed"
TIMES = {"prefill": "all_prefill_s", "first_token": "all_first_token_s"}


def kinds(args: Any, model: nn.Module) -> dict[str, Callable[[Work], Run]]:
    """The three kinds of run."""
    stock = stock_view(model)

    def flux(forced: bool) -> Callable[[Work], Run]:
        def run(work: Work) -> Run:
            force_routes(args, model, forced)
            return run_stock(model, work)

        return run

    return {STOCK: lambda work: run_stock(stock, work), FORCED: flux(True), ROUTED: flux(False)}


def row(args: Any, model: nn.Module, tokens: int) -> dict[str, Any]:
    """All kinds at one length; speed-ups are medians over neighbouring runs of stock's time over Flux's."""
    found = timed(kinds(args, model), Work([prompts(args).prompt(tokens)], 2, args.prefill_step_size), args.num_trials)
    speedups = {
        f"{name}_speedup_{kind}": median_ratio(found[STOCK][times], found[kind][times])
        for name, times in TIMES.items()
        for kind in (FORCED, ROUTED)
    }
    return {"tokens": tokens, "is_dense": pattern_of(args).is_dense(tokens), **speedups, "runs": found}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(parser(__doc__, (1024, 8192, 32768)), argv)
    model = flux_model(args)
    save(args, "mlx_stock_commands", [row(args, model, tokens) for tokens in args.lengths], omega=args.omega)


if __name__ == "__main__":
    main()
