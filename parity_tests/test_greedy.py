"""The comparison of greedy answers: near-ties pass and are listed, anything else fails."""

from __future__ import annotations

import mlx.core as mx
import pytest

from parity_tests.greedy import Answers
from parity_tests.properties import NEAR_TIES
from parity_tests.tolerances import NEAR_TIE


class Undecided:
    """Can hardly choose between tokens 1 and 2, at any place; the others are worse."""

    def make_cache(self) -> None:
        return None

    def __call__(self, tokens: mx.array, cache: None) -> mx.array:
        return mx.array([[[0.0, 3.0, 3.0 + NEAR_TIE, 1.0]] * tokens.shape[1]])


def test_answers_part_at_near_ties_only():
    answers, noted = Answers(Undecided()), []
    answers.check([5], [2, 2], [2, 2])
    answers.check([5], [2, 1, 0], [2, 2, 2])
    for wrong in ([2, 0], [2], [2, 2, 2], [3, 2]):
        with pytest.raises(AssertionError):
            answers.check([5], wrong, [2, 2])
    answers.report(lambda name, value: noted.append((name, value)))
    assert (NEAR_TIES, "1 of 6 (token 1, margin 1.0e-04)") in noted
    answers.check([5], [1], [2])
    with pytest.raises(AssertionError):
        answers.report(lambda name, value: None)
