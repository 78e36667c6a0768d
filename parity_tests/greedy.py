"""Greedy answers that should be equal: they are, or they part at a near-tie, which is counted and listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate

from parity_tests.properties import Decisions
from parity_tests.tolerances import NEAR_TIE


def single_run(model: nn.Module, tokenizer: Any, text: str, n: int = 12, **settings: Any) -> list[int]:
    """The answer of stock's own generation to one prompt."""
    return [r.token for r in stream_generate(model, tokenizer, tokenizer.encode(text), max_tokens=n, **settings)]


class Answers:
    """Compares answers of a model whose routes are forced.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self.model, self.decisions = model, Decisions()

    def check(self, prompt: list[int], found: list[int], expected: list[int]) -> None:
        """Assert that an answer is as expected, up to the first token between which the model can hardly choose."""
        self.decisions.count += 1
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        if at is None:
            assert found == expected
            return
        logits = self.model(mx.array([prompt + expected[:at]]), cache=self.model.make_cache())[0, -1]
        found_logit, expected_logit = float(logits[found[at]]), float(logits[expected[at]])
        margin = abs(found_logit - expected_logit)
        assert margin < NEAR_TIE * max(1.0, abs(expected_logit)), f"token {at}: {found} instead of {expected}"
        self.decisions.ties.append(f"token {at}, margin {margin:.1e}")

    def report(self, record_property: Callable[[str, object], None], most: float = 0.01) -> None:
        """Hand the near-ties to pytest's fixture `record_property`; at most a share `most`, or one, may be."""
        assert len(self.decisions.ties) <= max(1, most * self.decisions.count)
        self.decisions.report(record_property)
