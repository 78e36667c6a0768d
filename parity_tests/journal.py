"""`--journal FILE`: a long run in parts. Each finished test adds a line to FILE; a later run passes over what passed.

A line is JSON: the test's id, the profile's examples a property, how many the backend ran, seconds, near-ties, outcome.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from parity_tests.properties import EXAMPLES, NEAR_TIES


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, none if there is no such file. A last line that was cut short is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def passed(path: Path, examples: int) -> set[str]:
    """Ids of tests that passed with at least `examples` examples a property."""
    return {line["test"] for line in read(path) if line["outcome"] == "passed" and line["profile"] >= examples}


@dataclass(frozen=True)
class Journal:
    """The pytest plugin of one run; under xdist the workers deselect and the controller writes.

    Args:
        path: The journal.
        writes: Whether this process adds lines.
    """

    path: Path
    writes: bool

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the tests that have passed already."""
        done = passed(self.path, settings().max_examples)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a line for a test that ran."""
        if not self.writes or report.when != "call" or report.outcome == "skipped":
            return
        found = dict(report.user_properties)
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "profile": settings().max_examples,
            "examples": found.get(EXAMPLES, 0),
            "seconds": round(report.duration, 1),
            "near_ties": found.get(NEAR_TIES, ""),
            "python": platform.python_version(),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
