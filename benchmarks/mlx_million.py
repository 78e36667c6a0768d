"""A very long prompt on a small shape: exact routing, KV policy evict; time and memory layer by layer, then decode.

    python -m benchmarks.mlx_million --lengths 256K 512K 1M --chunk 8192 --json FILE

What must be flat: what a sparse layer leaves behind, at any length. What may grow with the prompt: one buffer of hidden
states, and the keys of full layers.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream

from benchmarks.mlx_common import flux_model, parse, parser, prompts, save
from flux_mlx.benchmark_parts import AttentionShape
from flux_mlx.cache import routes
from flux_mlx.exact_prefill import prefill
from flux_mlx.models import set_kv_policy
from flux_mlx.spec import Route


class Watch:
    """Time and memory after each layer: a progress callback."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = []
        self._start = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Note the layer that has just been handed over, when the device is done with it."""
        mx.synchronize(generation_stream)
        now = time.perf_counter()
        if done:
            memory = {"held_bytes": mx.get_active_memory(), "peak_bytes": mx.get_peak_memory()}
            self.layers.append({"layer": done - 1, "seconds": now - self._start, **memory})
        mx.reset_peak_memory()
        self._start = time.perf_counter()


def decode_s(model: nn.Module, last: mx.array, cache: list[Any], tokens: int) -> float:
    """Median time of a token."""
    stamps = []
    for _ in generate_step(last, model, prompt_cache=cache, max_tokens=tokens):
        stamps.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(stamps))


def row(args: Any, model: nn.Module, tokens: int) -> dict[str, Any]:
    """One prompt."""
    watch, cache = Watch(), model.make_cache()
    prompt = mx.array(prompts(args).prompt(tokens))
    mx.clear_cache()
    start, held_bytes = time.perf_counter(), mx.get_active_memory()
    with mx.stream(generation_stream):
        step = args.prefill_step_size
        last = prefill(model, prompt, cache, prefill_step_size=step, prompt_progress_callback=watch)
    mx.synchronize(generation_stream)
    seconds, kv_bytes = time.perf_counter() - start, mx.get_active_memory() - held_bytes
    taken = routes(cache)
    for noted, entry, route in zip(watch.layers, cache, taken, strict=True):
        noted |= {"route": route.name, "cache_bytes": entry.nbytes}
    sparse = [noted["cache_bytes"] for noted in watch.layers if noted["route"] == Route.SPARSE.name]
    return {
        "tokens": tokens,
        "prefill_s": seconds,
        "kv_bytes": kv_bytes,
        "peak_bytes": max(noted["peak_bytes"] for noted in watch.layers),
        "hidden_buffer_bytes": tokens * model.args.hidden_size * AttentionShape.of(model).dtype.size,
        "largest_sparse_cache_bytes": max(sparse, default=0),
        "token_s": decode_s(model, last, cache, 32),
        "layers": watch.layers,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    made = parser(__doc__, (262144, 524288, 1048576))
    made.set_defaults(shape="small", prefill_step_size=8192)
    args = parse(made, argv)
    model = flux_model(args)
    set_kv_policy(model, "evict")
    row(args, model, 2 * args.prefill_step_size)
    save(args, "mlx_million", [row(args, model, tokens) for tokens in args.lengths], omega=args.omega)


if __name__ == "__main__":
    main()
