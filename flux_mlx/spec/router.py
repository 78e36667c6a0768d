"""The layer router in float64: prompt queries in, FULL or SPARSE out."""

from __future__ import annotations

import numpy as np

from flux_mlx.spec.config import Route, RouterConfig


def pool_queries(queries: np.ndarray, pool_tokens: int) -> np.ndarray:
    """Mean over the first and the last P tokens, then over the heads.

    Args:
        queries: `[B, L, HQ, D]`, after q_proj (and q_norm), before RoPE, of `prompt[:-1]`. L >= 1.
        pool_tokens: P. A prompt shorter than 2P counts the overlap twice.

    Returns:
        `[B, D]` float64.
    """
    x = np.asarray(queries, np.float64)
    ends = np.concatenate([x[:, :pool_tokens], x[:, -pool_tokens:]], axis=1)
    return ends.mean(axis=(1, 2))


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), without overflow."""
    return x * (0.5 * (1.0 + np.tanh(0.5 * x)))


def _linear(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    weight, bias = (np.asarray(weights[f"{name}.{part}"], np.float64) for part in ("weight", "bias"))
    return x @ weight.T + bias


def route_logits(weights: dict[str, np.ndarray], pooled: np.ndarray) -> np.ndarray:
    """Context encoder and router head.

    Args:
        weights: One layer's parameters, named and shaped as `RouterConfig.parameter_shapes` says.
        pooled: `[B, D]`.

    Returns:
        `[B, 2]` float64: logit 0 speaks for SPARSE, logit 1 for FULL.
    """
    x = _linear(weights, "encoder.2", silu(_linear(weights, "encoder.0", pooled)))
    x = silu(_linear(weights, "head.2", silu(_linear(weights, "head.0", x))))
    return _linear(weights, "head.4", x)


def p_full(logits: np.ndarray) -> np.ndarray:
    """softmax(logits)[1], `[B]`."""
    return 1.0 / (1.0 + np.exp(logits[:, 0] - logits[:, 1]))


def decide(logits: np.ndarray) -> list[Route]:
    """FULL iff logit 1 > logit 0, row by row; FULL, the safe one, if they are not numbers."""
    return [Route.SPARSE if sparse >= full else Route.FULL for sparse, full in logits]


def init_weights(head_dim: int, config: RouterConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A fresh router: uniform in +-1/sqrt(fan-in), the last layer's weight 0 and its bias (0, init_bias). float32."""
    shapes = config.parameter_shapes(head_dim)
    weights = {}
    for name, shape in shapes.items():
        fan_in = shapes[name.rpartition(".")[0] + ".weight"][1]
        weights[name] = rng.uniform(-(fan_in**-0.5), fan_in**-0.5, shape).astype(np.float32)
    weights["head.4.weight"] = np.zeros(shapes["head.4.weight"], np.float32)
    weights["head.4.bias"] = np.array([0.0, config.init_bias], np.float32)
    return weights
