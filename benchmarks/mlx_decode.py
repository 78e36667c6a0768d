"""Decode of whole models over caches filled with random keys: stock, Flux, and Flux under evict, with the ceiling.

    python -m benchmarks.mlx_decode --bits 4 --lengths 32K 128K 256K --omegas 0.7 0.77 --json FILE

No prompt is computed, which at these lengths would take minutes: what a token costs depends on the number of keys, not
on what they are. The loop is mlx-lm's `generate_step`, as everywhere.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.mlx_common import flux_model, parse, parser, pattern_of, save
from flux_mlx.benchmark_compare import median_ratio
from flux_mlx.benchmark_models import stock_view
from flux_mlx.benchmark_parts import AttentionShape, Ceiling, decode_seconds, dense, grow, sparse_decode, visible_share
from flux_mlx.benchmark_routes import spread_full_layers
from flux_mlx.models import KV_POLICIES, routed_layers, set_kv_policy, set_route

WARM_UP_TOKENS = 4


def filled_cache(model: nn.Module, shape: AttentionShape, tokens: int) -> list[Any]:
    """A cache of the model that holds random keys and values."""
    cache = make_prompt_cache(model)
    for entry in cache:
        grow(getattr(entry, "kv", entry), shape, tokens)
    return cache


def token_s(model: nn.Module, shape: AttentionShape, tokens: int, generated: int) -> float:
    """Median time of a token over `tokens` keys."""
    stamps = []
    cache = filled_cache(model, shape, tokens)
    for _ in generate_step(mx.array([1]), model, prompt_cache=cache, max_tokens=WARM_UP_TOKENS + generated):
        stamps.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    return statistics.median(steps[WARM_UP_TOKENS:])


def rows(args: Any, model: nn.Module, tokens: int) -> list[dict[str, Any]]:
    """One row for each Omega at one length; stock is timed in turn with all of them."""
    shape, stock, pattern = AttentionShape.of(model), stock_view(model), pattern_of(args)
    layers = sorted(routed_layers(model))
    parts = decode_seconds(shape, tokens, {"dense": dense, "sparse": sparse_decode(pattern)})

    def flux(omega: float, policy: str) -> float:
        set_route(model, spread_full_layers(layers, omega))
        set_kv_policy(model, policy)
        return token_s(model, shape, tokens, args.generation_tokens)

    kinds: dict[Any, Callable[[], float]] = {"stock": lambda: token_s(stock, shape, tokens, args.generation_tokens)}
    for omega, policy in itertools.product(args.omegas, KV_POLICIES):
        kinds[omega, policy] = lambda omega=omega, policy=policy: flux(omega, policy)
    times: dict[Any, list[float]] = {kind: [] for kind in kinds}
    for _ in range(args.num_trials):
        for kind, run in kinds.items():
            times[kind].append(run())
    medians = {kind: statistics.median(found) for kind, found in times.items()}
    found = []
    for omega in args.omegas:
        sparse_layers = len(layers) - len(spread_full_layers(layers, omega))
        share = visible_share(pattern, 1, tokens)
        ceiling = Ceiling(medians["stock"], parts["dense"], share, len(layers), sparse_layers)
        found.append(
            {
                "tokens": tokens,
                "sparse_layers": sparse_layers,
                "stock_token_s": medians["stock"],
                **{f"{policy}_token_s": medians[omega, policy] for policy in KV_POLICIES},
                **ceiling.columns(
                    medians[omega, "keep"], parts["sparse"], median_ratio(times["stock"], times[omega, "keep"])
                ),
                "evict_speedup": median_ratio(times["stock"], times[omega, "evict"]),
                "least_token_s": {"stock": min(times["stock"])}
                | {policy: min(times[omega, policy]) for policy in KV_POLICIES},
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    made = parser(__doc__, (32768, 131072, 262144))
    made.add_argument("--omegas", type=float, nargs="+", default=[0.7], help="shares of sparse layers")
    made.add_argument("--generation-tokens", "-g", type=int, default=32, help="(default: %(default)s)")
    args = parse(made, argv)
    model = flux_model(args)
    found = [row for tokens in args.lengths for row in rows(args, model, tokens)]
    save(args, "mlx_decode", found)


if __name__ == "__main__":
    main()
