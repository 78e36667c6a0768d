"""Memory of keys and values under both KV policies, as MLX's allocator sees it after prefill, beside stock.

python -m benchmarks.mlx_kv_memory --lengths 128K --num-trials 1 --json FILE
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from benchmarks.mlx_common import figures, flux_model, parse, parser, prompts, save
from flux_mlx.benchmark_compare import in_turn
from flux_mlx.benchmark_models import stock_view
from flux_mlx.benchmark_runs import Run, Work, run_flux, run_stock
from flux_mlx.models import KV_POLICIES, set_kv_policy


def row(args: Any, model: nn.Module, tokens: int) -> dict[str, Any]:
    """Stock and both policies at one length."""
    stock = stock_view(model)

    def kind(policy: str) -> Callable[[Work], Run]:
        def run(work: Work) -> Run:
            set_kv_policy(model, policy)
            return run_flux(model, work)

        return run

    runners = {"stock": lambda work: run_stock(stock, work), **{policy: kind(policy) for policy in KV_POLICIES}}
    work = Work([prompts(args).prompt(tokens)], 16, args.prefill_step_size)
    found = figures(in_turn(runners, work, args.num_trials))
    shares = {f"{policy}_over_stock": found[policy]["kv_bytes"] / found["stock"]["kv_bytes"] for policy in KV_POLICIES}
    return {"tokens": tokens, **shares, "runs": found}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(parser(__doc__, (131072,)), argv)
    model = flux_model(args)
    save(args, "mlx_kv_memory", [row(args, model, tokens) for tokens in args.lengths], omega=args.omega)


if __name__ == "__main__":
    main()
