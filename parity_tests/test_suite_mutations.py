"""The suite is tested: every mutant fails a named property, the budget refuses small errors, absences are seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flux_mlx.spec import PatternConfig
from parity_tests.backends import NUMPY, Backend
from parity_tests.mutants_of_choices import MUTANTS
from parity_tests.properties import PROPERTIES
from parity_tests.strategies import EDGES, Case
from parity_tests.test_router_parity import ROUTER_PROPERTIES, RouterCase
from parity_tests.test_xattention_parity import BLOCK_PROPERTIES

README = Path(__file__).parent / "README.md"
MOST_NAMED = 3  # properties that README.md names for a mutant
ORDER = ("future_tokens_do_not_matter", "hidden_keys_do_not_matter", "repeats_are_equal", "within_budget")


def router_examples() -> Iterator[RouterCase]:
    """A few routers, prompts shorter and longer than the pools."""
    for seed, (tokens, pool) in enumerate([(1, 3), (5, 3), (6, 3), (31, 10), (19, 10)]):
        yield RouterCase(3, tokens, heads=4, head_dim=8, pool_tokens=pool, dtype="float32", seed=seed)


def block_examples() -> Iterator[Case]:
    """A few prefills under xattention, with and without a prefix."""
    pattern = PatternConfig(name="xattention", block_size=4, stride=2, sink_tokens=4, window_tokens=8, threshold=0.7)
    for seed, q_tokens in enumerate([37, 21, 16]):
        yield Case(
            kv_heads=2, group=2, q_tokens=q_tokens, pattern=replace(pattern, top_k_blocks=3 if seed == 1 else None),
            head_dim=8, prompt_tokens=37, values="uneven keys", seed=seed,
        )  # fmt: skip


def attention_examples() -> list[Case]:
    """The small edges."""
    return [case for case in EDGES.values() if case.head_dim == 64 and case.kv_tokens < 60 and case.kv_heads == 1] + [
        EDGES["two groups of eight"]
    ]


SUITES: dict[str, tuple[dict[str, Any], Any]] = {
    "attention": (PROPERTIES, attention_examples),
    "router": (ROUTER_PROPERTIES, router_examples),
    "blocks": (BLOCK_PROPERTIES, block_examples),
}


def fails(part: str, name: str, backend: Backend) -> bool:
    """Whether a property of a part of the suite fails for `backend` on one of the part's examples."""
    checks, examples = SUITES[part]
    for example in examples():
        try:
            checks[name](backend, example)
        except AssertionError:
            return True
    return False


def table() -> str:
    """The mutation list of README.md: for each mistake the first properties that catch it."""
    rows = ["| mistake | caught by |", "|---|---|"]
    for mutant in MUTANTS.values():
        names = sorted(SUITES[mutant.part][0], key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
        caught = [name for name in names if fails(mutant.part, name, mutant.backend)][:MOST_NAMED]
        rows.append(f"| {mutant.mistake} | {', '.join(f'`{name}`' for name in caught)} |")
    return "\n".join(rows)


def listed() -> dict[str, list[str]]:
    """The mutation list as README.md has it."""
    rows = re.findall(r"^\| (.+?) \| (`.+`) \|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {mistake: re.findall(r"`(\w+)`", names) for mistake, names in rows}


@pytest.mark.parametrize("part", SUITES)
def test_the_unchanged_backend_passes(part):
    assert not [name for name in SUITES[part][0] if fails(part, name, NUMPY)]


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_fails_the_properties_listed(mistake):
    mutant, names = MUTANTS[mistake], listed().get(mistake)
    assert names, f"README.md names no property that catches: {mistake}"
    assert [name for name in names if fails(mutant.part, name, mutant.backend)] == names


def test_the_list_has_every_mutant_and_no_other():
    assert list(listed()) == list(MUTANTS)
    assert {mutant.part for mutant in MUTANTS.values()} == set(SUITES)


@pytest.mark.parametrize("change", ["window_tokens", "sink_tokens"])
@pytest.mark.parametrize("blocks", [-1, 1])
def test_a_size_off_by_one_block_is_caught_in_every_backend(backend, change, blocks):
    """Not only in the numpy mutants: a backend that is handed the wrong pattern must fail the budget."""
    case = Case(batch=1, group=2)
    wrong = replace(case.pattern, **{change: getattr(case.pattern, change) + blocks * case.pattern.block_size})
    mistaken = replace(backend, attend=lambda qkv, case: backend.attend(qkv, replace(case, pattern=wrong)))
    PROPERTIES["within_budget"](backend, case)
    with pytest.raises(AssertionError, match="over the budget"):
        PROPERTIES["within_budget"](mistaken, case)


if __name__ == "__main__":
    print(table())
