"""Where a token's time goes: Python building its graph, MLX handing it to the device, waiting for the device.

    python -m benchmarks.mlx_host_time --bits 4 --lengths 1K 32K --json FILE

One token at a time, each waited for, so the parts add up; mlx-lm's loop lets the host work while the device does, and a
token then takes the longer of host (build and encode) and device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks.mlx_common import flux_model, full_layers, parse, parser, save
from benchmarks.mlx_decode import filled_cache
from flux_mlx.benchmark_models import stock_view
from flux_mlx.benchmark_parts import AttentionShape
from flux_mlx.models import set_kv_policy, set_route

WARM_UP_TOKENS = 8
PARTS = ("build_s", "encode_s", "wait_s", "total_s")


def parts(model: nn.Module, shape: AttentionShape, tokens: int, generated: int) -> dict[str, float]:
    """Median seconds of each part of a token over `tokens` keys."""
    cache, found = filled_cache(model, shape, tokens), []
    for _ in range(WARM_UP_TOKENS + generated):
        mx.synchronize()
        start = time.perf_counter()
        token = model(mx.array([[1]]), cache=cache)[:, -1].argmax(-1)
        built = time.perf_counter()
        mx.async_eval(token)
        encoded = time.perf_counter()
        mx.synchronize()
        end = time.perf_counter()
        found.append((built - start, encoded - built, end - encoded, end - start))
    return dict(zip(PARTS, map(statistics.median, zip(*found[WARM_UP_TOKENS:], strict=True)), strict=True))


def over_stock(model: nn.Module, shape: AttentionShape, tokens: int) -> dict[str, float]:
    """Greatest difference of logits from stock's, over stock's greatest: stock run again, and full layers.

    Of three tokens over the same keys, of which full layers decode two by their compiled steps; 0 is bit for bit.
    """
    stock, found = stock_view(model), []
    set_route(model, "full")
    for one in (stock, stock, model):
        mx.random.seed(0)
        cache = filled_cache(one, shape, tokens)
        logits = mx.stack([one(mx.array([[token]]), cache=cache)[0, -1] for token in (1, 2, 3)])
        found.append(logits.astype(mx.float32))
        mx.eval(found)
    largest = mx.abs(found[0]).max()
    differences = [(mx.abs(other - found[0]).max() / largest).item() for other in found[1:]]
    return dict(zip(("stock_again", "full"), differences, strict=True))


def kinds(args: Any, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The models to measure, by name, set up when they are asked for."""
    yield "stock", stock_view(model)
    for name, route in (("full", "full"), ("spread", full_layers(args, model)), ("sparse", "sparse")):
        set_route(model, route)
        yield name, model
    set_kv_policy(model, "evict")
    yield "sparse, evict", model
    set_kv_policy(model, "keep")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    made = parser(__doc__, (1024, 32768))
    made.add_argument("--generation-tokens", "-g", type=int, default=32, help="(default: %(default)s)")
    args = parse(made, argv)
    model = flux_model(args)
    shape = AttentionShape.of(model)
    rows = [
        {"kind": name, "tokens": tokens, **parts(one, shape, tokens, args.generation_tokens)}
        for tokens in args.lengths
        for name, one in kinds(args, model)
    ]
    differences = {str(tokens): over_stock(model, shape, tokens) for tokens in args.lengths}
    save(args, "mlx_host_time", rows, logits_over_stock=differences)


if __name__ == "__main__":
    main()
