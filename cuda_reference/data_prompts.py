"""From pieces of text and windows of tokens to a `Sample` of an exact length, with or without the chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

TASKS = ("single", "multi", "aggregation", "code", "icl", "document")
RETRIEVAL = ("single", "multi")
PROBE = "def f(x):\n    return x + 1234  # na\u00efve caf\u00e9, \u6771\u4eac\n\nSome words, that go on."
_CONTENT = "\x02content\x02"


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer.

    Args:
        tokens: int32 `[length]`: the prompt, then the answer. The loss counts the answer.
        prompt_tokens: Tokens of the prompt, at least 2.
        task: One of `TASKS`, or a task of the user's own.
        candidates: Possible answers, token ids; the first is the right one, which `tokens` ends with. Empty where
            nothing is to be chosen.
        depth: Place of the needle in the text, 0 start to 1 end; nan without one.
        form: Name of the surface form.
    """

    tokens: np.ndarray
    prompt_tokens: int
    task: str
    candidates: tuple[np.ndarray, ...] = ()
    depth: float = float("nan")
    form: str = ""

    def __post_init__(self) -> None:
        if not 2 <= self.prompt_tokens < len(self.tokens):
            raise ValueError(
                f"[Sample] expected a prompt of 2 tokens or more and an answer, got prompt_tokens "
                f"{self.prompt_tokens} of {len(self.tokens)}."
            )

    @property
    def answer(self) -> np.ndarray:
        """The answer's token ids."""
        return self.tokens[self.prompt_tokens :]


class Writer:
    """Encodes text and wraps prompts in a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer of transformers. Without a chat template every prompt is plain.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._before, self._after = self._template_ends() if self.has_template else ("", "")
        self._encoded: dict[str, np.ndarray] = {}
        self._bos = [tokenizer.bos_token_id] if self._adds_bos() else []

    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a")["input_ids"]
        return bool(ids) and ids[0] == self.tokenizer.bos_token_id

    def _template_ends(self) -> tuple[str, str]:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTENT}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = text.partition(_CONTENT)
        return before, after

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32; special tokens of the template are recognised, none is added."""
        if text not in self._encoded:
            self._encoded[text] = np.asarray(self.encode_batch([text])[0], np.int32)
        return self._encoded[text]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids of a whole plain prompt, int32: after the tokenizer's first token, unless `text` begins with it."""
        ids = self.encode_batch([text])[0]
        return np.asarray(ids if ids[:1] == self._bos else self._bos + ids, np.int32)

    def settings(self) -> dict[str, Any]:
        """What tells this tokenizer from others: its size and the ids of a fixed text."""
        return {"vocabulary": len(self.tokenizer), "probe": self.encode_batch([PROBE])[0]}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def newline_ids(self) -> np.ndarray:
        """Ids of the tokens whose text begins with a line end."""
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return np.array([i for i, text in enumerate(texts) if text.startswith("\n")])

    def prompt(
        self, head: str, body: Callable[[int], np.ndarray], tail: str, lead: str, *, tokens: int, chat: bool
    ) -> np.ndarray:
        """A prompt of exactly `tokens` tokens: head, body, tail, the template's turn, lead.

        Args:
            head: Text before the body, may be empty.
            body: Number of tokens to that many token ids.
            tail: Text after the body, may be empty.
            lead: Beginning of the answer, given with the prompt; may be empty.
            tokens: Length of the prompt.
            chat: Wrap in the chat template, if the tokenizer has one.

        Raises:
            ValueError: No room is left for the body.
        """
        before, after = (self._before, self._after) if chat and self.has_template else ("", "\n" if lead else "")
        bos = [] if chat and self.has_template else self._bos
        first = np.concatenate([np.asarray(bos, np.int32), self.encode(before + head)])
        last = self.encode(tail + after + lead)
        room = tokens - len(first) - len(last)
        if room < 1:
            raise ValueError(f"[Writer.prompt] expected more than {tokens - room} tokens for this task, got {tokens}.")
        return np.concatenate([first, body(room), last])


def insert(tokens: np.ndarray, breaks: np.ndarray, pieces: Sequence[np.ndarray], depths: Sequence[float]) -> np.ndarray:
    """Insert `pieces` into a window, each at the break nearest to its depth; the length grows by theirs.

    Args:
        tokens: `[n]`, the window.
        breaks: Ascending positions in the window before which something may stand.
        pieces: Token ids to insert.
        depths: Shares of the window, in [0, 1], one for each piece.
    """
    places = [_nearest(breaks, int(depth * len(tokens))) for depth in depths]
    parts, done = [], 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: pair[0]):
        parts += [tokens[done:place], piece]
        done = place
    return np.concatenate([*parts, tokens[done:]])


def _nearest(breaks: np.ndarray, wanted: int) -> int:
    """The break nearest to `wanted`; `wanted` itself without any break."""
    if not len(breaks):
        return wanted
    index = int(np.searchsorted(breaks, wanted))
    around = breaks[max(0, index - 1) : index + 1]
    return int(around[np.abs(around - wanted).argmin()])
