"""A coverage-guided loop: mutants that reach lines of flux_mlx which none has reached become parents of others."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import flux_mlx
from parity_tests.fuzz.mutation import mutate
from parity_tests.fuzz.targets import Target

PACKAGE = str(Path(flux_mlx.__file__).parent)
HEADER_BYTES = 8192


class Coverage:
    """Lines of flux_mlx that ran inside the block."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._trace

    def __enter__(self) -> Coverage:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


@dataclass
class Result:
    """What a run found.

    Args:
        count: Mutants that were read.
        parents: Mutants that reached new lines, and the valid file.
        lines: Lines of flux_mlx that were reached.
        failures: (what is wrong, the mutant), the first of each kind.
    """

    count: int = 0
    parents: list[bytes] = field(default_factory=list)
    lines: set[tuple[str, int]] = field(default_factory=set)
    failures: dict[str, bytes] = field(default_factory=dict)


def fuzz(target: Target, count: int, seed: int = 0) -> Result:
    """Read `count` mutants of a target's file. The file holds the mutant while it is read, and is valid again after."""
    rng, valid = random.Random(seed), target.file.read_bytes()
    result = Result(parents=[valid])
    try:
        for _ in range(count):
            parent = rng.choice(result.parents[-20:] if rng.random() < 0.5 else result.parents)
            mutant = mutate(parent, rng, HEADER_BYTES)
            with Coverage() as coverage:
                failure = target.failure(mutant, valid)
            result.count += 1
            if failure is not None:
                result.failures.setdefault(failure[:120], mutant)
            if coverage.lines - result.lines:
                result.lines |= coverage.lines
                result.parents.append(mutant)
    finally:
        target.file.write_bytes(valid)
    return result
