"""What routing itself costs: exact prefill with routers that run against the same routes by force, in turn.

python -m benchmarks.mlx_router_cost --lengths 8K --num-trials 15 --json FILE

Routers run twice: as they are used, which is by kernels where the device has them, and by MLX operations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from benchmarks.mlx_common import flux_model, force_routes, parse, parser, prompts, save, timed
from flux_mlx import kernel_policy
from flux_mlx.benchmark_compare import median_ratio
from flux_mlx.benchmark_parts import AttentionShape
from flux_mlx.benchmark_runs import Run, Work, run_flux

USED, OPERATIONS, FORCED = "as used", "operations", "forced"


def kinds(args: Any, model: nn.Module) -> dict[str, Callable[[Work], Run]]:
    """The three kinds of run, of the same routes."""

    def routed(work: Work) -> Run:
        force_routes(args, model, forced=False)
        return run_flux(model, work)

    def by_operations(work: Work) -> Run:
        with kernel_policy.without("router"):
            return routed(work)

    def forced(work: Work) -> Run:
        force_routes(args, model, forced=True)
        return run_flux(model, work)

    return {USED: routed, OPERATIONS: by_operations, FORCED: forced}


def has_kernels(model: nn.Module) -> bool:
    """Whether routers run by kernels here."""
    shape = AttentionShape.of(model)
    return all(
        kernel_policy.use_cuda_router(dtype, shape.head_dim)
        for dtype in (str(shape.dtype).rpartition(".")[2], "float32")
    )


def row(args: Any, model: nn.Module, tokens: int) -> dict[str, Any]:
    """All kinds at one length. Costs are medians over neighbouring runs: of differences, and of ratios less 1."""
    work = Work([prompts(args).prompt(tokens)], 2, args.prefill_step_size)
    found = timed(kinds(args, model), work, args.num_trials)
    times = {name: run["all_prefill_s"] for name, run in found.items()}
    result: dict[str, Any] = {"tokens": tokens, "has_kernels": has_kernels(model)}
    for name, key in ((USED, ""), (OPERATIONS, "_of_operations")):
        pairs = zip(times[name], times[FORCED], strict=True)
        result[f"router_s{key}"] = statistics.median(mine - its for mine, its in pairs)
        result[f"share{key}"] = median_ratio(times[name], times[FORCED]) - 1
    result["used_over_operations"] = median_ratio(times[USED], times[OPERATIONS])
    return result | {"runs": found}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(parser(__doc__, (8192,)), argv)
    model = flux_model(args)
    save(args, "mlx_router_cost", [row(args, model, tokens) for tokens in args.lengths], omega=args.omega)


if __name__ == "__main__":
    main()
