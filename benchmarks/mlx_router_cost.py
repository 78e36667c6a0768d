"""What routing itself costs: exact prefill with routers that run against the same routes by force, in turn.

python -m benchmarks.mlx_router_cost --lengths 8K --num-trials 15 --json FILE

Routers run twice: as they are used, which is by kernels where the device has them, and by MLX operations. Three more
kinds take the cost apart: routes that the device knows without a router ("routes at hand": what attention by our
kernels costs or saves against the forced routes'), routers that share no projection with attention ("apart"), and
forced routes beside such routers, which nobody asks ("routers aside").
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from benchmarks.mlx_common import flux_model, force_routes, full_layers, parse, parser, prompts, save, timed
from flux_mlx import exact_prefill, kernel_policy
from flux_mlx.benchmark_compare import median_ratio
from flux_mlx.benchmark_parts import AttentionShape
from flux_mlx.benchmark_runs import Run, Work, run_flux
from flux_mlx.cache import CacheList
from flux_mlx.cuda_kernels import device_array
from flux_mlx.models import routed_layers
from flux_mlx.spec import Route

USED, OPERATIONS, FORCED = "as used", "operations", "forced"
AT_HAND, APART, ASIDE = "routes at hand", "apart", "routers aside"
KEYS = {USED: "", OPERATIONS: "_of_operations", AT_HAND: "_of_attention", APART: "_apart", ASIDE: "_of_routers_aside"}


def kinds(args: Any, model: nn.Module) -> dict[str, Callable[[Work], Run]]:
    """The kinds of run, of the same routes."""
    route_layer = exact_prefill._route_layer
    full = {id(attn) for i, attn in routed_layers(model).items() if i in full_layers(args, model)}
    codes = {route: device_array((int(route),)) for route in (Route.SPARSE, Route.FULL)}

    def at_hand(layer: nn.Module, entry: CacheList, _: list[mx.array]) -> None:
        entry.decide(codes[Route.FULL if id(layer.self_attn) in full else Route.SPARSE], [True])

    def apart(layer: nn.Module, entry: CacheList, chunks: list[mx.array]) -> None:
        shared, entry.projected = entry.projected, None
        route_layer(layer, entry, chunks)
        entry.projected = shared

    def aside(layer: nn.Module, entry: CacheList, chunks: list[mx.array]) -> None:
        scratch = layer.self_attn.new_cache()
        exact_prefill.decide_layer(layer, scratch, chunks)
        mx.async_eval(scratch.undecided())
        route_layer(layer, entry, chunks)

    def instead(replacement: Callable[..., None], run: Callable[[Work], Run]) -> Callable[[Work], Run]:
        def patched(work: Work) -> Run:
            with patch.object(exact_prefill, "_route_layer", replacement):
                return run(work)

        return patched

    def routed(work: Work) -> Run:
        force_routes(args, model, forced=False)
        return run_flux(model, work)

    def by_operations(work: Work) -> Run:
        with kernel_policy.without("router"):
            return routed(work)

    def forced(work: Work) -> Run:
        force_routes(args, model, forced=True)
        return run_flux(model, work)

    return {
        USED: routed,
        OPERATIONS: by_operations,
        FORCED: forced,
        AT_HAND: instead(at_hand, routed),
        APART: instead(apart, routed),
        ASIDE: instead(aside, forced),
    }


def has_kernels(model: nn.Module) -> bool:
    """Whether routers run by kernels here."""
    shape = AttentionShape.of(model)
    return all(
        kernel_policy.use_cuda_router(dtype, shape.head_dim)
        for dtype in (str(shape.dtype).rpartition(".")[2], "float32")
    )


def median_interval(values: Sequence[float], miss: float = 0.05) -> tuple[float, float]:
    """Two of the values between which the median of what they were drawn from lies, but for a share `miss` of cases.

    The sign test's interval: no distribution is assumed. Of fewer than 6 values it is the least and the greatest.
    """
    n, ordered = len(values), sorted(values)
    outside, rank = 2 * 0.5**n, 0
    while outside + 2 * math.comb(n, rank + 1) * 0.5**n <= miss:
        rank += 1
        outside += 2 * math.comb(n, rank) * 0.5**n
    return ordered[rank], ordered[n - 1 - rank]


class Cost(NamedTuple):
    """Of one kind of run against forced routes: medians over neighbouring runs."""

    seconds: float
    share: float
    share_interval: tuple[float, float]


def cost(times: Sequence[float], forced: Sequence[float]) -> Cost:
    """From the seconds of both, round by round."""
    pairs = list(zip(times, forced, strict=True))
    shares = [mine / its - 1 for mine, its in pairs]
    return Cost(
        statistics.median(mine - its for mine, its in pairs), statistics.median(shares), median_interval(shares)
    )


def row(args: Any, model: nn.Module, tokens: int) -> dict[str, Any]:
    """All kinds at one length. Costs are medians over neighbouring runs: of differences, and of ratios less 1.

    `share_interval` holds the median that very many rounds would have, 95 times of 100.
    """
    work = Work([prompts(args).prompt(tokens)], 2, args.prefill_step_size)
    found = timed(kinds(args, model), work, args.num_trials)
    times = {name: run["all_prefill_s"] for name, run in found.items()}
    result: dict[str, Any] = {"tokens": tokens, "has_kernels": has_kernels(model)}
    for name, key in KEYS.items():
        its = cost(times[name], times[FORCED])
        result[f"router_s{key}"] = its.seconds
        result[f"share{key}"], result[f"share_interval{key}"] = its.share, its.share_interval
    result["used_over_operations"] = median_ratio(times[USED], times[OPERATIONS])
    return result | {"runs": found}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(parser(__doc__, (8192,)), argv)
    model = flux_model(args)
    save(args, "mlx_router_cost", [row(args, model, tokens) for tokens in args.lengths], omega=args.omega)


if __name__ == "__main__":
    main()
