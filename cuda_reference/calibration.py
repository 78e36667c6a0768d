"""A start for routers that tell prompts apart: the first layer centres and scales the pooled queries of real prompts.

Pooled queries of different prompts have a large common part. A router with PyTorch's usual start passes on little else:
each of its five layers shrinks the differences, and training first finds one route for all prompts. Here the first
layer's weight and bias take out mean and spread, measured on a few rows, and the hidden layers keep the variance
(He et al., arXiv 1502.01852, with SiLU's second moment). The parameters and what they compute stay as they are.

A recipe may go one step further: `fit_masks` teaches the routers one mask for each task, found by a search on training
samples (`search`), with a confidence that leaves training something to explore.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional

from cuda_reference.baselines import mask_of
from cuda_reference.data_packing import Pack
from cuda_reference.model import routers
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import Recipe
from cuda_reference.router import LayerRouter

SILU_SECOND_MOMENT = 0.3557  # E[silu(x)^2] for x ~ N(0, 1)
FIT_STEPS, FIT_LR, FIT_WEIGHT_DECAY = 300, 1e-3, 0.01
Pooled = tuple[dict[int, torch.Tensor], torch.Tensor]
"""Layer to pooled queries float32 `[n, D]`, by head `[HQ n, D]`; and the samples' tasks, int64 `[n]`."""

HELD_OUT = 16  # one sample in so many does not take part in the fit
SMALLEST_SPREAD = 0.1  # of a layer's mean spread: dimensions that hardly vary are not blown up further


def check_start(model: PackedModel, recipe: Recipe) -> None:
    """Refuse a recipe whose start is of another model.

    Raises:
        ValueError: The model has another number of layers, or no router in a layer that the start names.
    """
    if not recipe.start:
        return
    advice = "search for masks of this model, or train without a start: --set start={}"
    layers = len(model.backbone.get_decoder().layers)
    if layers != recipe.start_layers:
        raise ValueError(
            f"[check_start] expected a model of {recipe.start_layers} layers, as the recipe's start is, got one of "
            f"{layers}; {advice}."
        )
    for task, full in recipe.start.items():
        wrong = sorted(set(full) - set(model.routed_layers))
        if wrong:
            raise ValueError(
                f"[check_start] expected routed layers, got {wrong} in the start of task {task!r}; {advice}."
            )


@torch.no_grad()
def pooled_queries(model: PackedModel, pack: Pack) -> Pooled:
    """Pooled queries of the samples of a pack on the model's device, with every layer full."""
    layers = max(model.routed_layers) + 1
    forced = torch.ones(layers, pack.samples, dtype=torch.bool, device=pack.tokens.device)
    _, routing = model(pack, forced=forced, pooled={})
    return routing.pooled, pack.task


def joined(rows: Sequence[Pooled]) -> Pooled:
    """The samples of all `rows`, one after another."""
    pooled = {layer: torch.cat([pooled[layer] for pooled, _ in rows]) for layer in rows[0][0]}
    return pooled, torch.cat([task for _, task in rows])


def _of_all(rows: list[Pooled]) -> list[Pooled]:
    """The rows of all processes on the first one, none on the others; row i of process k is row i * processes + k."""
    if not dist.is_initialized():
        return rows
    parts: list[list[Pooled]] | None = [[] for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather_object([_moved(row, "cpu") for row in rows], parts)
    return [row for turn in zip_longest(*(parts or [])) for row in turn if row is not None]


def _moved(row: Pooled, device: torch.device | str) -> Pooled:
    """A row on another device."""
    return {layer: pooled.to(device) for layer, pooled in row[0].items()}, row[1].to(device)


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


def fit_masks(
    routers: Mapping[int, LayerRouter],
    pooled: Mapping[int, torch.Tensor],
    task: torch.Tensor,
    masks: torch.Tensor,
    confidence: float,
) -> None:
    """Fit routers to one mask for each task: training then starts from what a search found, not from all full.

    Args:
        routers: Layer to calibrated router.
        pooled: Layer to pooled queries `[n, D]`.
        task: `[n]` int64.
        masks: bool `[tasks, model layers]`, True is full.
        confidence: p that the fit aims at for each decision, in (0.5, 1).
    """
    parameters = [p for router in routers.values() for p in router.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=FIT_LR, weight_decay=FIT_WEIGHT_DECAY)
    low, span = 1.0 - confidence, 2.0 * confidence - 1.0
    for _ in range(FIT_STEPS):
        losses = [
            functional.binary_cross_entropy_with_logits(_gap(router, pooled[layer]), low + span * masks[task, layer])
            for layer, router in routers.items()
        ]
        optimiser.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimiser.step()
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def agreement(
    routers: Mapping[int, LayerRouter], pooled: Mapping[int, torch.Tensor], task: torch.Tensor, masks: torch.Tensor
) -> float:
    """Share of the decisions that follow the masks; arguments as `fit_masks`."""
    alike = [(_gap(router, pooled[layer]) > 0) == masks[task, layer] for layer, router in routers.items()]
    return float(torch.stack(alike).float().mean())


def _gap(router: LayerRouter, pooled: torch.Tensor) -> torch.Tensor:
    """logit 1 - logit 0 of every sample, `[n]`."""
    return router(pooled).diff(dim=1).squeeze(1)


def calibrate_model(model: PackedModel, packs: Iterable[Pack], recipe: Recipe) -> float:
    """`calibrate` every router on the recipe's rows, then fit its start, if it has one, on all but a sixteenth.

    With several processes each reads its rows, the first one fits to all of them, and its routers go to all.

    Args:
        model: With fresh routers.
        packs: This process's rows: all are read, so that their loader ends.
        recipe: Of the start.

    Returns:
        Share of the decisions that follow the masks on the samples that the fit did not see; nan without a start, and
        on processes other than the first.
    """
    device = next(model.parameters()).device
    rows = _of_all([pooled_queries(model, pack.to(device)) for pack in packs])
    share = _fit(model, _moved(joined(rows), device), recipe) if rows else float("nan")
    if dist.is_initialized():
        for parameter in model.routers().values():
            dist.broadcast(parameter.data, src=0)
    return share


def _fit(model: PackedModel, rows: Pooled, recipe: Recipe) -> float:
    """`calibrate_model` on the rows of all processes."""
    (pooled, task), found = rows, routers(model.backbone)
    for layer, router in found.items():
        calibrate(router, pooled[layer])
    share = float("nan")
    if recipe.start:
        layers = len(model.backbone.get_decoder().layers)
        masks = torch.stack([mask_of(list(recipe.start[name]), layers) for name in recipe.tasks]).to(task.device)
        kept = len(task) - max(1, len(task) // HELD_OUT)
        fit_masks(found, {k: x[:kept] for k, x in pooled.items()}, task[:kept], masks, recipe.start_confidence)
        share = agreement(found, {k: x[kept:] for k, x in pooled.items()}, task[kept:], masks)
    return share
