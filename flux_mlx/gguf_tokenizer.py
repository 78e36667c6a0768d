"""The tokenizer in a GGUF's metadata, as tokenizer.json and tokenizer_config.json: byte-level BPE only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from flux_mlx.gguf import GGUFError, GGUFFile


class TokenType(IntEnum):
    """Codes of `tokenizer.ggml.token_type` that need treatment of their own."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before BPE.

    Args:
        steps: Splits before the byte level: "digits" (each alone), or a regular expression.
        gpt2_split: Whether GPT-2's own expression follows.
        whole_words: A word that is in the vocabulary is one token, whatever the merges say.
        adds_bos: Whether the first token is written when the file does not say.
    """

    steps: tuple[str, ...]
    gpt2_split: bool
    whole_words: bool = False
    adds_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = PreTokenizer((), True)
_SINGLE_DIGITS = PreTokenizer(("digits",), True)
_LLAMA3 = PreTokenizer((_WORDS % r"\p{N}{1,3}",), False, whole_words=True, adds_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "qwen2": PreTokenizer((_WORDS % r"\p{N}",), False),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
"""Values of `tokenizer.ggml.pre` that are read."""


class _Vocabulary:
    """The checked tokenizer metadata of one file."""

    def __init__(self, file: GGUFFile):
        self.path, self._metadata = file.path, file.metadata
        model = self._get("model", str)
        if model != "gpt2":
            raise self.fail(f"tokenizer model {model!r} is not read; expected 'gpt2' (byte-level BPE)")
        name = self._get("pre", str, "gpt-2")
        if name not in PRE_TOKENIZERS:
            raise self.fail(f"pre-tokenizer {name!r} is not read; expected one of {sorted(PRE_TOKENIZERS)}")
        self.pre = PRE_TOKENIZERS[name]
        self.tokens: list[str] = self._get("tokens", list)
        if len(set(self.tokens)) != len(self.tokens):
            raise self.fail("tokenizer.ggml.tokens has a token twice")
        self.types = self._types()
        self.merges = self._merges()
        self.adds_bos = self._get("add_bos_token", bool, self.pre.adds_bos)
        self.ids = {name: self._id(key) for name, key in _SPECIAL_KEYS.items()}
        self.end_of_turn = self._id("eot_token_id")
        self.chat_template = file.metadata.get("tokenizer.chat_template")

    def fail(self, reason: str) -> GGUFError:
        return GGUFError(f"[gguf] {self.path}: {reason}")

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise self.fail(f"tokenizer.ggml.{key} must be a {kind.__name__}, got {type(value).__name__}")
        return value

    def _types(self) -> np.ndarray:
        types = self._get("token_type", np.ndarray, np.ones(len(self.tokens), np.int32))
        if len(types) != len(self.tokens):
            raise self.fail(f"tokenizer.ggml.token_type has {len(types)} items for {len(self.tokens)} tokens")
        return types

    def _merges(self) -> list[tuple[str, str]]:
        known = set(self.tokens)
        merges = []
        for index, line in enumerate(self._get("merges", list)):
            left, _, right = line.partition(" ")
            if not left or not right or not {left, right, left + right} <= known:
                raise self.fail(f"merge {index} {line!r} joins or makes something that is no token")
            merges.append((left, right))
        return merges

    def _id(self, key: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise self.fail(f"tokenizer.ggml.{key} must be below {len(self.tokens)}, got {value!r}")
        return value


_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _build(vocabulary: _Vocabulary) -> Tokenizer:
    """The `tokenizers` object."""
    pre = vocabulary.pre
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=vocabulary.merges, ignore_merges=pre.whole_words))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if step == "digits"
        else pre_tokenizers.Split(Regex(step), behavior="isolated")
        for step in pre.steps
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2_split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(vocabulary.tokens, vocabulary.types.tolist(), strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    bos = vocabulary.ids["bos_token"]
    if vocabulary.adds_bos and bos is not None:
        text = vocabulary.tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], pair=[text, "$A", text, "$B"], special_tokens=[(text, bos)]
        )
    return tokenizer


def write_tokenizer(file: GGUFFile, config: dict[str, Any], out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `out`, and add bos, eos and pad ids to `config`.

    Args:
        file: The GGUF.
        config: config.json's contents; `vocab_size` is compared, `*_token_id` are set.
        out: An existing directory.

    Raises:
        GGUFError: Another kind of tokenizer, or metadata that contradicts itself.
    """
    vocabulary = _Vocabulary(file)
    if len(vocabulary.tokens) != config["vocab_size"]:
        raise vocabulary.fail(f"{len(vocabulary.tokens)} tokens for {config['vocab_size']} rows of embeddings")
    try:
        tokenizer = _build(vocabulary)
    except Exception as error:  # the library raises nothing more special
        raise vocabulary.fail(f"the vocabulary is refused by tokenizers: {error}") from error
    tokenizer.save(str(out / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    for name, index in vocabulary.ids.items():
        if index is not None:
            settings[name] = vocabulary.tokens[index]
            if name != "unk_token":
                config[f"{name}_id"] = index
    if vocabulary.end_of_turn not in (None, config.get("eos_token_id")):
        config["eos_token_id"] = [i for i in (config.get("eos_token_id"), vocabulary.end_of_turn) if i is not None]
    if isinstance(vocabulary.chat_template, str):
        settings["chat_template"] = vocabulary.chat_template
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
