"""A tiny Llama written as a GGUF by the `gguf` package: the source of the conversion tests. No two axes are equal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flux_mlx.gguf_directory import write_plain_directory

SPECIAL_TOKENS = ["<|end|>", "<|start|>"]
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ w", "e r", "Ġw er", "1 2", "a a", "aa a", "Ġ Ġ", "' s"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tokens() -> list[str]:
    """Two special tokens, the 256 bytes, one token for each merge."""
    return SPECIAL_TOKENS + list(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in MERGES]


@dataclass
class TinyLlama:
    """Sizes and what to write; a test changes a field to make the file wrong.

    Args:
        changes: Metadata key to value: int, float, bool, str or list; None leaves the key out.
        tensors: GGUF tensor name to array; None leaves the tensor out.
    """

    layers: int = 3
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 96
    bias: bool = False
    tied: bool = True
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
    pre: str = "smollm"
    vocabulary: list[str] = field(default_factory=tokens)
    changes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray | None] = field(default_factory=dict)

    def weights(self) -> dict[str, np.ndarray]:
        """The model under its usual names, float32, from a fixed seed."""
        rng = np.random.default_rng(7)
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"q_proj": (q_rows, self.hidden), "k_proj": (kv_rows, self.hidden), "v_proj": (kv_rows, self.hidden)}
        shapes = {f"self_attn.{name}": shape for name, shape in shapes.items()}
        shapes |= {"self_attn.o_proj": (self.hidden, q_rows), "mlp.down_proj": (self.hidden, self.inner)}
        shapes |= {"mlp.gate_proj": (self.inner, self.hidden), "mlp.up_proj": (self.inner, self.hidden)}
        layer = {f"{name}.weight": shape for name, shape in shapes.items()}
        layer |= {f"{name}.bias": shape[:1] for name, shape in shapes.items() if self.bias and "attn" in name}
        layer |= {"input_layernorm.weight": (self.hidden,), "post_attention_layernorm.weight": (self.hidden,)}
        model = {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        model |= {"model.embed_tokens.weight": (len(self.vocabulary), self.hidden), "model.norm.weight": (self.hidden,)}
        if not self.tied:
            model["lm_head.weight"] = (len(self.vocabulary), self.hidden)
        return {name: 0.2 * rng.standard_normal(shape, np.float32) for name, shape in model.items()}

    def _gguf_tensors(self) -> dict[str, np.ndarray]:
        top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        top["lm_head.weight"] = "output.weight"
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}
        written = {}
        for name, value in self.weights().items():
            if name in top:
                written[top[name]] = value
                continue
            _, _, index, *middle, part = name.split(".")
            written[f"blk.{index}.{_GGUF_NAMES['.'.join(middle)]}.{part}"] = (
                permute(value, heads[middle[-1]]) if middle[-1] in heads else value
            )
        return written | self.tensors

    def _metadata(self) -> dict[str, Any]:
        sizes = {"block_count": self.layers, "embedding_length": self.hidden, "feed_forward_length": self.inner}
        sizes |= {"attention.head_count": self.heads, "attention.head_count_kv": self.kv_heads}
        sizes |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        sizes |= {"rope.dimension_count": self.head_dim, "context_length": 512}
        metadata: dict[str, Any] = {f"llama.{key}": value for key, value in sizes.items()}
        metadata |= {"llama.rope.freq_base": 50000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5}
        metadata |= {"general.architecture": "llama", "general.name": "Tiny", "general.license": "apache-2.0"}
        kinds = [3] * len(SPECIAL_TOKENS) + [1] * (len(self.vocabulary) - len(SPECIAL_TOKENS))
        words = {"model": "gpt2", "pre": self.pre, "tokens": self.vocabulary, "token_type": kinds, "merges": MERGES}
        words |= {"bos_token_id": 1, "eos_token_id": 0, "add_bos_token": False}
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in words.items()}
        return metadata | {"tokenizer.chat_template": CHAT_TEMPLATE} | self.changes

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        writer = gguf.GGUFWriter(path, arch=None)
        for key, value in self._metadata().items():
            _add(writer, key, value)
        for name, value in self._gguf_tensors().items():
            if value is None:
                continue
            as_is = value.ndim == 1 or value.dtype != np.float32 or name in self.tensors
            kind = None if as_is else self.quant
            writer.add_tensor(name, value if as_is else gguf.quantize(value, self.quant), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row order of q and k in Llama GGUFs: the rotary pair (i, i + D/2) of a head becomes (2i, 2i + 1)."""
    half = rows.shape[0] // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in range(2)]
    return rows[order]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def write_tiny_directory(folder: Path) -> Path:
    """A plain model directory `folder / "plain"`, made of `folder / "tiny.gguf"`, with licence and card."""
    out = folder / "plain"
    write_plain_directory(TinyLlama().write(folder / "tiny.gguf"), out)
    (out / "LICENSE").write_text("Apache License")
    (out / "generation_config.json").write_text('{"eos_token_id": 0}')
    (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text()) | {"my_key": 1}))
    return out
