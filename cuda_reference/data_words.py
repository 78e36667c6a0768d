"""Words and sentence forms of the made-up tasks, read from recipes/words.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cuda_reference.data_text import split_of

DIGITS, LETTERS = "0123456789", "abcdefghijkmnpqrstuvwxyz"


@dataclass(frozen=True)
class Form:
    """One way to state a fact and to ask for it.

    Args:
        statement: Sentence with {key} and {value}.
        question: Question with {key}.
        lead: How the answer begins, with {key}; the value follows after a space.
    """

    statement: str
    question: str
    lead: str


@dataclass(frozen=True)
class Words:
    """The word lists. `ood_forms`, `ood_sentences` and `ood_instructions` are never trained on.

    Instructions: what stands around a text. "any" heads fit every task; "ask", "count", "label", "code" and "text" are
    heads of one; "tail" puts a question behind the text, "early_tail" reminds of one before it.
    """

    forms: tuple[Form, ...]
    ood_forms: tuple[Form, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    cities: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]
    labels: tuple[str, ...]
    sentences: dict[str, tuple[str, ...]]
    ood_sentences: dict[str, tuple[str, ...]]
    instructions: dict[str, tuple[str, ...]]
    ood_instructions: dict[str, tuple[str, ...]]

    def key(self, rng: np.random.Generator, split: str) -> str:
        """A made-up name, "amber falcon"; a name occurs in one split only ("ood" shares those of "test")."""
        wanted = "test" if split == "ood" else split
        while True:
            name = f"{rng.choice(self.adjectives)} {rng.choice(self.nouns)}"
            if split_of(f"key/{name}") == wanted:
                return name

    def values(self, rng: np.random.Generator, kind: str, count: int) -> list[str]:
        """`count` different values of one kind: "digits", "code", "words" or "city"."""
        found: dict[str, None] = {}
        length = int(rng.integers(4, 8))
        while len(found) < count:
            found[self._value(rng, kind, length)] = None
        return list(found)

    def _value(self, rng: np.random.Generator, kind: str, length: int) -> str:
        if kind == "digits":
            return str(rng.integers(1, 10)) + "".join(rng.choice(list(DIGITS), length - 1))
        if kind == "code":
            return "".join(rng.choice(list(LETTERS), 3)) + "-" + "".join(rng.choice(list(DIGITS), 3))
        if kind == "city":
            return str(rng.choice(self.cities))
        if kind == "words":
            return f"{rng.choice(self.adjectives)} {rng.choice(self.nouns)}"
        raise ValueError(f"[Words.values] kind must be one of {list(VALUE_KINDS)}, got {kind!r}.")


VALUE_KINDS = ("digits", "code", "words", "city")


@cache
def words() -> Words:
    """The lists of recipes/words.json."""
    path = Path(__file__).parent / "recipes" / "words.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    lists = {name: tuple(raw[name].split()) for name in ("adjectives", "nouns", "cities", "labels")}
    forms = {name: tuple(Form(**form) for form in raw[name]) for name in ("forms", "ood_forms")}
    named = ("sentences", "ood_sentences", "instructions", "ood_instructions")
    lists_by_name = {name: {k: tuple(v) for k, v in raw[name].items()} for name in named}
    categories = {name: tuple(line.split()) for name, line in raw["categories"].items()}
    return Words(categories=categories, **lists, **forms, **lists_by_name)
