"""A Llama-architecture GGUF as mlx-lm knows the model: config.json and tensors under their usual names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flux_mlx.gguf import GGUFError, GGUFFile

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_TOKENS = 1.0, 4.0, 8192  # rope_scaling of every published Llama 3.1 to 3.3


def _shortest(value: float) -> float:
    """The float64 with the shortest decimal form that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Metadata:
    """Typed look-ups in the metadata of one file."""

    def __init__(self, file: GGUFFile):
        self.file = file

    def fail(self, reason: str) -> GGUFError:
        return GGUFError(f"[gguf] {self.file.path}: {reason}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of `key`, of type `kind`; `default` if the key is absent. None as default makes the key required."""
        value = self.file.metadata.get(key, default)
        if value is None:
            raise self.fail(f"metadata key {key} is missing")
        if type(value) is not kind:
            raise self.fail(f"metadata key {key} must be one {kind.__name__}, got {type(value).__name__} {value!r:.40}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A size: an integer from 1 to 2**31 - 1."""
        value = self.get(key, int, default)
        if not 1 <= value < 2**31:
            raise self.fail(f"metadata key {key} must be from 1 to {2**31 - 1}, got {value}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(key, float, default)
        if not 0 < value < np.inf:
            raise self.fail(f"metadata key {key} must be positive and finite, got {value}")
        return _shortest(value)


def _rope_settings(file: GGUFFile, meta: _Metadata, head_dim: int) -> dict[str, Any]:
    """rope_theta and rope_scaling."""
    settings: dict[str, Any] = {"rope_theta": meta.positive("llama.rope.freq_base", 10000.0)}
    kind = meta.get("llama.rope.scaling.type", str, "none")
    if kind not in ("none", "linear", "yarn"):
        raise meta.fail(f"rope scaling {kind!r} is not read; expected none, linear or yarn")
    if kind != "none":
        scaling: dict[str, Any] = {"rope_type": kind, "factor": meta.positive("llama.rope.scaling.factor")}
        if kind == "yarn":
            tokens = meta.size("llama.rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = tokens
        settings["rope_scaling"] = scaling
    if _ROPE_FACTORS in file.tensors:
        settings["rope_scaling"] = _llama3_scaling(file, meta, settings["rope_theta"], head_dim)
    return settings


def _llama3_scaling(file: GGUFFile, meta: _Metadata, theta: float, head_dim: int) -> dict[str, Any]:
    """rope_scaling of type llama3 that gives the file's table of frequency divisors.

    The table has one divisor per frequency: 1 for wavelengths below T/high, `factor` above T/low, and between them
    1 / ((1 - s) / factor + s) with s = (T / wavelength - low) / (high - low).
    """
    stored = file.tensor(_ROPE_FACTORS)
    factor = _shortest(stored.max())
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = _LLAMA3_TOKENS * frequency / (2 * np.pi)
    smooth = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise meta.fail(
            f"{_ROPE_FACTORS} is not the table of Llama 3.1 with factor {factor}, which is all that is read"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_TOKENS,
    }


def llama_config(file: GGUFFile) -> dict[str, Any]:
    """config.json of the model in `file`, in Hugging Face's words; without token ids, which the tokenizer part adds.

    Raises:
        GGUFError: Another architecture, a missing or impossible size, or a Llama variant that mlx-lm's llama lacks.
    """
    meta = _Metadata(file)
    architecture = meta.get("general.architecture", str)
    if architecture != "llama":
        raise meta.fail(f"architecture {architecture!r} is not read; expected 'llama'")
    if meta.get("llama.expert_count", int, 0):
        raise meta.fail("mixtures of experts are not read")
    hidden, heads = meta.size("llama.embedding_length"), meta.size("llama.attention.head_count")
    head_dim = meta.size("llama.attention.key_length", max(1, hidden // heads))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (value := meta.size(key, head_dim)) != head_dim:
            raise meta.fail(f"{key} is {value}; expected the head size {head_dim}")
    kv_heads = meta.size("llama.attention.head_count_kv", heads)
    if heads % kv_heads or head_dim % 2:
        raise meta.fail(f"{heads} heads, {kv_heads} KV heads of size {head_dim}: heads must divide, the size be even")
    vocabulary = file.tensors.get("token_embd.weight")
    if vocabulary is None:
        raise meta.fail("no tensor 'token_embd.weight'")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta.size("llama.feed_forward_length"),
        "num_hidden_layers": meta.size("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": meta.size("llama.context_length"),
        "rms_norm_eps": meta.positive("llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": vocabulary.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        **_rope_settings(file, meta, head_dim),
    }


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name to shape, for every tensor that the model of `config` has."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    attention = {"attn_q": (q_rows, hidden), "attn_k": (kv_rows, hidden), "attn_v": (kv_rows, hidden)}
    attention["attn_output"] = (hidden, q_rows)
    mlp = {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    for matrices, biased in ((attention, config["attention_bias"]), (mlp, config["mlp_bias"])):
        layer |= {f"{name}.weight": shape for name, shape in matrices.items()}
        layer |= {f"{name}.bias": shape[:1] for name, shape in matrices.items() if biased}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_tensors(file: GGUFFile, config: dict[str, Any]) -> None:
    """Compare the file's tensors with those of `config`: same names, same shapes.

    Raises:
        GGUFError: Missing, unknown or wrongly shaped tensors.
    """
    meta = _Metadata(file)
    layers = config["num_hidden_layers"]
    if layers * len(_LAYER_NAMES) > len(file.tensors):
        raise meta.fail(f"block_count is {layers}, but there are only {len(file.tensors)} tensors")
    expected = _expected_shapes(config)
    missing = sorted(expected.keys() - file.tensors.keys())
    unknown = sorted(file.tensors.keys() - expected.keys() - {_ROPE_FACTORS})
    if missing or unknown:
        raise meta.fail(f"tensors missing: {missing[:5] or 'none'}; tensors that Llama does not have: {unknown[:5]}")
    for name, shape in expected.items():
        if file.tensors[name].shape != shape:
            raise meta.fail(f"tensor {name!r} must have shape {list(shape)}, got {list(file.tensors[name].shape)}")


def _model_name(gguf_name: str) -> str:
    """blk.3.attn_q.weight to model.layers.3.self_attn.q_proj.weight."""
    stem, _, part = gguf_name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{part}"
    _, index, name = stem.split(".")
    return f"model.layers.{index}.{_LAYER_NAMES[name]}.{part}"


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order of q and k in Llama GGUFs: pairs (0, 1), (2, 3).. of a head become (i, i + D/2).

    Args:
        rows: `[heads * D, ...]`, a weight or a bias.
        heads: Heads of this projection.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def llama_tensors(file: GGUFFile, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The model's tensors one by one: (name in mlx-lm, float32 array). `check_tensors` must have passed."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name in _expected_shapes(config):
        values = file.tensor(name)
        kind = name.split(".")[-2]
        yield _model_name(name), unpermute(values, heads[kind]) if kind in heads else values
