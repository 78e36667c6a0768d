"""Wrong edits of the Metal kernels must be noticed: a sample of them here, all of them in the deep profile.

`python -m parity_tests.host_shim.mutants` scores every mutant and writes benchmarks/metal_mutants.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from parity_tests.host_shim import mutants
from parity_tests.host_shim.mutants import verdict
from parity_tests.host_shim.mutations import MUTANTS
from parity_tests.host_shim.run import HostTimeoutError

SCORE = Path(__file__).parents[1] / "benchmarks" / "metal_mutants.json"
IS_DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
SAMPLE = [m for i, m in enumerate(MUTANTS) if not m.equivalent and (IS_DEEP or i % 7 == 0)]


def test_probes_pass_on_the_unchanged_kernels():
    assert verdict(None) == "survived"


@pytest.mark.parametrize("mutant", SAMPLE, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant):
    assert verdict(mutant).startswith("killed")


def test_a_timeout_is_no_kill(monkeypatch):
    def _slow(mutant, schedule, sizes):
        raise HostTimeoutError("the kernel did not end within 20 s")

    monkeypatch.setattr(mutants, "PROBES", ((_slow, "fair", None),))
    assert verdict(None) == "timed out in slow, fair"


def test_published_score():
    report = json.loads(SCORE.read_text())
    assert {entry["name"] for entry in report["verdicts"]} == {mutant.name for mutant in MUTANTS}, "score them anew"
    survivors = {e["name"] for e in report["verdicts"] if not e["verdict"].startswith("killed")}
    assert survivors <= {mutant.name for mutant in MUTANTS if mutant.equivalent}
    assert report["mutants"] >= 60
    assert report["score"] >= 0.95
