"""What stock commands must not do with a Flux model, refused while they load it, before they write anything."""

from __future__ import annotations

import argparse
import inspect


def refuse_gguf_export() -> None:
    """Refuse to be loaded by `mlx_lm.fuse --export-gguf`.

    It would write the routers into a GGUF file that no reader takes, and it asks no model whether it can be exported:
    it looks at `model_type` alone, which is the base model's. So its parsed flag is read where it is.

    Raises:
        ValueError: The command is under way.
    """
    frame = inspect.currentframe()
    while frame is not None:
        args = frame.f_locals.get("args")
        if isinstance(args, argparse.Namespace) and getattr(args, "export_gguf", False):
            raise ValueError(
                "[Model] a Flux model cannot be exported to GGUF, which has no place for layer routers: leave "
                "--export-gguf out, or export the base model."
            )
        frame = frame.f_back
