"""The table of entry points: complete, and a few of its cells run again."""

from __future__ import annotations

import pytest

from parity_tests.entry_point_cells import ENTRY_POINTS, PRECISIONS, make_case, run_case
from parity_tests.entry_points import DOCUMENT, document, table
from parity_tests.tiny_models import FAMILIES


@pytest.mark.parametrize(
    ("family", "precision"), [("qwen3", "float32"), ("llama", "4-bit"), ("gemma3_text", "float32")]
)
def test_cells_of_the_table(family, precision):
    case = make_case(family, precision)
    outcomes = {name: run_case(case, name) for name in ENTRY_POINTS}
    absent = {"speculative, target", "speculative, draft", "kv-bits 8", "prefix reuse"}
    for name, outcome in outcomes.items():
        there = outcome == "yes" or (name in absent and outcome.startswith("no such thing"))
        assert there, f"{name}: {outcome}"
    if family != "gemma3_text":
        assert set(outcomes.values()) == {"yes"}


def test_the_document_has_every_family_and_no_failure():
    text = DOCUMENT.read_text("utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert set(FAMILIES) <= set(rows)
    assert "fails" not in "".join(rows[family] for family in FAMILIES)
    assert all(name in rows["family"] for name in ENTRY_POINTS)
    empty = document({}).splitlines()
    rest = empty[empty.index("| command | run by | with Flux models |") :]
    assert "\n".join(rest) in text, "the document is older than its generator, or than benchmarks/prefix_drift.json"


def test_a_failure_is_shown():
    results = {("llama", p, name): "yes" for p in PRECISIONS for name in ENTRY_POINTS}
    assert "fails" not in table(results)
    results["llama", "4-bit", "generate"] = "FAILS: ValueError: x"
    assert "float32, bfloat16, 8-bit, **4-bit fails**" in table(results)
    results |= {("llama", p, "kv-bits 8"): "no such thing: x" for p in PRECISIONS}
    assert "none in stock" in table(results)
