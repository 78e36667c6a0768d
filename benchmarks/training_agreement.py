"""Whether two backends route alike: compares the kept scores of two runs of flux_mlx.evaluate.

Run from the repository root:

    flux_mlx.evaluate --backend mlx --keep-scores ... --out mlx.json
    flux_mlx.evaluate --backend torch --keep-scores ... --out torch.json
    python -m benchmarks.training_agreement --ours mlx.json --theirs torch.json --out benchmarks/training_agreement.json

Either side may be the files of several shards.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEAR_TIE = 0.02
"""A decision whose logits differ by less than this in either backend is listed."""


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Shares of equal routes, by cell and in all, and every decision that differs or nearly ties.

    Args:
        ours, theirs: Results with "scores": cell to contender to samples. What only one of them holds is left out.

    Raises:
        ValueError: They hold nothing in common, or different numbers of samples.
    """
    cells, decisions, equal, widest = {}, 0, 0, 0.0
    differing, ties = [], []
    for cell, name, left, right in _pairs(ours, theirs):
        alike = 0
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            for layer, gaps in enumerate(zip(a["gaps"], b["gaps"], strict=True)):
                entry = {"cell": cell, "contender": name, "sample": index, "layer": layer, "gaps": list(gaps)}
                same = (a["full"][layer] > 0.5) == (b["full"][layer] > 0.5)
                alike, decisions = alike + same, decisions + 1
                widest = max(widest, abs(gaps[0] - gaps[1]))
                if not same:
                    differing.append(entry)
                elif min(map(abs, gaps)) < NEAR_TIE:
                    ties.append(entry)
        equal += alike
        layers = len(left[0]["gaps"])
        nll = max(abs(a["nll"] - b["nll"]) for a, b in zip(left, right, strict=True))
        cells.setdefault(cell, {})[name] = {
            "samples": len(left),
            "equal": alike / (len(left) * layers),
            "largest_nll_difference": nll,
        }
    return {
        "decisions": decisions,
        "equal": equal / decisions,
        "largest_gap_difference": widest,
        "near_tie": NEAR_TIE,
        "differing": differing,
        "near_ties": ties,
        "cells": cells,
    }


def _pairs(ours: dict[str, Any], theirs: dict[str, Any]):
    """(cell, contender, samples, samples) of both results."""
    left, right = ({(c, n): s for c, by in r["scores"].items() for n, s in by.items()} for r in (ours, theirs))
    shared = [key for key in left if key in right and left[key][0]["gaps"]]
    if not shared or any(len(left[key]) != len(right[key]) for key in shared):
        raise ValueError(f"[compare] expected the same kept scores in both, got {sorted(left)} and {sorted(right)}.")
    for key in shared:
        yield *key, left[key], right[key]


def read(paths: Sequence[Path]) -> dict[str, Any]:
    """The kept scores of one side's files together."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    scores = {cell: by for part in parts for cell, by in part["scores"].items()}
    return {"scores": scores, "settings": [part["settings"] for part in parts]}


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for side in ("--ours", "--theirs"):
        parser.add_argument(
            side, nargs="+", type=Path, required=True, help="results of flux_mlx.evaluate --keep-scores"
        )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    both = [read(paths) for paths in (args.ours, args.theirs)]
    found = compare(*both) | {"settings": [result["settings"] for result in both]}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['equal']:.4f} of {found['decisions']} decisions are equal; {len(found['near_ties'])} near ties")


if __name__ == "__main__":
    main()
