"""The vocabulary in a GGUF's metadata, checked: lengths, ids, merges, names of the parts."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from flux_mlx.gguf import GGUFError, GGUFFile

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""Values of `tokenizer.ggml.model` that are read."""

SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Special token, as transformers calls it, to its metadata key."""

MAX_PIECE_CHARACTERS = 1024


class TokenType(IntEnum):
    """Codes of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary:
    """The tokenizer metadata of one file.

    Attributes:
        model: `BYTE_LEVEL` or `SENTENCEPIECE`.
        pre: Name of the pre-tokenizer, for `BYTE_LEVEL`.
        tokens: All tokens, by id; no two are equal.
        types: `TokenType` codes, int `[tokens]`.
        merges: `BYTE_LEVEL`: pairs of tokens whose joint is a token, the earlier the stronger; else empty.
        scores: `SENTENCEPIECE`: float `[tokens]`, the higher the stronger; else empty.
        ids: Special token to id or None.
        end_of_turn: Id of a further token that ends an answer, or None.
        chat_template: Jinja text, or None.

    Raises:
        GGUFError: Another kind of tokenizer, or metadata that contradicts itself.
    """

    def __init__(self, file: GGUFFile):
        self.path, self._metadata = file.path, file.metadata
        self.model = self._get("model", str)
        if self.model not in (BYTE_LEVEL, SENTENCEPIECE):
            raise self.fail(f"tokenizer model {self.model!r} is not read; expected {BYTE_LEVEL!r} or {SENTENCEPIECE!r}")
        self.pre = self._get("pre", str, "gpt-2")
        self.tokens: list[str] = self._get("tokens", list)
        if len(set(self.tokens)) != len(self.tokens):
            raise self.fail("tokenizer.ggml.tokens has a token twice")
        self.types = self._by_token("token_type", np.ones(len(self.tokens), np.int32))
        self.merges = self._merges() if self.model == BYTE_LEVEL else []
        self.scores = self._scores() if self.model == SENTENCEPIECE else np.zeros(0)
        self.ids = {name: self._id(key) for name, key in SPECIAL_KEYS.items()}
        self.end_of_turn = self._id("eot_token_id")
        template = file.metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    def fail(self, reason: str) -> GGUFError:
        """The error to raise, with the file's name."""
        return GGUFError(f"[gguf] {self.path}: {reason}")

    def flag(self, key: str, default: bool) -> bool:
        """A yes or no of the metadata."""
        return self._get(key, bool, default)

    def of_type(self, *types: TokenType) -> list[str]:
        """The tokens of some types, by id."""
        return [token for token, kind in zip(self.tokens, self.types.tolist(), strict=True) if kind in types]

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise self.fail(f"tokenizer.ggml.{key} must be a {kind.__name__}, got {type(value).__name__}")
        return value

    def _by_token(self, key: str, default: np.ndarray | None = None) -> np.ndarray:
        values = self._get(key, np.ndarray, default)
        if len(values) != len(self.tokens):
            raise self.fail(f"tokenizer.ggml.{key} has {len(values)} items for {len(self.tokens)} tokens")
        return values

    def _merges(self) -> list[tuple[str, str]]:
        known = set(self.tokens)
        merges = []
        for index, line in enumerate(self._get("merges", list)):
            left, _, right = line.partition(" ")
            if not left or not right or not {left, right, left + right} <= known:
                raise self.fail(f"merge {index} {line!r} joins or makes something that is no token")
            merges.append((left, right))
        return merges

    def _scores(self) -> np.ndarray:
        scores = self._by_token("scores")
        if not np.isfinite(scores).all():
            raise self.fail("tokenizer.ggml.scores has values that are not finite")
        longest = max(map(len, self.tokens), default=0)
        if longest > MAX_PIECE_CHARACTERS:
            raise self.fail(f"a token has {longest} characters, more than {MAX_PIECE_CHARACTERS}")
        return scores

    def _id(self, key: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise self.fail(f"tokenizer.ggml.{key} must be below {len(self.tokens)}, got {value!r}")
        return value
