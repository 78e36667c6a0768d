"""Static masks: which layers are full for every prompt. Baselines that routing must beat at equal Omega."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def greedy_path(
    layers: int, fewest: int, loss: Callable[[torch.Tensor], float], drop: int = 1
) -> Iterator[torch.Tensor]:
    """Search: from all full, make the layer sparse that costs least, again and again; yields each mask found.

    Args:
        layers: Layers of the model.
        fewest: Full layers of the last mask.
        loss: Mask to loss on samples that are not those of the evaluation.
        drop: Layers to make sparse at once in the first round, those that cost least alone: most layers of a model
            cost next to nothing, and each round costs a loss for every full layer.
    """
    mask, step = torch.ones(layers, dtype=torch.bool), min(drop, layers - fewest)
    while int(mask.sum()) > fewest:
        full = mask.nonzero().flatten().tolist()
        trials = {layer: loss(_flipped(mask, layer)) for layer in full}
        mask = _flipped(mask, *sorted(full, key=lambda layer: trials[layer])[:step])
        step = 1
        yield mask


def greedy(layers: int, full: int, loss: Callable[[torch.Tensor], float], swaps: int = 0) -> torch.Tensor:
    """The mask of `greedy_path` with `full` full layers, after exchanges of one full and one sparse layer.

    Args:
        layers, loss: As `greedy_path`.
        full: Full layers of the result.
        swaps: Rounds in which the best exchange is made, while it helps.
    """
    mask = [torch.ones(layers, dtype=torch.bool), *greedy_path(layers, full, loss)][-1]
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
