"""Routes of a chosen Omega for benchmarks: which layers stay full, and routers that decide so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn

from flux_mlx.models import routed_layers

_MARGIN = 8.0  # between the two logits of a router that always decides alike


def spread_full_layers(layers: Sequence[int], omega: float, shift: int = 0) -> tuple[int, ...]:
    """The full layers of a spread like that of trained routers: over all of the depth, the first layer included.

    Of n layers the F = round((1 - omega) * n) full ones are those of index floor(i * n / F), i < F; then all are moved
    on by `shift` places, round the end, so that the rows of a batch can differ.

    Args:
        layers: Indices of the routed layers, ascending.
        omega: Share of sparse layers aimed at, in [0, 1].
        shift: Places to move on.

    Raises:
        ValueError: `omega` is out of range, or there is no layer.
    """
    if not layers or not 0 <= omega <= 1:
        raise ValueError(f"[spread_full_layers] expected layers and omega in [0, 1], got {len(layers)} and {omega}.")
    count = round((1 - omega) * len(layers))
    places = ((i * len(layers) // count + shift) % len(layers) for i in range(count))
    return tuple(sorted(layers[place] for place in places))


def make_routers_decide(model: nn.Module, full_layers: Iterable[int]) -> None:
    """Let every router run and decide one way whatever it reads: its last layer becomes a constant.

    So routes are as wished, and the time of routing is in every measurement.

    Args:
        model: A Flux model with route "auto"; its routers are changed in place.
        full_layers: Layers that shall be full; the other routed ones become sparse.
    """
    full = set(full_layers)
    for index, attn in routed_layers(model).items():
        last = attn.router.head[-1]
        last.weight = mx.zeros_like(last.weight)
        last.bias = mx.array([0.0, _MARGIN if index in full else -_MARGIN])
        mx.eval(last.parameters())
