"""Trained routers that come with this package, by the name of their model."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "data" / "routers"


def packaged_names() -> list[str]:
    """What there is."""
    return sorted(path.name for path in _FOLDER.iterdir() if path.is_dir())


def find_routers(name: str | Path) -> Path:
    """A router file or directory here, else packaged routers of that name.

    Raises:
        FileNotFoundError: Neither; the message lists the names.
    """
    path = Path(name)
    if path.exists():
        return path
    if str(name) in packaged_names():
        return _FOLDER / name
    raise FileNotFoundError(
        f"[find_routers] expected a file, a directory or one of {', '.join(packaged_names())}, got {name}."
    )
