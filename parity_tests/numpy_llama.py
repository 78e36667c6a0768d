"""A Llama forward pass in numpy with exact routing: the oracle of a whole Flux model, and its float32 baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from flux_mlx import spec
from flux_mlx.models import routed_layers
from flux_mlx.spec import FluxConfig, Route
from flux_mlx.spec.router import silu
from parity_tests.tolerances import baseline_attention


class NumpyLlama:
    """Runs a prompt through an mlx-lm llama's weights.

    Args:
        model: A Flux model of mlx-lm's llama, without RoPE scaling.
        dtype: float64 for the oracle, float32 for the baseline.
    """

    def __init__(self, model: Any, dtype: type):
        self.args, self.flux, self.dtype = model.args, model.flux, dtype
        self.weights = {name: np.array(value, dtype) for name, value in tree_flatten(model.parameters())}
        attns = routed_layers(model)
        self.routers = {
            i: {name: np.array(value) for name, value in tree_flatten(attn.router.parameters())}
            for i, attn in attns.items()
        }

    def __call__(self, prompt: list[int], flux: FluxConfig | None = None) -> tuple[np.ndarray, list[Route], float]:
        """Logits of the last token `[vocabulary]`, the routes, and the smallest margin of a decision."""
        h = self.weights["model.embed_tokens.weight"][prompt]
        routes, margins = [], []
        for i in range(self.args.num_hidden_layers):
            x = self._norm(f"model.layers.{i}.input_layernorm", h)
            q = self._linear(f"model.layers.{i}.self_attn.q_proj", x).reshape(
                len(prompt), self.args.num_attention_heads, -1
            )
            pooled = spec.pool_queries(q[None, :-1], self.flux.router.pool_tokens)
            logits = spec.route_logits(self.routers[i], pooled)
            routes += spec.decide(logits)
            margins.append(abs(float(logits[0, 1] - logits[0, 0])))
            h = h + self._linear(f"model.layers.{i}.self_attn.o_proj", self._attend(i, x, q, routes[-1]))
            x = self._norm(f"model.layers.{i}.post_attention_layernorm", h)
            gate, up = (self._linear(f"model.layers.{i}.mlp.{name}_proj", x) for name in ("gate", "up"))
            h = h + self._linear(f"model.layers.{i}.mlp.down_proj", silu(gate) * up)
        return self._linear("lm_head", self._norm("model.norm", h[-1:]))[0], routes, min(margins)

    def _attend(self, layer: int, x: np.ndarray, q: np.ndarray, route: Route) -> np.ndarray:
        tokens = len(x)
        k, v = (
            self._linear(f"model.layers.{layer}.self_attn.{name}_proj", x).reshape(
                tokens, self.args.num_key_value_heads, -1
            )
            for name in ("k", "v")
        )
        q, k, v = (part.swapaxes(0, 1)[None] for part in (self._rope(q), self._rope(k), v))
        mask = np.tri(tokens, dtype=bool)
        if route == Route.SPARSE:
            mask = spec.visible_mask(self.flux.pattern, tokens, tokens)
        scale = q.shape[-1] ** -0.5
        if self.dtype is np.float64:
            out, _ = spec.masked_attention(q, k, v, mask, scale)
        else:
            out, _ = baseline_attention(q, k, v, mask, scale, "float32")
        return out[0].swapaxes(0, 1).reshape(tokens, -1)

    def _rope(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of `[L, H, D]`, halves rotated against one another."""
        half = x.shape[-1] // 2
        rates = self.dtype(self.args.rope_theta) ** (-np.arange(half, dtype=self.dtype) / self.dtype(half))
        angles = np.arange(len(x), dtype=self.dtype)[:, None] * rates
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        low, high = x[..., :half], x[..., half:]
        return np.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        mean_square = np.square(x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.dtype(self.args.rms_norm_eps)) * self.weights[f"{name}.weight"]

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T
