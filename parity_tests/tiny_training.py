"""A tiny model directory and a tiny corpus, for tests of data, training and evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WORDS = (
    "the",
    "of",
    "and",
    "a",
    "in",
    "is",
    "it",
    "for",
    "on",
    "was",
    "as",
    "with",
    "be",
    "by",
    "at",
    "this",
    "are",
    "from",
)


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE if chat else None
    return fast


def tiny_model(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=264,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write_model(folder: Path, layers: int = 2) -> Path:
    """A model directory with tokenizer."""
    tiny_model(layers).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_corpus(root: Path, packages: int = 40) -> Path:
    """Packages of made-up code and prose, as an installation has them."""
    for number in range(packages):
        package = root / f"package{number}"
        package.mkdir(parents=True)
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] + str(number) for i in range(160)]
        lines = [" ".join(words[i : i + 8]) for i in range(0, 160, 8)]
        (package / "README.md").write_text(f"Package {number}\n\n" + "\n".join(lines) + "\n")
        code = "\n".join(f"def function_{number}_{i}(a, b):\n    return a + b * {i}\n" for i in range(30))
        (package / "code.py").write_text(f'"""{" ".join(words[::-1])}"""\n\n{code}')
    return root


STEPS, LR = 3, 1e-2
SETTINGS = (
    f"optimiser.steps={STEPS}",
    f"optimiser.lr={LR}",
    "data.row_tokens=2048",
    "data.shortest_tokens=1700",
    "data.longest_tokens=2000",
    "calibration_rows=2",
    "calibration_tokens=[600, 1000]",
    "start={}",
    "start_layers=2",
    "data.text_chars=200000",
    "pattern.window_tokens=256",
    'loss="kl"',
)


def training_arguments(home: Path, out: Path, *more: str) -> list[str]:
    """A training command on the model and corpus in `home`; `more` are settings, options first."""
    options = ["--model", str(home / "model"), "--out", str(out), "--device", "cpu", "--set", *SETTINGS]
    return [*options, *more]
