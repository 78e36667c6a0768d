"""Where a model is: a directory here, else a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.utils import _download


def looks_like_hub_id(name: str) -> bool:
    """Whether a name that is no directory here is worth a question to the hub."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def find_directory(name: str, **hub: Any) -> Path:
    """A model directory here, or the hub's copied here.

    Args:
        name: Directory or hub id.
        hub: `revision` and `allow_patterns` at the hub.

    Raises:
        FileNotFoundError: Neither; the message is one line.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not looks_like_hub_id(name):
        raise FileNotFoundError(f"[load] {name} is neither a model directory here nor a hub id.")
    try:
        return Path(_download(name, **hub))
    except Exception as error:  # the hub client raises its own, requests' and the operating system's
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"[load] {name} is neither a model directory here, nor could the hub give it: {reason}"
        ) from error
