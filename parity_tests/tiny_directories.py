"""Model directories of tiny models, with a byte-level tokenizer and a chat template, as real commands load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flux_mlx.convert import convert
from flux_mlx.models import routed_layers
from flux_mlx.spec import FluxConfig
from flux_mlx.weights import write_routers
from parity_tests.tiny_models import PATTERN, ROUTER, flux_model, stock_model, tiny_config

VOCABULARY = 272
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SETTINGS = {
    "pattern": PATTERN.name,
    "block_size": PATTERN.block_size,
    "sink_tokens": PATTERN.sink_tokens,
    "window_tokens": PATTERN.window_tokens,
    "pool_tokens": ROUTER.pool_tokens,
}


def write_tokenizer(path: Path) -> None:
    """One token a byte, and one that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def stock_directory(path: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A stock model directory."""
    changes = {"vocab_size": VOCABULARY, **changes}
    path.mkdir(parents=True)
    model = stock_model(family, seed, **changes)
    save_model(path, model)
    config = {**tiny_config(family, **changes), "eos_token_id": 256, "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return path


def router_file(path: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Routers that take both routes, in a file that `flux_mlx.convert --routers` takes."""
    model = flux_model(family, seed, **{"vocab_size": VOCABULARY, **changes})
    routers = {
        i: {name: mx.array(value) for name, value in tree_flatten(attn.router.parameters())}
        for i, attn in routed_layers(model).items()
    }
    write_routers(path, routers, FluxConfig(pattern=PATTERN, router=ROUTER))
    return path


def flux_directory(path: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """The Flux model directory of `stock_directory(family, seed)`, beside which the stock one is written."""
    stock = stock_directory(path.with_name(f"{path.name}-stock"), family, seed, **changes)
    routers = router_file(path.with_name(f"{path.name}-routers.safetensors"), family, seed, **changes)
    convert(stock, path, routers=routers, dtype="float32")
    return path
