"""What stock code does with a Flux model and gives it no other way to see: its frames are looked at."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import mlx.core as mx
from mlx_lm.generate import speculative_generate_step


def _callers() -> Iterator[FrameType]:
    """The frames under way, from the innermost."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _runs(frame: FrameType, function: Callable) -> bool:
    """Whether a frame is a call of `function`, also where its module runs as `python -m` and is another object."""
    code, other = frame.f_code, function.__code__
    return (code.co_filename, code.co_name) == (other.co_filename, other.co_name)


def refuse_gguf_export() -> None:
    """Refuse to be loaded by `mlx_lm.fuse --export-gguf`.

    It would write the routers into a GGUF file that no reader takes, and it asks no model whether it can be exported:
    it looks at `model_type` alone, which is the base model's. So its parsed flag is read where it is.

    Raises:
        ValueError: The command is under way.
    """
    for frame in _callers():
        args = frame.f_locals.get("args")
        if isinstance(args, argparse.Namespace) and getattr(args, "export_gguf", False):
            raise ValueError(
                "[Model] a Flux model cannot be exported to GGUF, which has no place for layer routers: leave "
                "--export-gguf out, or export the base model."
            )


def refuse_long_drafts(model: Any, tokens: mx.array | None) -> None:
    """Refuse to verify more drafts than the model can.

    Calls as short as routers never take for a prompt, decoding among them, are let through without a look at the rest.

    Raises:
        ValueError: `mlx_lm.generate.speculative_generate_step` calls with `model` as its target, and drafts more than
            `FluxModel.max_draft_tokens`.
    """
    if tokens is None or tokens.shape[-1] <= model.flux.router.max_draft_tokens + 1:
        return
    limit = model.max_draft_tokens
    if limit is None or tokens.shape[-1] <= limit + 1:
        return
    for frame in _callers():
        if not _runs(frame, speculative_generate_step) or frame.f_locals["model"] is not model:
            continue
        drafted = frame.f_locals["num_draft_tokens"]
        if drafted > limit:
            raise ValueError(
                f"[FluxModel] expected {limit} draft tokens at most with this route and KV policy, got {drafted}."
            )


def only_evaluates() -> bool:
    """Whether the property that asks is read by mlx-lm's generation, which evaluates what it reads and keeps nothing.

    Its loops over a prompt do so after each chunk. Everything else that reads a cache's state may save it.
    """
    return sys._getframe(2).f_code.co_filename == speculative_generate_step.__code__.co_filename
