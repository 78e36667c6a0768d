"""What `flux_mlx.benchmark` writes: a JSON record, a table, a plot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

PACKAGES = ("flux-mlx", "mlx", "mlx-lm")
PLOTS = (".png", ".svg", ".pdf")
_HEAD = ("tokens", "omega", "prefill tok/s", "TTFT s", "decode tok/s", "peak GB", "KV GB")
_CEILINGS = ("tokens", "phase", "speed-up", "ceiling", "reached", "dense layer", "sparse layer", "ideal", "else")


def hardware() -> dict[str, Any]:
    """The device that MLX computes on."""
    info = mx.device_info()
    found = {"device": str(mx.default_device()), "name": info.get("device_name"), "system": platform.system()}
    if mx.default_device() == mx.Device(mx.cpu):
        found |= {"cores": os.cpu_count(), "preloaded": os.environ.get("LD_PRELOAD", "")}
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that matter; those that are only copied somewhere have none."""
    found = {"python": platform.python_version(), "mlx": mx.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found.setdefault(package, "not installed as a package")
    return found


def check_target(path: Path | None) -> None:
    """Refuse a file that could not be written, before anything is measured.

    Raises:
        FileNotFoundError: There is no such directory.
        IsADirectoryError: It is a directory.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"[benchmark] expected a file to write, got the directory {path}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"[benchmark] there is no directory {path.parent} to write {path.name} in.")


def check_plot(path: Path | None) -> None:
    """`check_target`, and matplotlib must be there.

    Raises:
        ValueError: It is not, or the suffix is none of `PLOTS`.
    """
    check_target(path)
    if path is None:
        return
    if path.suffix not in PLOTS:
        raise ValueError(f"[benchmark] --plot draws {', '.join(PLOTS)}, got {path.name}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('[benchmark] --plot needs matplotlib: pip install "flux-mlx[eval]".')


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, over one that may be there."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record, if there is a path."""
    if path is not None:
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def _columns(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _figures(row: dict[str, Any], side: str) -> tuple[str, ...]:
    figures = row[side]
    return (
        f"{row['prompt_tokens']}",
        side if side == "stock" else f"{row['omega']:.2f}",
        f"{figures['prefill_tokens_per_s']['median']:.1f}",
        f"{figures['first_token_s']['median']:.3f}",
        f"{figures['decode_tokens_per_s']['median']:.2f}",
        f"{figures['peak_bytes'] / 1e9:.2f}",
        f"{figures['kv_bytes'] / 1e9:.3f}",
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _ceiling(row: dict[str, Any], phase: str) -> tuple[str, ...]:
    figures = row[phase]
    times = (figures[key] for key in ("dense_layer_s", "sparse_layer_s", "ideal_sparse_layer_s", "everything_else_s"))
    return (
        f"{row['prompt_tokens']}",
        phase,
        *(_ratio(figures[key]) for key in ("speedup", "ceiling", "fraction_of_ceiling")),
        *map(_milliseconds, times),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Two tables for people: stock beside Flux, and both phases beside their ceilings."""
    sides = [_figures(row, side) for row in rows for side in ("stock", "flux")]
    ceilings = [_ceiling(row, phase) for row in rows for phase in ("prefill", "decode")]
    return f"{_columns([_HEAD, *sides])}\n\n{_columns([_CEILINGS, *ceilings])}"


def crossover_lines(crossover: dict[str, dict[str, Any]]) -> str:
    """The crossover in words."""
    lines = []
    for phase, found in crossover.items():
        pays, low = found["pays_from_tokens"], found["does_not_pay_at_tokens"]
        words = "pays nowhere in the lengths measured" if pays is None else f"pays from {pays} tokens on"
        words += "" if low is None or pays is None else f" (not at {low})"
        least, where = found["least_speedup"], found["least_speedup_at_tokens"]
        lines.append(f"{phase}: {words}; least speed-up {least:.3f} at {where} tokens")
    return "\n".join(lines)


def plot(path: Path, record: dict[str, Any]) -> None:
    """Speed-up and ceiling of prefill and decode over the length, in the format that the suffix of `path` names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["rows"]
    tokens = [row["prompt_tokens"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        ceilings = [row[phase]["ceiling"] or float("nan") for row in rows]
        axis.plot(tokens, ceilings, "--", color="grey", label="Amdahl's ceiling")
        axis.plot(tokens, [row[phase]["speedup"] for row in rows], marker="o", label="Flux")
        axis.axhline(1.0, color="black", linewidth=0.8, label="stock mlx-lm")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("prompt tokens")
        axis.set_ylabel(f"{phase} speed-up")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.suptitle(f"{record['model']['name']}, {record['hardware']['name']}", fontsize=9)
    figure.tight_layout()
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch) / f"plot{path.suffix}"
        figure.savefig(drawn, dpi=110)
        write_whole(path, drawn.read_bytes())
    plt.close(figure)
