"""Tokenizers read from a GGUF, against byte-level BPE by its definition."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import load
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flux_mlx.gguf_directory import write_plain_directory
from parity_tests.tiny_gguf import MERGES, SPECIAL_TOKENS, TinyLlama, tokens

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
}


def split(piece: str, expressions: list[str]) -> list[str]:
    """Cut a text at the matches of each expression in turn; what lies between two matches is a piece too."""
    pieces = [piece]
    for expression in expressions:
        pieces = [part for old in pieces for part in regex.split(f"({expression})", old) if part]
    return pieces


def encode_slowly(content: str, pre: str, vocabulary: dict[str, int], merges: list[str]) -> list[int]:
    """Byte-level BPE by its definition: split, then join the pair of the earliest merge until none is left."""
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    special = "|".join(map(regex.escape, SPECIAL_TOKENS))
    ids = []
    for part in regex.split(f"({special})", content):
        if part in SPECIAL_TOKENS:
            ids.append(vocabulary[part])
            continue
        for word in split(part, SPLITS[pre]):
            symbols = [bytes_to_unicode()[byte] for byte in word.encode()]
            while pairs := [pair for pair in pairwise(symbols) if pair in rank]:
                best = min(pairs, key=rank.__getitem__)
                i = next(i for i in range(len(symbols)) if tuple(symbols[i : i + 2]) == best)
                symbols[i : i + 2] = ["".join(best)]
            ids += [vocabulary[symbol] for symbol in symbols]
    return ids


@pytest.fixture(scope="module", params=SPLITS)
def pre_and_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Tokenizer]:
    folder = tmp_path_factory.mktemp(request.param)
    path = TinyLlama(layers=1, pre=request.param).write(folder / "tiny.gguf")
    write_plain_directory(path, folder / "plain")
    return request.param, Tokenizer.from_file(str(folder / "plain" / "tokenizer.json"))


PIECES = st.sampled_from([" the", "the", "there", " were", "12", "3456", "aaaa", "  ", "\n", "\r\n", "'s", "'S", " x"])
CHARACTERS = st.characters(max_codepoint=0x24F) | st.sampled_from("½²Ⅷ٣αЖ北京字😀\u3000\u2028\u0301")
TEXTS = st.lists(PIECES | CHARACTERS | st.sampled_from(SPECIAL_TOKENS), max_size=12).map("".join)


@settings(max_examples=100, deadline=None)
@given(content=TEXTS)
def test_tokenizer_is_bpe_by_its_definition(pre_and_tokenizer: tuple[str, Tokenizer], content: str) -> None:
    pre, tokenizer = pre_and_tokenizer
    ids = tokenizer.encode(content, add_special_tokens=False).ids
    assert ids == encode_slowly(content, pre, {token: i for i, token in enumerate(tokens())}, MERGES)
    assert tokenizer.decode(ids, skip_special_tokens=False) == content


def test_words_of_the_vocabulary_need_no_merge(tmp_path: Path) -> None:
    merges = {"tokenizer.ggml.merges": ["t h"]}
    for pre, want in (("llama-bpe", ["the", "Ġ", "th", "e", "n"]), ("qwen2", ["th", "e", "Ġ", "th", "e", "n"])):
        write_plain_directory(TinyLlama(layers=1, pre=pre, changes=merges).write(tmp_path / "a.gguf"), tmp_path / pre)
        tokenizer = Tokenizer.from_file(str(tmp_path / pre / "tokenizer.json"))
        assert tokenizer.encode("the then", add_special_tokens=False).tokens == want


# SentencePiece

WORDS = [
    "the",
    " there",
    "were ",
    "wor",
    "12",
    " other",
    "aaaa",
    "aaa",
    "ü",
    "\t",
    "字",
    "😀",
    "'s",
    "  ",
    "ß",
    "<0x41>",
]
SAMPLES = [
    "the there were other words in the other world 12 34 123",
    "it's not what they were  thinking; aaaa aaa aa a",
    "Wörter über größere Straßen\tund Zeilen",
]


@pytest.fixture(scope="module")
def sentencepiece_model() -> SentencePieceProcessor:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLES * 20),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def sentencepiece_directory(
    sentencepiece_model: SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder, model = tmp_path_factory.mktemp("sentencepiece"), sentencepiece_model
    ids = range(model.vocab_size())
    kinds = [6 if model.is_byte(i) else 3 if model.is_control(i) else 2 if model.is_unknown(i) else 1 for i in ids]
    words = {"model": "llama", "scores": [model.get_score(i) for i in ids], "token_type": kinds, "merges": None}
    words |= {"pre": None, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": None}
    changes = {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    llama = TinyLlama(layers=1, vocabulary=[model.id_to_piece(i) for i in ids], changes=changes)
    write_plain_directory(llama.write(folder / "tiny.gguf"), folder / "plain")
    return folder / "plain"


@settings(max_examples=150, deadline=None)
@given(content=st.lists(st.sampled_from(WORDS) | st.characters(max_codepoint=0x24F), max_size=10).map("".join))
def test_tokenizer_is_sentencepieces(
    sentencepiece_model: SentencePieceProcessor, sentencepiece_directory: Path, content: str
) -> None:
    tokenizer = Tokenizer.from_file(str(sentencepiece_directory / "tokenizer.json"))
    ids = tokenizer.encode(content, add_special_tokens=False).ids
    assert ids == sentencepiece_model.encode(content)
    assert tokenizer.decode(ids) == content


def test_sentencepiece_tokenizer_in_mlx_lm(sentencepiece_directory: Path) -> None:
    _, tokenizer = load(str(sentencepiece_directory))
    ids = tokenizer.encode("the other worlds")
    assert ids[0] == 1
    detokenizer = tokenizer.detokenizer
    for index in ids[1:]:
        detokenizer.add_token(index)
    detokenizer.finalize()
    assert detokenizer.text == "the other worlds"
    assert tokenizer.eos_token_ids == {2}


def test_bos_is_written_when_the_file_asks(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 5}
    write_plain_directory(TinyLlama(changes=changes).write(tmp_path / "tiny.gguf"), tmp_path / "plain")
    _, tokenizer = load(str(tmp_path / "plain"))
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1
    assert tokenizer.eos_token_ids == {0, 5}
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False).endswith("<|start|>")
