"""A frozen transformers model with routers, run over packed rows: the model that is trained and evaluated.

The routers are submodules `self_attn.router` of the attention modules, so that their names in the state dict are those
of a Flux model directory. A `Routing` travels with the call, as a keyword, to every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from cuda_reference.data_packing import Pack
from cuda_reference.model import attach, check_scores, routers
from cuda_reference.objective import gumbel_route
from cuda_reference.packed_attention import PackedAttention
from flux_mlx.spec import FluxConfig, PatternConfig
from flux_mlx.spec.config import ROUTER_INFIX

ATTENTION_NAME = "flux_packed"


class Routing:
    """How one pack is routed, and what the routers said.

    Not a dataclass: FSDP copies those on their way into every layer, and what a layer writes would be lost.

    Args:
        pack: The pack.
        attention: Attention of this pack.
        tau: Temperature of the routes.
        noise: `[model layers, G * groups]` from `logistic_noise`, or None: the decisions of inference.
        hard: Straight-through routes; False mixes both branches.
        by_head: One decision for each head instead of one for each layer.
        forced: bool `[model layers, groups]`, True is full: routes that replace the routers' own. None: the routers
            decide.
        pooled: Layer to pooled queries `[G * groups, D]`, filled in by the call if a dict is given.

    Attributes:
        logits: Layer to route logits `[groups, 2]` (by head `[HQ * groups, 2]`), filled in by the call.
        z: Layer to weights of full attention `[G, groups]`, filled in by the call.
        seen: Layers whose attention ran, filled in by the call.
    """

    def __init__(
        self,
        pack: Pack,
        attention: PackedAttention,
        *,
        tau: float = 1.0,
        noise: torch.Tensor | None = None,
        hard: bool = True,
        by_head: bool = False,
        forced: torch.Tensor | None = None,
        pooled: dict[int, torch.Tensor] | None = None,
    ):
        self.pack, self.attention, self.tau, self.noise = pack, attention, tau, noise
        self.hard, self.by_head, self.forced, self.pooled = hard, by_head, forced, pooled
        self.logits: dict[int, torch.Tensor] = {}
        self.z: dict[int, torch.Tensor] = {}
        self.seen: set[int] = set()
        self._windows: dict[int, PackedAttention] = {}

    def omega(self) -> torch.Tensor:
        """Share of sparse layers (or heads) that each sample ends with, `[N]` float32, with the routers' gradient."""
        return 1.0 - self.shares().mean(0)

    def shares(self) -> torch.Tensor:
        """Weight of full attention that each sample ends with (by head: the mean over heads), `[layers, N]`."""
        return torch.stack([self.z[layer].mean(0) for layer in sorted(self.z)])[:, self.pack.final_group]

    def plain(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window_tokens: int | None
    ) -> torch.Tensor:
        """Attention of a layer without a router: full, or a sliding window, which is streaming without a sink."""
        full = torch.full((1, self.pack.groups), window_tokens is None, device=self.pack.tokens.device)
        if window_tokens is None:
            return self.attention(q, k, v, full, scale)
        if window_tokens not in self._windows:
            pattern = PatternConfig(block_size=1, sink_tokens=0, window_tokens=window_tokens)
            self._windows[window_tokens] = PackedAttention(self.pack, pattern)
        return self._windows[window_tokens](q, k, v, full, scale)

    def full_layers(self) -> torch.Tensor:
        """Routes, bool `[layers, G, groups]`: True is full."""
        return torch.stack([self.z[layer].detach() > 0.5 for layer in sorted(self.z)])


def _pool(queries: torch.Tensor, pack: Pack, by_head: bool) -> torch.Tensor:
    """Pooled queries of each group, float32 `[groups, D]`, by head `[HQ * groups, D]`; `queries` is `[1, T, HQ, D]`."""
    x = queries[0, pack.pool_rows].float()  # [groups, 2 P, HQ, D]
    x = x.movedim(2, 0) if by_head else x.mean(2)[None]  # [G, groups, 2 P, D]
    return (x * pack.pool_weights[..., None]).sum(2).flatten(0, 1)


def _routed_attention(
    module, query, key, value, attention_mask, scaling, flux: Routing | None = None, sliding_window=None, **kwargs
):
    """transformers' attention interface: `[1, H, T, D]` in, `[1, T, HQ, D]` out.

    Layers without a router are full, or have the sliding window that the family names. Dropout is left out.
    """
    layer, queries = module.layer_idx, module.__dict__.pop("flux_queries", None)
    _check_call(module, flux, attention_mask, sliding_window, kwargs)
    flux.seen.add(layer)
    if not hasattr(module, "router"):
        return flux.plain(query, key, value, scaling, sliding_window).transpose(1, 2).contiguous(), None
    if flux.pooled is not None:
        flux.pooled[layer] = _pool(queries, flux.pack, flux.by_head)
    if flux.forced is not None:
        z = flux.forced[layer][None].float()
        out = flux.attention(query, key, value, z > 0.5, scaling)
    else:
        logits = module.router(_pool(queries, flux.pack, flux.by_head))
        noise = None if flux.noise is None else flux.noise[layer]
        z = gumbel_route(logits, noise, flux.tau, hard=flux.hard).view(-1, flux.pack.groups)
        flux.logits[layer] = logits
        out = flux.attention.mixture(query, key, value, z, scaling, hard=flux.hard)
    flux.z[layer] = z
    return out.transpose(1, 2).contiguous(), None


def _check_call(
    module: nn.Module,
    flux: Routing | None,
    mask: object,
    window_tokens: int | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Refuse a call that packed attention would silently compute in another way than the family does."""
    name = type(module).__name__
    if flux is None:
        raise ValueError(
            f"[PackedModel] expected a pack's routing in every attention call, got none in {name}: its layers do not "
            "hand keywords on, or the backbone was called by itself."
        )
    if mask is not None:
        raise ValueError(f"[PackedModel] expected masks of transformers' own making, got one that {name}'s model made.")
    check_scores("PackedModel", kwargs)
    kinds = getattr(module.config, "layer_types", None)
    expected = "full_attention" if window_tokens is None else "sliding_attention"
    if kinds and kinds[module.layer_idx] != expected:
        raise ValueError(
            f"[PackedModel] layer {module.layer_idx}: expected {expected}, since {name} calls attention with the "
            f"sliding window {window_tokens}, got layer type {kinds[module.layer_idx]!r}."
        )


def _check_rope(config: PreTrainedConfig) -> None:
    """Refuse RoPE whose frequencies depend on the longest sample of a call: in a row it would be that of the others."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [p["rope_type"] for p in (parameters, *parameters.values()) if isinstance(p, dict) and "rope_type" in p]
    by_length = sorted({kind for kind in each if "dynamic" in kind or kind == "longrope"})
    if by_length:
        raise ValueError(f"[PackedModel] expected RoPE that does not depend on a call's length, got {by_length}.")


AttentionInterface.register(ATTENTION_NAME, _routed_attention)


class PackedModel(nn.Module):
    """Frozen backbone and routers.

    Args:
        backbone: A causal LM that `model.attach` takes.
        config: Pattern and sizes of the routers.
        by_head: One decision for each head instead of one for each layer (a baseline).

    Raises:
        ValueError: The backbone cannot be routed, or its RoPE depends on the length of a call ("dynamic", "longrope").
    """

    def __init__(self, backbone: PreTrainedModel, config: FluxConfig, by_head: bool = False):
        super().__init__()
        _check_rope(backbone.get_decoder().config)
        backbone.requires_grad_(False)
        self.backbone, self.config, self.by_head = attach(backbone, config), config, by_head
        backbone.set_attn_implementation(ATTENTION_NAME)
        self.routed_layers = tuple(routers(backbone))

    @property
    def groups(self) -> int:
        """G: decisions of one layer for one sample."""
        return self.backbone.config.num_attention_heads if self.by_head else 1

    def routers(self) -> dict[str, torch.Tensor]:
        """The routers' parameters under the names of a Flux model directory."""
        return {name: p for name, p in self.backbone.named_parameters() if ROUTER_INFIX in name}

    def forward(self, pack: Pack, **routing: object) -> tuple[torch.Tensor, Routing]:
        """Run a pack.

        Args:
            pack: On the model's device.
            routing: Further fields of `Routing`.

        Returns:
            (logits `[M, vocab]` of the pack's loss rows, the routing with z and route logits filled in).

        Raises:
            ValueError: The family computes its attention in a way that the packed form does not have.
        """
        flux = Routing(pack, PackedAttention(pack, self.config.pattern), by_head=self.by_head, **routing)
        logits = self.backbone(
            input_ids=pack.tokens[None],
            position_ids=pack.positions[None],
            use_cache=False,
            logits_to_keep=pack.loss_rows,
            flux=flux,
        ).logits.squeeze(0)  # not [0], whose gradient is a copy
        missing = sorted(set(range(len(self.backbone.get_decoder().layers))) - flux.seen)
        if missing:
            raise ValueError(f"[PackedModel] expected attention of the registry in every layer, got none in {missing}.")
        return logits, flux
