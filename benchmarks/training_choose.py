"""Choose the window that is trained with, from the sink and window study: static masks of the search at several sizes.

    python -m benchmarks.training_choose study_*.json --out choice.json

The study's contenders are named "retrieval/WINDOW/SINK" and "text/WINDOW/SINK". Taken is the smallest window, at the
sink of the recipe, whose masks keep within the limits that the routers must keep; the largest if none does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training_report import RETRIEVAL, TEXT, contenders, mean, merge, pick

LIMITS = {"retrieval": (RETRIEVAL, 1.02), "text": (TEXT, 1.015)}
SINK_TOKENS = 64
SHORTEST_IN_WINDOWS = 1.5
"""Training samples are at least this many windows long: in shorter ones sparse attention hides next to nothing."""


def choose(results: dict[str, Any]) -> dict[str, Any]:
    """The choice and what it rests on: {"window", "shortest", "ratios"}.

    Raises:
        ValueError: No contender of the study at the recipe's sink.
    """
    ratios = {
        name: mean(pick(results, name, LIMITS[name.split("/")[0]][0], "nll_ratio"))
        for name in contenders(results)
        if name.split("/")[0] in LIMITS
    }
    windows = sorted({int(name.split("/")[1]) for name in ratios if name.endswith(f"/{SINK_TOKENS}")})
    if not windows:
        raise ValueError(f"[choose] expected contenders like text/1024/{SINK_TOKENS}, got {contenders(results)}.")
    good = [w for w in windows if all(ratios[f"{g}/{w}/{SINK_TOKENS}"] <= limit for g, (_, limit) in LIMITS.items())]
    window = good[0] if good else windows[-1]
    return {"window": window, "shortest": int(SHORTEST_IN_WINDOWS * window), "ratios": ratios, "within_limits": good}


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of the study")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    found = choose(merge(json.loads(path.read_text(encoding="utf-8")) for path in args.results))
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
