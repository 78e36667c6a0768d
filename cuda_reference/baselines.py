"""Static masks: which layers are full for every prompt. Baselines that routing must beat at equal Omega."""

from __future__ import annotations

from collections.abc import Callable

import torch


def mask_of(full_layers: list[int], layers: int) -> torch.Tensor:
    """bool `[layers]`, True for the layers named.

    Raises:
        ValueError: A layer that the model does not have.
    """
    wrong = [layer for layer in full_layers if not 0 <= layer < layers]
    if wrong:
        raise ValueError(f"[mask_of] expected layers 0 to {layers - 1}, got {wrong}.")
    mask = torch.zeros(layers, dtype=torch.bool)
    mask[full_layers] = True
    return mask


def interleaved(layers: int, full: int) -> torch.Tensor:
    """`full` layers at equal distances."""
    return mask_of([(2 * i + 1) * layers // (2 * full) for i in range(full)], layers)


def first(layers: int, full: int) -> torch.Tensor:
    """The first `full` layers."""
    return mask_of(list(range(full)), layers)


def last(layers: int, full: int) -> torch.Tensor:
    """The last `full` layers."""
    return mask_of(list(range(layers - full, layers)), layers)


def greedy(layers: int, full: int, loss: Callable[[torch.Tensor], float], swaps: int = 0) -> torch.Tensor:
    """Search: from all full, make the layer sparse that costs least, until `full` are left; then try swaps.

    Args:
        layers: Layers of the model.
        full: Full layers of the result.
        loss: Mask to loss on samples that are not those of the evaluation.
        swaps: Rounds in which the best exchange of one full and one sparse layer is made, while it helps.
    """
    mask = torch.ones(layers, dtype=torch.bool)
    while int(mask.sum()) > full:
        trials = {layer: loss(_flipped(mask, layer)) for layer in mask.nonzero().flatten().tolist()}
        mask = _flipped(mask, min(trials, key=lambda layer: trials[layer]))
    best = loss(mask)
    for _ in range(swaps):
        pairs = [(a, b) for a in mask.nonzero().flatten().tolist() for b in (~mask).nonzero().flatten().tolist()]
        trials = {pair: loss(_flipped(mask, *pair)) for pair in pairs}
        pair = min(trials, key=lambda p: trials[p])
        if trials[pair] >= best:
            break
        best, mask = trials[pair], _flipped(mask, *pair)
    return mask


def _flipped(mask: torch.Tensor, *layers: int) -> torch.Tensor:
    changed = mask.clone()
    for layer in layers:
        changed[layer] = ~changed[layer]
    return changed
