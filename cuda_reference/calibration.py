"""A start for routers that tell prompts apart: the first layer centres and scales the pooled queries of real prompts.

Pooled queries of different prompts have a large common part. A router with PyTorch's usual start passes on little else:
each of its five layers shrinks the differences, and training first finds one route for all prompts. Here the first
layer's weight and bias take out mean and spread, measured on a few rows, and the hidden layers keep the variance
(He et al., arXiv 1502.01852, with SiLU's second moment). The parameters and what they compute stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import distributed as dist
from torch import nn

from cuda_reference.data_packing import Pack
from cuda_reference.model import routers
from cuda_reference.packed_model import PackedModel
from cuda_reference.router import LayerRouter

SILU_SECOND_MOMENT = 0.3557  # E[silu(x)^2] for x ~ N(0, 1)
SMALLEST_SPREAD = 0.1  # of a layer's mean spread: dimensions that hardly vary are not blown up further


@torch.no_grad()
def pooled_queries(model: PackedModel, packs: Iterator[Pack], rows: int) -> dict[int, torch.Tensor]:
    """Pooled queries of the samples in `rows` packs with every layer full: layer to float32 `[n, D]`."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in model.routed_layers}
    device = next(model.parameters()).device
    for _ in range(rows):
        pack = next(packs).to(device)
        _, routing = model(
            pack, forced=torch.ones(max(found) + 1, pack.samples, dtype=torch.bool, device=device), pooled={}
        )
        for layer, pooled in routing.pooled.items():
            found[layer].append(pooled)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@torch.no_grad()
def calibrate(router: LayerRouter, pooled: torch.Tensor) -> None:
    """Start `router` from the pooled queries `[n, D]`, n >= 2. The last layer stays: every prompt has (0, init_bias).

    Raises:
        ValueError: Fewer than two samples, or another D.
    """
    first = router.encoder[0]
    if pooled.dim() != 2 or pooled.shape[0] < 2 or pooled.shape[1] != first.in_features:
        raise ValueError(f"[calibrate] expected pooled [n >= 2, {first.in_features}], got {tuple(pooled.shape)}.")
    mean, spread = pooled.mean(0), pooled.std(0)
    spread = spread.clamp(min=SMALLEST_SPREAD * float(spread.mean()) + 1e-6)
    follows_silu = {router.encoder[2], router.head[2]}
    for layer in (first, router.encoder[2], router.head[0], router.head[2]):
        moment = SILU_SECOND_MOMENT if layer in follows_silu else 1.0
        nn.init.normal_(layer.weight, std=(moment * layer.in_features) ** -0.5)
        layer.bias.zero_()
    first.weight.div_(spread)
    first.bias.copy_(-(first.weight @ mean))


def calibrate_model(model: PackedModel, packs: Iterator[Pack], rows: int) -> None:
    """`calibrate` every router on `rows` packs; with several processes the first one's routers go to all."""
    pooled = pooled_queries(model, packs, rows)
    for layer, router in routers(model.backbone).items():
        calibrate(router, pooled[layer])
    if dist.is_initialized():
        for parameter in model.routers().values():
            dist.broadcast(parameter.data, src=0)
