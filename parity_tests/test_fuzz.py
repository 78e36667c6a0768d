"""A short run of the fuzzer (`python -m parity_tests.fuzz` is the long one), and tests of the fuzzer itself."""

from __future__ import annotations

import random

import pytest

from parity_tests.fuzz.guided import fuzz
from parity_tests.fuzz.mutation import mutate
from parity_tests.fuzz.targets import Target, make_targets

COUNT = 40


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    return {target.name: target for target in make_targets(tmp_path_factory.mktemp("fuzz"))}


NAMES = "config weights router-bytes tokenizer vocabulary generation routers cache adapter-config adapter-weights gguf"


@pytest.mark.parametrize("name", NAMES.split())
def test_mutants_are_read_or_refused_by_name(targets, name):
    result = fuzz(targets[name], COUNT, seed=7)
    assert result.count == COUNT
    assert result.failures == {}
    targets[name].read()  # the valid file is back


def test_mutants_differ():
    rng, data = random.Random(0), b'{"a": 12, "b": [true, null], "c": "words"}' * 4
    mutants = {mutate(data, rng, 100) for _ in range(200)}
    assert len(mutants - {data}) > 150


def test_the_fuzzer_finds_planted_faults(tmp_path):
    file = tmp_path / "planted.json"
    file.write_bytes(b'{"size": 3}' * 3)

    def crashes() -> None:
        if b"null" in file.read_bytes():
            raise KeyError("size")
        raise ValueError(f"{file} is not wanted")

    found = fuzz(Target("planted", file, crashes), 300).failures
    assert [failure.partition(":")[0] for failure in found] == ["KeyError"]
    silent = fuzz(Target("planted", file, file.read_bytes, stamped=True), 20).failures
    assert list(silent) == ["loaded silently"]

    def nameless() -> None:
        raise ValueError("bad")

    assert "does not name the file" in next(iter(fuzz(Target("planted", file, nameless), 5).failures))


def test_new_lines_make_parents(targets):
    result = fuzz(targets["gguf"], 60, seed=3)
    assert len(result.parents) > 2
    assert any("gguf" in name for name, _ in result.lines)
