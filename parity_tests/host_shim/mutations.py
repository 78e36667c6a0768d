"""The mutants, read from mutations.toml: wrong edits of the Metal text, by kind."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One edit.

    Args:
        name: What is wrong.
        kind: barrier, bounds, lanes, block index, scaling, softmax, buffer, rule, merge or router.
        probes: Names of the probes that run the text, without their underscore.
        old: Text to replace, where it occurs first.
        new: Replacement.
        equivalent: Why no probe can notice the edit; "" if one should.
    """

    name: str
    kind: str
    probes: str
    old: str
    new: str
    equivalent: str = ""

    def concerns(self, probe: str) -> bool:
        """Whether the probe (a function's name) is one of `probes`."""
        return probe[1:] in self.probes.split()

    def apply(self, source: str) -> str:
        """`source` with the edit made."""
        return source.replace(self.old, self.new, 1)


MUTANTS = tuple(Mutant(**entry) for entry in tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["mutant"])
