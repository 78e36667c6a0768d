"""Routers in the hands of mlx-lm's trainers, which pass them by unless FLUX_MLX_TRAIN_ROUTERS=1 asks for them.

Asked for, a training layer computes full and sparse attention of the whole sample and mixes them by its router: hard
in the forward pass, soft in the backward pass (straight-through). Nothing waits for the device, so the compiled step
of `mlx_lm.lora` stays compiled. The loss is the trainer's: nothing speaks for sparse layers in it, and the router pools
the answer along with the prompt, which stock trainers do not tell apart. `flux_mlx.train` does both; this is for
adapting trained routers to a domain.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.tuner.lora import LoRALinear

from flux_mlx.families import project, rotate
from flux_mlx.router import Affine, LayerRouter


class TrainableAffine(Affine):
    """An affine step that LoRA adapts and full fine-tuning trains."""

    def to_lora(self, r: int = 8, scale: float = 20.0, dropout: float = 0.0) -> LoRALinear:
        """The step with an adapter, as mlx-lm asks for it."""
        return LoRALinear.from_base(self, r=r, scale=scale, dropout=dropout)


class Samples:
    """Token counts of the samples in training, int32 `[B]`, which the layers of a model read.

    No module, so that nothing takes the counts for a parameter.
    """

    lengths: mx.array

    def note(self, tokens: mx.array) -> None:
        """Read the counts off token ids `[B, L]`: mlx-lm's trainer pads rows with token 0 on the right."""
        ends = mx.where(tokens != 0, mx.arange(1, tokens.shape[1] + 1), 1)
        self.lengths = ends.max(axis=1)


def make_trainable(layers: Iterable[nn.Module]) -> Samples:
    """Open the routers of routed attention modules to trainers.

    Returns:
        What must `note` the token ids of every training step.
    """
    samples = Samples()
    for attn in layers:
        attn.samples = samples
        for step in attn.router.encoder + attn.router.head:
            if isinstance(step, Affine):
                step.__class__ = TrainableAffine
    return samples


def pool_samples(queries: mx.array, lengths: mx.array, pool_tokens: int) -> mx.array:
    """`pool_queries` of rows that end in padding: `[B, L, HQ, D]` and `[B]` to float32 `[B, D]`."""
    t, n = mx.arange(queries.shape[1]), lengths[:, None]
    weights = ((t < pool_tokens).astype(mx.float32) + (t >= n - pool_tokens)) * (t < n)
    means = queries.astype(mx.float32).mean(axis=2)
    return (weights[:, :, None] * means).sum(axis=1) / weights.sum(axis=1, keepdims=True)


def full_share(router: LayerRouter, pooled: mx.array) -> mx.array:
    """1 for rows that are routed full, 0 for the others, `[B]`; the gradient is that of `p_full`."""
    logits = router(pooled)
    p = mx.sigmoid(logits[:, 1] - logits[:, 0])
    return (p > 0.5).astype(p.dtype) + (p - mx.stop_gradient(p))


def attend_training(attn: Any, x: mx.array, mask: Any) -> mx.array:
    """A routed attention module over whole samples `[B, L, hidden]`, both routes computed: `[B, L, hidden]`."""
    q, k, v = project(attn, x)  # [B, L, H, D]
    share = full_share(attn.router, pool_samples(q, attn.samples.lengths, attn.flux.router.pool_tokens))
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    q, k = rotate(attn, q, 0), rotate(attn, k, 0)
    full = scaled_dot_product_attention(q, k, v, cache=None, scale=attn.scale, mask=mask)
    share = share[:, None, None, None].astype(q.dtype)
    out = share * full + (1 - share) * attn.attend_sparse(q, k, v, None)
    return attn.o_proj(out.swapaxes(1, 2).reshape(*x.shape[:2], -1))
