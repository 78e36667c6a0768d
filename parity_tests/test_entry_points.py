"""The table of entry points: complete, generated from its file of outcomes, and some of its cells run again."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from parity_tests.entry_point_cells import ABSENT, ENTRY_POINTS, FAILS, PRECISIONS, YES, make_case, run_case
from parity_tests.entry_point_document import DOCUMENT, document, table
from parity_tests.entry_points import COMMAND, PAIRS, RECORD, run_cells, sample, sources_digest
from parity_tests.tiny_models import FAMILIES

SAMPLE = 4
PUBLISHED = json.loads(RECORD.read_text("utf-8"))["cells"]


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="published are the outcomes on a CPU")
@pytest.mark.parametrize(("family", "precision"), sample(SAMPLE, sources_digest()))
def test_cells_are_as_published(family, precision):
    cells, failures = run_cells([(family, precision)])
    assert not failures
    assert cells[family][precision] == PUBLISHED[family][precision], f"published otherwise: run {COMMAND}"


@pytest.mark.parametrize(
    ("family", "precision"), [("qwen3", "float32"), ("llama", "4-bit"), ("gemma3_text", "float32")]
)
def test_cells_of_the_table(family, precision):
    case = make_case(family, precision)
    absent = {"kv-bits 8"} if family == "gemma3_text" else set()
    for name in ENTRY_POINTS:
        assert run_case(case, name)[0] == (ABSENT if name in absent else YES), name


def test_every_cell_is_published_and_none_fails():
    assert list(PUBLISHED) == list(FAMILIES), f"run {COMMAND}"
    for rows in PUBLISHED.values():
        assert list(rows) == list(PRECISIONS)
        assert all(list(row) == list(ENTRY_POINTS) for row in rows.values())
        assert {outcome for row in rows.values() for outcome in row.values()} <= {YES, ABSENT}


def test_the_document_is_what_the_results_say():
    record = json.loads(RECORD.read_text("utf-8"))
    assert DOCUMENT.read_text("utf-8") == document(record), f"write it anew: {COMMAND} --document"


def test_samples_are_small_and_the_same_for_the_same_sources():
    assert sample(SAMPLE, "a") == sample(SAMPLE, "a") != sample(SAMPLE, "b")
    drawn = {pair for seed in range(400) for pair in sample(SAMPLE, str(seed))}
    assert drawn == set(PAIRS)


def test_a_failure_is_shown(monkeypatch):
    monkeypatch.setitem(ENTRY_POINTS, "generate", lambda case: 1 / 0)
    monkeypatch.setattr("parity_tests.entry_points.ENTRY_POINTS", {"generate": ENTRY_POINTS["generate"]})
    cells, failures = run_cells([("llama", "float32")])
    assert cells == {"llama": {"float32": {"generate": FAILS}}}
    assert failures == ["llama, float32, generate: ZeroDivisionError: division by zero"]
    whole = {"llama": {precision: dict.fromkeys(ENTRY_POINTS, YES) for precision in PRECISIONS}}
    assert "fails" not in table(whole)
    whole["llama"]["4-bit"]["generate"] = FAILS
    assert "float32, bfloat16, 8-bit, **4-bit fails**" in table(whole)
    for row in whole["llama"].values():
        row["kv-bits 8"] = ABSENT
    assert "none in stock" in table(whole)
