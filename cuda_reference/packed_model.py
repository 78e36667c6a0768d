"""A frozen transformers model whose layers carry routers, run over packed rows: the model that is trained and evaluated.

The routers are submodules `self_attn.router` of the attention modules, so that their names in the state dict are those
of a Flux model directory. A `Routing` travels with the call, as a keyword, to every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cuda_reference.data_packing import Pack
from cuda_reference.objective import gumbel_route
from cuda_reference.packed_attention import PackedAttention
from cuda_reference.router import LayerRouter
from flux_mlx.spec import PatternConfig, RouterConfig

ATTENTION_NAME = "flux_packed"


@dataclass
class Routing:
    """How one pack is routed, and what the routers said.

    Args:
        pack: The pack.
        attention: Attention of this pack.
        tau: Temperature of the routes.
        noise: `[layers, G * N]` from `logistic_noise`, or None: the decisions of inference.
        hard: Straight-through routes; False mixes both branches.
        forced: bool `[layers, N]`, True is full: routes that replace the routers' own. None: the routers decide.
        logits: Layer to route logits `[N, 2]` (by head `[HQ * N, 2]`), filled in by the call.
        z: Layer to weights of full attention `[G, N]`, filled in by the call.
    """

    pack: Pack
    attention: PackedAttention
    tau: float = 1.0
    noise: torch.Tensor | None = None
    hard: bool = True
    forced: torch.Tensor | None = None
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    z: dict[int, torch.Tensor] = field(default_factory=dict)

    def omega(self) -> torch.Tensor:
        """Share of sparse layers (or heads) of each sample, `[N]` float32, with the routers' gradient."""
        return 1.0 - torch.stack([self.z[layer].mean(0) for layer in sorted(self.z)]).mean(0)

    def full_layers(self) -> torch.Tensor:
        """Routes, bool `[layers, G, N]`: True is full."""
        return torch.stack([self.z[layer].detach() > 0.5 for layer in sorted(self.z)])


def _pool(queries: torch.Tensor, pack: Pack, by_head: bool) -> torch.Tensor:
    """Pooled queries of each sample, float32 `[N, D]`, or by head `[HQ * N, D]`; `queries` is `[1, T, HQ, D]`."""
    x = queries[0].float()
    x = x.transpose(0, 1) if by_head else x.mean(1)[None]  # [G, T, D]
    pooled = (x[:, pack.pool_rows] * pack.pool_weights[..., None]).sum(2)
    return pooled.flatten(0, 1)


def _remember_routing(module: nn.Module, args: tuple, kwargs: dict) -> None:
    module.flux_routing = kwargs.get("flux")


def _pool_hook(attention: nn.Module, by_head: bool):  # noqa: ANN202
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if attention.flux_routing is not None and attention.flux_routing.forced is None:
            queries = output.view(*output.shape[:2], -1, attention.head_dim)
            attention.flux_pooled = _pool(queries, attention.flux_routing.pack, by_head)

    return hook


def _routed_attention(module, query, key, value, attention_mask, scaling, flux: Routing, **kwargs):  # noqa: ANN001, ANN202
    """transformers' attention interface: `[1, H, T, D]` in, `[1, T, HQ, D]` out."""
    layer = module.layer_idx
    if flux.forced is not None:
        z = flux.forced[layer][None].float()
        out = flux.attention(query, key, value, z > 0.5, scaling)
    else:
        logits = module.router(module.flux_pooled)
        noise = None if flux.noise is None else flux.noise[layer]
        z = gumbel_route(logits, noise, flux.tau, hard=flux.hard).view(-1, flux.pack.samples)
        flux.logits[layer] = logits
        out = flux.attention.mixture(query, key, value, z, scaling, hard=flux.hard)
    flux.z[layer] = z
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _routed_attention)


class PackedModel(nn.Module):
    """Frozen backbone and routers.

    Args:
        backbone: A causal LM of transformers with `model.layers[i].self_attn`, q_proj and perhaps q_norm.
        pattern: What sparse layers see; only streaming is trained (triangle and xattention decode as streaming).
        router: Sizes of the routers.
        by_head: One decision for each head instead of one for each layer (a baseline).

    Raises:
        ValueError: The backbone's attention modules are not of that form.
    """

    def __init__(self, backbone: PreTrainedModel, pattern: PatternConfig, router: RouterConfig, by_head: bool = False):
        super().__init__()
        self.backbone, self.pattern, self.router_config, self.by_head = backbone, pattern, router, by_head
        backbone.requires_grad_(False)
        backbone.set_attn_implementation(ATTENTION_NAME)
        self.attentions = [layer.self_attn for layer in backbone.model.layers]
        for attention in self.attentions:
            if not hasattr(attention, "q_proj") or not hasattr(attention, "head_dim"):
                raise ValueError(f"[PackedModel] expected attention with q_proj, got {type(attention).__name__}.")
            attention.router = LayerRouter(attention.head_dim, router)
            attention.register_forward_pre_hook(_remember_routing, with_kwargs=True)
            last = getattr(attention, "q_norm", None) or attention.q_proj
            last.register_forward_hook(_pool_hook(attention, by_head))

    @property
    def layers(self) -> int:
        """Routed layers."""
        return len(self.attentions)

    @property
    def groups(self) -> int:
        """G: decisions of one layer for one sample."""
        return self.backbone.config.num_attention_heads if self.by_head else 1

    def routers(self) -> dict[str, torch.Tensor]:
        """The routers' parameters under the names of a Flux model directory."""
        return {name: p for name, p in self.backbone.named_parameters() if ".self_attn.router." in name}

    def forward(self, pack: Pack, **routing: object) -> tuple[torch.Tensor, Routing]:
        """Run a pack.

        Args:
            pack: On the model's device.
            routing: Further fields of `Routing`.

        Returns:
            (logits `[M, vocab]` of the pack's loss rows, the routing with z and route logits filled in).
        """
        flux = Routing(pack, PackedAttention(pack, self.pattern), **routing)
        hidden = self.backbone.model(
            input_ids=pack.tokens[None], position_ids=pack.positions[None], use_cache=False, flux=flux
        ).last_hidden_state
        return self.backbone.lm_head(hidden[0, pack.loss_rows]), flux
