"""One timed run of a prompt (or a batch of them): stock mlx-lm's own generation, and Flux's, measured alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from flux_mlx.cache import describe_routes, routes
from flux_mlx.exact_prefill import DEFAULT_STEP_TOKENS, prefill
from flux_mlx.spec import Route


@dataclass(frozen=True)
class Work:
    """What a run does.

    Args:
        prompts: Token ids, one prompt a row, of 2 tokens or more and of one length.
        generation_tokens: Tokens to generate for every row, 2 or more.
        prefill_step_size: Tokens of a prefill chunk.
        before_row: Called with the index of a row before Flux prefills it, to change its routes.
        batch_step_size: Tokens of one row in a chunk of a batch that stock prefills; None for `prefill_step_size`.
    """

    prompts: list[list[int]]
    generation_tokens: int = 64
    prefill_step_size: int = DEFAULT_STEP_TOKENS
    before_row: Callable[[int], None] | None = None
    batch_step_size: int | None = None


@dataclass(frozen=True)
class Run:
    """What one run took.

    Args:
        prefill_s: From the start until every prompt but its last token is in the cache.
        first_token_s: From the start until every row has its first token.
        token_s: Median time of a decoding step, which gives every row one token.
        mean_token_s: Its mean, which holds the growth of the cache too.
        peak_bytes: Peak of MLX's allocator, weights included.
        kv_bytes: What the allocator held more after prefill than before: the caches.
        sparse_layers: Layers routed sparse, the mean over the rows; 0 for stock.
        routes: One line a row.
    """

    prefill_s: float
    first_token_s: float
    token_s: float
    mean_token_s: float
    peak_bytes: int
    kv_bytes: int
    sparse_layers: float = 0.0
    routes: list[str] = field(default_factory=list)


class _Meter:
    """Times and memory of a run: made at its start, told of its events."""

    def __init__(self) -> None:
        mx.synchronize(generation_stream)
        mx.synchronize()
        mx.clear_cache()
        self._held_bytes = mx.get_active_memory()
        mx.reset_peak_memory()
        self._kv_bytes, self._peak_bytes, self._prefill_s = 0, 0, 0.0
        self._token_s: list[float] = []
        self._sparse_layers: list[int] = []
        self._routes: list[str] = []
        self._start = time.perf_counter()

    def prefilled(self) -> None:
        """The caches hold the prompts."""
        self._prefill_s = time.perf_counter() - self._start
        self._kv_bytes = mx.get_active_memory() - self._held_bytes

    def token(self) -> None:
        """Every row has one more token."""
        self._token_s.append(time.perf_counter() - self._start)
        self._peak_bytes = mx.get_peak_memory()

    def note_routes(self, cache: list[Any]) -> None:
        """Remember the routes of one more row; reading them may wait for the device."""
        self._sparse_layers.append(sum(route == Route.SPARSE for route in routes(cache)))
        self._routes.append(describe_routes(cache))

    def result(self) -> Run:
        """The run's figures."""
        steps = [after - before for before, after in itertools.pairwise(self._token_s)]
        return Run(
            prefill_s=self._prefill_s,
            first_token_s=self._token_s[0],
            token_s=statistics.median(steps),
            mean_token_s=statistics.fmean(steps),
            peak_bytes=self._peak_bytes,
            kv_bytes=self._kv_bytes,
            sparse_layers=statistics.fmean(self._sparse_layers or [0]),
            routes=self._routes,
        )


def run_stock(model: nn.Module, work: Work) -> Run:
    """mlx-lm's generation as it is: `generate_step` for one prompt, `BatchGenerator` for more."""
    meter = _Meter()
    if len(work.prompts) > 1:
        _decode_batch(_batch_generator(model, work), work.prompts, None, meter)
        return meter.result()

    def report(done: int, total: int) -> None:
        if done == total - 1:
            meter.prefilled()

    cache = make_prompt_cache(model)
    with wired_limit(model, [generation_stream]):
        for _ in generate_step(
            mx.array(work.prompts[0]),
            model,
            max_tokens=work.generation_tokens,
            prompt_cache=cache,
            prefill_step_size=work.prefill_step_size,
            prompt_progress_callback=report,
        ):
            meter.token()
    meter.note_routes(cache)
    return meter.result()


def run_flux(model: nn.Module, work: Work) -> Run:
    """Exact prefill, then mlx-lm's decoding, as `flux_mlx.generate`, but with one wait after prefill, which stock has.

    The rows of a batch are prefilled one by one, each with its own routes, and decoded together.
    """
    if len(work.prompts) > 1:
        return _run_flux_batch(model, work)
    meter = _Meter()
    with wired_limit(model, [generation_stream]):
        last, cache = _prefill_row(model, work, 0)
        meter.prefilled()
        for _ in generate_step(last, model, max_tokens=work.generation_tokens, prompt_cache=cache):
            meter.token()
    meter.note_routes(cache)
    return meter.result()


def _run_flux_batch(model: nn.Module, work: Work) -> Run:
    meter = _Meter()
    caches = []
    with wired_limit(model, [generation_stream]):
        for row in range(len(work.prompts)):
            caches.append(_prefill_row(model, work, row)[1])
            meter.note_routes(caches[-1])
            mx.clear_cache()
        meter.prefilled()
        _decode_batch(_batch_generator(model, work), [row[-1:] for row in work.prompts], caches, meter)
    return meter.result()


def _prefill_row(model: nn.Module, work: Work, row: int) -> tuple[mx.array, list[Any]]:
    """The last token of a row and its cache, when the device is done."""
    if work.before_row is not None:
        work.before_row(row)
    cache = model.make_cache()
    with mx.stream(generation_stream):
        last = prefill(model, mx.array(work.prompts[row]), cache, prefill_step_size=work.prefill_step_size)
    mx.synchronize(generation_stream)
    return last, cache


def _batch_generator(model: nn.Module, work: Work) -> BatchGenerator:
    rows = len(work.prompts)
    return BatchGenerator(
        model,
        max_tokens=work.generation_tokens,
        prefill_batch_size=rows,
        completion_batch_size=rows,
        prefill_step_size=work.batch_step_size or work.prefill_step_size,
    )


def _decode_batch(
    generator: BatchGenerator, prompts: list[list[int]], caches: list[list[Any]] | None, meter: _Meter
) -> None:
    """Generate for all rows at once; `caches`, if given, is emptied, so that merged caches are not held twice."""
    generator.insert(prompts, caches=caches)
    prefilling = caches is None
    if caches is not None:
        caches.clear()
    unfinished = len(prompts)
    try:
        while unfinished:
            prompted, generated = generator.next()
            if prefilling and prompted and all(response.end_of_segment for response in prompted):
                meter.prefilled()
                prefilling = False
            if generated:
                meter.token()
            unfinished -= sum(response.finish_reason is not None for response in generated)
    finally:
        generator.close()
