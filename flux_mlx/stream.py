"""Generation with exact routing: layer-by-layer prefill, then mlx-lm's own `stream_generate` from the last token."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generate_step, generation_stream, wired_limit
from mlx_lm.generate import stream_generate as stock_stream_generate
from mlx_lm.models.cache import make_prompt_cache

from flux_mlx.exact_prefill import DEFAULT_STEP_TOKENS, prefill
from flux_mlx.models import FluxModel, routed_layers

QUANTIZATION = ("kv_bits", "kv_group_size", "quantized_kv_start")


def warn_if_too_long(model: nn.Module, tokens: int) -> None:
    """Warn (UserWarning) if `tokens` are more than the positions that the model was trained on."""
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if limit and tokens > limit:
        warnings.warn(
            f"the prompt has {tokens} tokens, the model's context is {limit}: expect poor answers", stacklevel=2
        )


def check_draft_tokens(model: nn.Module, num_draft_tokens: int) -> None:
    """Refuse more drafts than the model can verify.

    Raises:
        ValueError: More than `FluxModel.max_draft_tokens`.
    """
    limit = model.max_draft_tokens if isinstance(model, FluxModel) else None
    if limit is not None and num_draft_tokens > limit:
        raise ValueError(
            f"[stream_generate] expected {limit} draft tokens at most with this route and KV policy, "
            f"got {num_draft_tokens}."
        )


def _check_quantization(model: nn.Module, kv_bits: int | None = None, kv_group_size: int = 64) -> None:
    """Quantise one key of each size, so that settings which MLX refuses are refused before a long prefill."""
    sizes = {attn.pooled_dim for attn in routed_layers(model).values()} if kv_bits is not None else ()
    for head_dim in sizes:
        try:
            mx.quantize(mx.zeros((1, head_dim)), group_size=kv_group_size, bits=kv_bits)
        except ValueError as error:
            raise ValueError(
                f"[stream_generate] keys of head dim {head_dim} cannot be quantised with kv_bits {kv_bits} and "
                f"kv_group_size {kv_group_size}: {error}"
            ) from error


def _after(prompt: mx.array, processor: Any) -> Any:
    """A logits processor that sees the prompt in front of the tokens which it is given, as in stock generation."""
    return lambda tokens, logits: processor(mx.concatenate([prompt, tokens]), logits)


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    *,
    prompt_cache: list[Any] | None = None,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int = 3,
    prefill_step_size: int = DEFAULT_STEP_TOKENS,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate text; every layer is routed on the whole prompt.

    Args:
        model: A Flux model.
        tokenizer: From `flux_mlx.load` or `mlx_lm.load`.
        prompt: Token ids, 1 or more: those that follow what `prompt_cache` holds.
        prompt_cache: From `model.make_cache()` (followed by the draft model's, if there is one); updated in place.
        draft_model: Draft model for speculative decoding, with the same tokenizer.
        num_draft_tokens: Tokens drafted at a time, `model.max_draft_tokens` at most.
        prefill_step_size: Tokens of a prefill chunk.
        prompt_progress_callback: Called with (layers done, layers) during prefill.
        kwargs: Passed on to mlx-lm's `stream_generate`: max_tokens, sampler, kv_bits, ...

    Yields:
        mlx-lm's `GenerationResponse`; `prompt_tokens` and `prompt_tps` are those of the whole prompt.

    Raises:
        ValueError: Empty prompt, or too many draft tokens.
    """
    if not prompt:
        raise ValueError("[stream_generate] prompt must hold 1 or more token ids, got none.")
    if kwargs.get("max_tokens") == 0:
        raise ValueError("[stream_generate] max_tokens must not be 0 (use -1 for no limit).")
    _check_quantization(model, **{name: kwargs[name] for name in ("kv_bits", "kv_group_size") if name in kwargs})
    n_layers = len(model.layers)
    if prompt_cache is None:
        prompt_cache = make_prompt_cache(model) + (make_prompt_cache(draft_model) if draft_model else [])
    if draft_model is not None:
        check_draft_tokens(model, num_draft_tokens)
        kwargs |= {"draft_model": draft_model, "num_draft_tokens": num_draft_tokens}
    start = time.perf_counter()
    with wired_limit(model, [generation_stream]), mx.stream(generation_stream):
        tokens = mx.array(prompt)
        own, draft = prompt_cache[:n_layers], prompt_cache[n_layers:]
        quantization = {name: kwargs[name] for name in QUANTIZATION if name in kwargs}
        settings = {"prefill_step_size": prefill_step_size, **quantization}
        last = prefill(model, tokens, own, prompt_progress_callback=prompt_progress_callback, **settings)
        if draft_model is not None and tokens.size > 1:  # needs no routing: stock's own prefill
            for _ in generate_step(tokens[:-1], draft_model, max_tokens=0, prompt_cache=draft, **settings):
                pass
        prompt_cache[:] = own + draft  # quantised entries are new ones
    if processors := kwargs.get("logits_processors"):
        kwargs["logits_processors"] = [_after(tokens[:-1], processor) for processor in processors]
    prompt_tps = None
    for response in stock_stream_generate(model, tokenizer, last, prompt_cache=prompt_cache, **kwargs):
        if prompt_tps is None:
            prompt_tps = len(prompt) / (time.perf_counter() - start)
        yield dataclasses.replace(response, prompt_tokens=len(prompt), prompt_tps=prompt_tps)
