"""LayerRouter in MLX: the same steps, names and parameters as `flux_mlx.spec.router`."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux_mlx import cuda_router, kernel_policy
from flux_mlx.cuda_router import Counts
from flux_mlx.kernels import dtype_name
from flux_mlx.spec import Route, RouterConfig
from flux_mlx.spec.router import init_weights


class Affine(nn.Module):
    """y = x W^T + b in float32. Not an `nn.Linear`, so that quantisation, casting and LoRA pass it by."""

    def __init__(self, weight: mx.array, bias: mx.array):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        return mx.addmm(self.bias.astype(mx.float32), x, self.weight.astype(mx.float32).T)


class LayerRouter(nn.Module):
    """Decides from the pooled queries of a prompt whether its layer computes full or sparse attention.

    Args:
        head_dim: D.
        config: Pool size and the bias of a fresh router.
        seed: Seed of the fresh weights; None leaves zeros, not computed, for weights that are loaded next.
    """

    def __init__(self, head_dim: int, config: RouterConfig, seed: int | None = 0):
        super().__init__()
        if seed is None:
            weights = {name: mx.zeros(shape) for name, shape in config.parameter_shapes(head_dim).items()}
        else:
            fresh = init_weights(head_dim, config, np.random.default_rng(seed))
            weights = {name: mx.array(value) for name, value in fresh.items()}

        def affine(name: str) -> Affine:
            return Affine(weights[f"{name}.weight"], weights[f"{name}.bias"])

        self.encoder = [affine("encoder.0"), nn.SiLU(), affine("encoder.2")]
        self.head = [affine("head.0"), nn.SiLU(), affine("head.2"), nn.SiLU(), affine("head.4")]

    def __call__(self, pooled: mx.array) -> mx.array:
        """Route logits, float32 `[B, 2]` (0 speaks for SPARSE, 1 for FULL), of the pooled queries `[B, D]`."""
        x = pooled.astype(mx.float32)
        for step in self.encoder + self.head:
            x = step(x)
        return x

    def affine_parameters(self) -> list[mx.array] | None:
        """In the order of `metal_kernels.catalog.ROUTER_PARAMETERS`; None if a step is wrapped or not of float32."""
        steps = [step for step in self.encoder + self.head if not isinstance(step, nn.SiLU)]
        if not all(isinstance(step, Affine) for step in steps):
            return None
        parameters = [x for step in steps for x in (step.weight, step.bias)]
        return parameters if all(x.dtype == mx.float32 for x in parameters) else None


def pool_queries(queries: mx.array, pool_tokens: int) -> mx.array:
    """Mean over the first and the last `pool_tokens` tokens and over the heads: `[B, L, HQ, D]` to float32 `[B, D]`."""
    ends = mx.concatenate([queries[:, :pool_tokens], queries[:, -pool_tokens:]], axis=1)
    return ends.astype(mx.float32).mean(axis=(1, 2))


def mean_over_heads(queries: mx.array) -> mx.array:
    """Of each token: `[T, HQ, D]` to float32 `[T, D]`."""
    if kernel_policy.use_cuda_router(dtype_name(queries), queries.shape[2]):
        return cuda_router.mean_over_heads(queries)
    return queries.astype(mx.float32).mean(axis=1)


def decide_by_kernel(router: LayerRouter, prefix: mx.array, recent: mx.array, counts: Counts) -> mx.array | None:
    """`route_codes` of `router` for what a cache holds, by `flux_mlx.cuda_router`; None where no kernel says it."""
    if prefix.dtype != mx.float32 or not kernel_policy.use_cuda_router("float32", prefix.shape[2]):
        return None
    parameters = router.affine_parameters()
    return None if parameters is None else cuda_router.decide(prefix, recent, counts, parameters)[0]


def p_full(logits: mx.array) -> mx.array:
    """softmax(logits)[1], `[B]`."""
    return mx.sigmoid(logits[:, 1] - logits[:, 0])


def is_sparse(logits: mx.array) -> mx.array:
    """SPARSE unless logit 1 > logit 0, row by row, `[B]`; FULL, the safe one, if they are not numbers."""
    return logits[:, 0] >= logits[:, 1]


def route_codes(logits: mx.array) -> mx.array:
    """`is_sparse` as codes of `Route`, int32 `[B]`."""
    return mx.where(is_sparse(logits), int(Route.SPARSE), int(Route.FULL))


def decide(logits: mx.array) -> list[Route]:
    """The routes. Waits for the logits."""
    return [Route(code) for code in route_codes(logits).tolist()]
