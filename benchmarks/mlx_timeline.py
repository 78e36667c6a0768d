"""What the GPU does while a prompt is prefilled or tokens are decoded: kernel by kernel, and where it waits.

    python -m benchmarks.mlx_timeline --prefill 1K 8K --decode 128K --json FILE

CUPTI, NVIDIA's tracing library, tells when every kernel of the process began and ended; PyTorch, which brings it, must
be installed with CUDA. Busy is the union of the kernels' times, idle the rest between the first and the last one.
Tracing itself costs the host some microseconds a kernel, so the wall time without it stands beside. Of a prompt all is
traced that comes before the first token, of decoding whole tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream

from benchmarks.mlx_common import flux_model, force_routes, full_layers, parse, parser, pattern_of, prompts, save
from benchmarks.mlx_decode import filled_cache
from flux_mlx.benchmark import length
from flux_mlx.benchmark_models import stock_view
from flux_mlx.benchmark_parts import AttentionShape, Ceiling, visible_share
from flux_mlx.exact_prefill import prefill
from flux_mlx.models import set_route

WARM_UP_TOKENS = 6
TOKENS = 16
NAMED_KERNELS = 16
NAMED_GAPS = 6
LONG_GAP_US = 20.0
NAME_CHARACTERS = 90
NOISE = ("void ", "mlx::core::cu::", "mlx::core::", "cuda::std::__4::", "(anonymous namespace)::")
ATTENTION = ("sdpa", "lean_reduction", "flux_decode")  # in the names of kernels that attend


class Kernel(NamedTuple):
    """A kernel or a copy on the device; times in microseconds."""

    name: str
    start: float
    stop: float

    @property
    def us(self) -> float:
        """How long it took."""
        return self.stop - self.start


def traced(run: Callable[[], Any]) -> list[Kernel]:
    """What the device did of `run`, in the order of beginning; work from before is waited for, and left out.

    Raises:
        ImportError: PyTorch is not installed.
    """
    import torch  # nothing else here needs it

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = [
        Kernel(event.name(), event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3)
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def gaps(kernels: Sequence[Kernel]) -> Iterator[tuple[float, str, str]]:
    """The times in which nothing ran: microseconds, the kernel that ended last before, the one behind."""
    last = kernels[0]
    for kernel in kernels[1:]:
        if kernel.start > last.stop:
            yield kernel.start - last.stop, last.name, kernel.name
        if kernel.stop > last.stop:
            last = kernel


def short(name: str) -> str:
    """A kernel's name without what every template says."""
    for noise in NOISE:
        name = name.replace(noise, "")
    return name[:NAME_CHARACTERS]


def summary(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Busy and idle time, the kernels that took most, the longest gaps; times in microseconds.

    Args:
        kernels: In the order of beginning.

    Raises:
        ValueError: No kernel was seen.
    """
    if not kernels:
        raise ValueError("[summary] expected kernels, got none: CUPTI saw nothing of this process.")
    idle = list(gaps(kernels))
    idle_us = sum(us for us, *_ in idle)
    span_us = max(kernel.stop for kernel in kernels) - kernels[0].start
    return {
        "span_us": span_us,
        "busy_us": span_us - idle_us,
        "idle_us": idle_us,
        "idle_in_long_gaps_us": sum(us for us, *_ in idle if us > LONG_GAP_US),
        "long_gaps": sum(us > LONG_GAP_US for us, *_ in idle),
        "overlapped_us": sum(kernel.us for kernel in kernels) - (span_us - idle_us),
        "attention_us": sum(kernel.us for kernel in kernels if any(word in kernel.name for word in ATTENTION)),
        "launches": len(kernels),
        "kernels": heaviest(kernels),
        "longest_gaps": [
            {"us": us, "behind": short(behind), "before": short(before)}
            for us, behind, before in sorted(idle, reverse=True)[:NAMED_GAPS]
        ],
    }


def heaviest(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """The kernels that took most of the time, by name, and all of our own."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[short(kernel.name)].append(kernel.us)
    names = sorted(times, key=lambda name: -sum(times[name]))
    names = names[:NAMED_KERNELS] + [name for name in names[NAMED_KERNELS:] if "flux_" in name]
    return [
        {
            "name": name,
            "launches": len(times[name]),
            "total_us": sum(times[name]),
            "median_us": statistics.median(times[name]),
        }
        for name in names
    ]


class PromptDone(Exception):  # noqa: N818 (no error: it ends stock's generation)
    """The prompt but its last token is in the cache."""


def stock_prefill(model: nn.Module, tokens: mx.array, step: int, cache: list[Any] | None = None) -> None:
    """mlx-lm's generation of a prompt, int `[L]`, up to where it would feed the last token; fills `cache` if given."""

    def report(done: int, total: int) -> None:
        if done == total - 1:
            raise PromptDone

    with suppress(PromptDone):
        options = {"prompt_cache": cache, "prefill_step_size": step, "prompt_progress_callback": report}
        next(generate_step(tokens, model, **options))


def flux_prefill(model: nn.Module, tokens: mx.array, step: int) -> None:
    """Exact prefill of the same tokens."""
    with mx.stream(generation_stream):
        prefill(model, tokens, model.make_cache(), prefill_step_size=step)
    mx.synchronize(generation_stream)


def prefill_kinds(args: argparse.Namespace, model: nn.Module) -> Iterator[tuple[str, Callable[[mx.array, int], None]]]:
    """Stock; Flux by force, with its routers, and both in stock's chunks: name and prefill, set up when asked for."""
    stock = stock_view(model)
    yield "stock", lambda tokens, step: stock_prefill(stock, tokens, step)
    for chunks, run in (("", flux_prefill), (", stock's chunks", stock_prefill)):
        for name, forced in (("forced", True), ("routed", False)):
            force_routes(args, model, forced)
            yield name + chunks, lambda tokens, step, run=run: run(model, tokens, step)


def prefills(args: argparse.Namespace, model: nn.Module, tokens: int) -> Iterator[dict[str, Any]]:
    """One row for each kind of prefill: its median time without tracing, after one run that is not counted; a trace."""
    prompt = mx.array(prompts(args).prompt(tokens))
    for name, run in prefill_kinds(args, model):
        times = []
        for _ in range(1 + args.num_trials):
            mx.clear_cache()
            start = time.perf_counter()
            run(prompt, args.prefill_step_size)
            times.append(time.perf_counter() - start)
        trace = traced(lambda run=run: run(prompt, args.prefill_step_size))
        yield {"kind": name, "tokens": tokens, "of": "prefill", "untraced_s": statistics.median(times[1:])} | summary(
            trace
        )


def decoded(model: nn.Module, shape: AttentionShape, tokens: int) -> tuple[float, list[Kernel]]:
    """Median seconds of a token without tracing, and what the device does for `TOKENS` of them."""
    generated = WARM_UP_TOKENS + 2 * TOKENS + 1  # mlx-lm begins a token before it gives the one before
    steps = generate_step(mx.array([1]), model, prompt_cache=filled_cache(model, shape, tokens), max_tokens=generated)

    def some(n: int) -> list[float]:
        return [time.perf_counter() for _ in itertools.islice(steps, n)]

    some(WARM_UP_TOKENS)
    stamps = some(TOKENS)
    trace = traced(lambda: some(TOKENS))
    return statistics.median(after - before for before, after in itertools.pairwise(stamps)), trace


def decodes(args: argparse.Namespace, model: nn.Module, tokens: int) -> Iterator[dict[str, Any]]:
    """One row for each kind of decoding: stock, full layers, the spread; Flux's with the ceiling of the device."""
    shape, full = AttentionShape.of(model), full_layers(args, model)
    kinds = (("stock", "full", 0), ("full", "full", 0), ("spread", full, shape.layers - len(full)))
    stock: dict[str, Any] = {}
    for name, route, sparse_layers in kinds:
        set_route(model, route)
        token_s, trace = decoded(model if stock else stock_view(model), shape, tokens)
        row = {"kind": name, "tokens": tokens, "of": f"{TOKENS} tokens decoded", "untraced_s": token_s} | summary(trace)
        row["token_busy_us"] = row["busy_us"] / TOKENS
        if stock:
            share = visible_share(pattern_of(args), 1, tokens)
            row |= device_ceiling(stock, row, shape.layers, sparse_layers, share)
        stock = stock or row
        yield row
    force_routes(args, model, forced=False)


def device_ceiling(
    stock: dict[str, Any], flux: dict[str, Any], layers: int, sparse_layers: int, share: float
) -> dict[str, float | None]:
    """Amdahl's ceiling of decoding from traces alone: what the device would be busy if sparse layers were ideal.

    Args:
        stock: Stock's `summary`.
        flux: Flux's.
        layers: Layers that attend.
        sparse_layers: Of them, sparse in Flux's.
        share: Of the keys, what a sparse layer's query sees.

    Returns:
        `ceiling_of_device`: stock's busy time over the ideal one; `fraction_of_device_ceiling`: the ideal one over
        Flux's. None if no kernel of stock's is known to attend.
    """
    ideal_us = Ceiling(stock["busy_us"], stock["attention_us"] / layers, share, layers, sparse_layers).ideal_s
    if not stock["attention_us"] or ideal_us is None:
        return {"ceiling_of_device": None, "fraction_of_device_ceiling": None}
    return {
        "ceiling_of_device": stock["busy_us"] / ideal_us,
        "fraction_of_device_ceiling": ideal_us / flux["busy_us"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    made = parser(__doc__, None)
    made.add_argument("--prefill", type=length, nargs="*", default=[1024, 8192], metavar="TOKENS", help="prompts")
    made.add_argument("--decode", type=length, nargs="*", default=[131072], metavar="TOKENS", help="keys held")
    args = parse(made, argv)
    model = flux_model(args)
    rows = [row for tokens in args.prefill for row in prefills(args, model, tokens)]
    rows += [row for tokens in args.decode for row in decodes(args, model, tokens)]
    save(args, "mlx_timeline", rows, omega=args.omega)


if __name__ == "__main__":
    main()
