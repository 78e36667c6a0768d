"""Every entry point of mlx-lm on every family and precision, run: `python -m parity_tests.entry_points` writes
benchmarks/entry_points.json and docs/entry_points.md, `--document` the second from the first alone.

A cell lists the precisions for which the entry point ran on a tiny random model of the family and did what it should:
with full routes exactly what the stock model does, with the routers' own routes to the end.

How the published outcomes are held: nearly all of flux_mlx can change a cell, so a digest of the sources behind the
table would ask for a whole run after nearly every commit, and one of fewer sources would say nothing. Instead the file
names commit and date of the whole run, and every test run does some cells again and compares them (`sample`). Which
ones, the sources decide: a change draws others, an unchanged tree the same.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import platform
import random
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

import flux_mlx
from flux_mlx.benchmark_report import versions
from parity_tests.entry_point_cells import ENTRY_POINTS, FAILS, PRECISIONS, make_case, run_case
from parity_tests.entry_point_document import DOCUMENT, ROOT, Cells, document
from parity_tests.tiny_models import FAMILIES

RECORD = ROOT / "benchmarks" / "entry_points.json"
COMMAND = "python -m parity_tests.entry_points"
PAIRS = list(itertools.product(FAMILIES, PRECISIONS))


def sources_digest() -> str:
    """SHA-256 of the product's Python files."""
    files = sorted(Path(flux_mlx.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def sample(count: int, seed: str) -> list[tuple[str, str]]:
    """Some pairs of family and precision, the same for the same seed."""
    return random.Random(seed).sample(PAIRS, count)


def run_cells(pairs: Iterable[tuple[str, str]]) -> tuple[Cells, list[str]]:
    """Run every entry point for these pairs.

    Returns:
        (outcomes, one line for each cell that fails, with the reason).
    """
    cells, failures = {}, []
    for family, precision in pairs:
        case = make_case(family, precision)
        found = {name: run_case(case, name) for name in ENTRY_POINTS}
        cells.setdefault(family, {})[precision] = {name: outcome for name, (outcome, _) in found.items()}
        reasons = {name: why for name, (outcome, why) in found.items() if outcome == FAILS}
        failures += [f"{family}, {precision}, {name}: {why}" for name, why in reasons.items()]
        mx.clear_cache()
    return cells, failures


def _commit() -> str:
    """The commit of the working tree, with "-dirty" if it holds changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def measure() -> tuple[dict[str, Any], list[str]]:
    """Run every cell: (what benchmarks/entry_points.json is to hold, failures)."""
    head = {
        "command": COMMAND,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, {mx.default_device()}",
        "versions": versions(),
    }
    start = time.perf_counter()
    cells, failures = run_cells(PAIRS)
    return head | {"minutes": round((time.perf_counter() - start) / 60, 1), "cells": cells}, failures


def main() -> None:
    """Run the command. Exits with the failures, if there are any."""
    parser = argparse.ArgumentParser(prog="parity_tests.entry_points", description=__doc__)
    parser.add_argument("--document", action="store_true", help="run nothing: write the document from the outcomes")
    args = parser.parse_args()
    record, failures = (json.loads(RECORD.read_text("utf-8")), []) if args.document else measure()
    if not args.document:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    DOCUMENT.write_text(document(record))
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
