"""The seam between routing and mlx-lm's model families: where an attention module keeps its projections and norms.

A family is listed when a test builds a tiny model of it and finds `project`, rope and the output projection equal to
its own attention. Families that do more (gates, sinks, norms after rope, rotated queries of other layouts) would be
computed wrongly without an error, so the list is closed.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

ATTENTION_MODULES = (
    *("cohere", "dots1", "ernie4_5", "ernie4_5_moe", "gemma", "gemma3_text", "glm4", "glm4_moe", "granite"),
    *("granitemoe", "granitemoehybrid", "helium", "internlm3", "llama", "mimo", "nanbeige", "nemotron", "olmo2"),
    *("olmoe", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "starcoder2"),
)
"""Modules of `mlx_lm.models` whose attention fits the seam. Other model types use them too: smollm3 is llama's."""

Projected = tuple[mx.array, mx.array, mx.array]  # queries, keys and values


def family(attn: nn.Module) -> str:
    """The mlx-lm module that an attention module comes from."""
    return type(attn).__module__.removeprefix("mlx_lm.models.")


def is_routable(attn: Any, entry: object) -> bool:
    """Whether a layer can be routed: attention of a listed family, over all keys (the stock entry is a KVCache)."""
    return type(entry) is KVCache and isinstance(attn, nn.Module) and family(attn) in ATTENTION_MODULES


def project(attn: nn.Module, x: mx.array) -> Projected:
    """Queries, keys and values before RoPE, `[B, L, H, D]` each, of the attention input `[B, L, hidden]`."""
    q, k, v = _project(attn, x)
    B, L, _ = x.shape
    q = _norm_heads(attn.get("q_norm"), q, (B, L, attn.n_heads, -1))
    k = _norm_heads(attn.get("k_norm"), k, (B, L, attn.n_kv_heads, -1))
    return q, k, v.reshape(B, L, attn.n_kv_heads, -1)


def project_token(attn: nn.Module, x: mx.array) -> Projected:
    """The same of one token, `[1, 1, hidden]` to `[1, H, 1, D]`: nothing is to be transposed then."""
    if any(norm.weight.ndim > 1 for norm in (attn.get("q_norm"), attn.get("k_norm")) if norm is not None):
        return tuple(part.swapaxes(1, 2) for part in project(attn, x))  # weights [H, D]
    q, k, v = _project(attn, x)
    q = _norm_heads(attn.get("q_norm"), q, (1, attn.n_heads, 1, -1))
    k = _norm_heads(attn.get("k_norm"), k, (1, attn.n_kv_heads, 1, -1))
    return q, k, v.reshape(1, attn.n_kv_heads, 1, -1)


def _project(attn: nn.Module, x: mx.array) -> Projected:
    """`[B, L, hidden]` to queries, keys and values `[B, L, H*D]`."""
    if "qkv_proj" not in attn:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    qkv = attn.qkv_proj(x)
    size = qkv.shape[-1] // (attn.n_heads + 2 * attn.n_kv_heads)
    return mx.split(qkv, [attn.n_heads * size, (attn.n_heads + attn.n_kv_heads) * size], axis=-1)


def project_queries(attn: nn.Module, x: mx.array) -> mx.array:
    """Only the queries of `project`."""
    if "qkv_proj" in attn:
        return project(attn, x)[0]
    return _norm_heads(attn.get("q_norm"), attn.q_proj(x), (*x.shape[:2], attn.n_heads, -1))


def project_keys(attn: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
    """Only keys and values of `project`, of a module that projects them apart from queries."""
    shape = (*x.shape[:2], attn.n_kv_heads, -1)
    return _norm_heads(attn.get("k_norm"), attn.k_proj(x), shape), attn.v_proj(x).reshape(shape)


def _norm_heads(norm: nn.Module | None, x: mx.array, shape: tuple[int, ...]) -> mx.array:
    """[B, L, H*D] to `shape` [B, L, H, D], normed over D or over H*D, whichever the norm's weight fits."""
    split = x.reshape(shape)
    if norm is None:
        return split
    if norm.weight.shape[-1] == split.shape[-1]:
        return norm(split)
    return norm(x).reshape(split.shape)


def rotate(attn: nn.Module, x: mx.array, offset: Any) -> mx.array:
    """RoPE of `[B, H, L, D]` at `offset` (int, or int32 `[B]`); unchanged in families without."""
    return x if attn.rope is None else attn.rope(x, offset=offset)


def head_dim(attn: nn.Module) -> int:
    """D of a module whose projections are not wrapped (by adapters or quantisation tools) yet."""
    if "qkv_proj" in attn:
        return attn.qkv_proj.weight.shape[0] // (attn.n_heads + 2 * attn.n_kv_heads)
    return attn.q_proj.weight.shape[0] // attn.n_heads


def inner_model(model: nn.Module) -> nn.Module:
    """The module whose forward pass runs the layers; in families that also take images it lies deeper."""
    while "language_model" in model:
        model = model.language_model
    return model.model
