"""The tokenizer of a GGUF as tokenizer.json and tokenizer_config.json: byte-level BPE, and SentencePiece's BPE."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flux_mlx.gguf import GGUFError, GGUFFile
from flux_mlx.gguf_vocabulary import BYTE_LEVEL, TokenType, Vocabulary

_SPACE = "▁"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before byte-level BPE.

    Args:
        steps: Splits before the byte level: "digits" (each alone), or a regular expression.
        gpt2_split: Whether GPT-2's own expression follows.
        whole_words: A word that is in the vocabulary is one token, whatever the merges say.
        adds_bos: Whether the bos token is put in front when the file does not say.
    """

    steps: tuple[str, ...]
    gpt2_split: bool
    whole_words: bool = False
    adds_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SINGLE_DIGITS = PreTokenizer(("digits",), True)
_LLAMA3 = PreTokenizer((_WORDS % r"\p{N}{1,3}",), False, whole_words=True, adds_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((), True),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "qwen2": PreTokenizer((_WORDS % r"\p{N}",), False),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
"""Values of `tokenizer.ggml.pre` that are read."""


def _byte_level(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """The tokenizer, without special tokens, and whether it puts bos in front by default."""
    if vocabulary.pre not in PRE_TOKENIZERS:
        raise vocabulary.fail(f"pre-tokenizer {vocabulary.pre!r} is not read; expected one of {sorted(PRE_TOKENIZERS)}")
    pre = PRE_TOKENIZERS[vocabulary.pre]
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
    return tokenizer, pre.adds_bos


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece joins the pair that makes the token of the highest score: the same as a list of merges."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    mergeable = set(vocabulary.of_type(TokenType.NORMAL, TokenType.UNUSED))
    found = []
    for token in mergeable:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        order = (-float(vocabulary.scores[ids[token]]), ids[token])
        found += [(*order, ids[a], ids[b], a, b) for a, b in pairs if a in mergeable and b in mergeable]
    return [(left, right) for *_, left, right in sorted(found)]


def _sentencepiece(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """As `_byte_level`. Characters without a token are spelled in bytes where the vocabulary has them."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.ids["unk_token"]
    model = models.BPE(
        vocab=ids,
        merges=_merges_by_score(vocabulary),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=bool(vocabulary.of_type(TokenType.BYTE)),
    )
    tokenizer = Tokenizer(model)
    prefixed = vocabulary.flag("add_space_prefix", True)
    first = [normalizers.Prepend(_SPACE)] if prefixed else []
    last = [decoders.Strip(content=" ", left=1, right=0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + last)
    return tokenizer, True


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The `tokenizers` object of a vocabulary.

    Raises:
        GGUFError: A pre-tokenizer that is not read, or something that `tokenizers` refuses.
    """
    build = _byte_level if vocabulary.model == BYTE_LEVEL else _sentencepiece
    try:
        tokenizer, adds_bos = build(vocabulary)
        special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        own = vocabulary.of_type(TokenType.USER_DEFINED)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
        bos = vocabulary.ids["bos_token"]
        if bos is not None and vocabulary.flag("add_bos_token", adds_bos):
            text = vocabulary.tokens[bos]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[text, "$A"], pair=[text, "$A", text, "$B"], special_tokens=[(text, bos)]
            )
    except GGUFError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise vocabulary.fail(f"the vocabulary is refused by tokenizers: {error}") from error
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
    vocabulary = Vocabulary(file)
    if len(vocabulary.tokens) != config["vocab_size"]:
        raise vocabulary.fail(f"{len(vocabulary.tokens)} tokens for {config['vocab_size']} rows of embeddings")
    build_tokenizer(vocabulary).save(str(out / "tokenizer.json"))
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
    if vocabulary.chat_template is not None:
        settings["chat_template"] = vocabulary.chat_template
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
