"""What is published of SmolLM2's routers says the same everywhere: their file, their card, the figures, the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.training_report import RETRIEVAL, merge, report
from flux_mlx.packaged_routers import find_routers
from flux_mlx.weights import read_routers

ROOT = Path(__file__).parent.parent
FOLDER = find_routers("smollm2-135m-instruct")
SEEDS = ["seed0", "seed1", "seed2"]


@pytest.fixture(scope="module")
def parts():
    paths = sorted((ROOT / "benchmarks").glob("training_eval_*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def test_the_card_gives_the_settings_of_the_file():
    card, settings = (FOLDER / "README.md").read_text(encoding="utf-8"), read_routers(FOLDER).flux
    assert (settings.pattern.name, settings.route) == ("triangle", "auto")
    assert f"Pool: {settings.router.pool_tokens} tokens at each end" in card
    assert f"block {settings.pattern.block_size}, sink {settings.pattern.sink_tokens}" in card
    assert f"window {settings.pattern.window_tokens:,} tokens" in card


def test_the_card_gives_the_figures_of_the_files(parts):
    card, cells = (FOLDER / "README.md").read_text(encoding="utf-8"), merge(parts)["cells"]
    kinds = {
        "number in a plain sentence": "test/single-magic",
        "one fact, any form": "test/single",
        "two facts of one form": "test/multi-keys",
        "one fact, the answer not begun": "test/single-bare",
        "two joined facts": "test/multi-hops",
        "one fact, unseen forms, fillers, instructions": "ood/single",
        "two facts, unseen": "ood/multi-keys",
        "code": "test/code",
        "documents": "test/document",
        "counting": "test/aggregation",
        "labels by example": "test/icl",
    }
    for task, kind in kinds.items():
        s = cells[f"{kind}/8192"]["seed0"]
        ratio = f"{s['nll_ratio']:.3f} ({s['nll_ratio_low']:.3f} to {s['nll_ratio_high']:.3f})"
        choice = [f"{100 * s[name] + 0.0:.1f}" for name in ("accuracy_diff", "accuracy_diff_bound") if name in s]
        row = [task, f"{s['samples']:,}", f"{s['omega']:.3f}", ratio, *(choice or ["", ""])]
        assert [part.strip() for part in _row(card, task)] == row


def test_the_conditions_are_judged_by_most_samples_and_seeds_by_the_same(parts):
    most, same = merge(parts)["cells"], merge(parts, same=SEEDS)["cells"]
    for kind, samples in zip(RETRIEVAL, (1000, 5000, 5000), strict=True):
        cell = f"test/{kind}/8192"
        assert most[cell]["seed0"]["samples"] == samples
        assert {same[cell][seed]["samples"] for seed in SEEDS} == {1000}


def test_the_text_gives_the_judged_figures_of_the_files(parts):
    text, cells = (ROOT / "cuda_reference" / "TRAINING.md").read_text(encoding="utf-8"), merge(parts)["cells"]
    found = [cells[f"test/{kind}/8192"]["seed0"] for kind in RETRIEVAL]
    nll = ", ".join(f"{s['nll_ratio']:.3f}" for s in found)
    nll += f" (bounds at most {max(s['nll_ratio_high'] for s in found):.3f})"
    assert _row(text, "retrieval at 8,192 tokens, NLL: plain number, one fact, two facts")[1].strip() == nll
    points = [[f"{100 * s[name] + 0.0:.1f}" for name in ("accuracy_diff", "accuracy_diff_bound")] for s in found]
    choice = ", ".join(f"{difference} ({bound})" for difference, bound in points)
    assert _row(text, "the same, choice among ten: points (lower bound)")[1].strip() == choice


def _row(text: str, first: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"| {first} |")).strip("|").split("|")


def test_the_table_is_what_the_report_makes_of_the_files(parts):
    table = (ROOT / "benchmarks" / "training_table.md").read_text(encoding="utf-8")
    assert table == report(parts, "seed0", SEEDS)
