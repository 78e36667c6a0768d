"""Routing hung onto transformers' own causal LMs: `attach`, `Routing`, `generate`.

The models are not written again. A hook reads the queries at the projection's output, before RoPE, and the attention
function registered as "flux" routes them and computes full or sparse attention. What a call must know and what it
decides is one `Routing` object, handed to the model's forward pass: `model(input_ids, routing=routing)`. A call
without one is the stock model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cuda_reference.attention import sparse_attention
from cuda_reference.router import LayerRouter, decide, pool_queries
from flux_mlx.spec import FluxConfig, PatternConfig, Route
from flux_mlx.spec.config import RoutePolicy

ATTENTION = "flux"  # name in transformers' registries
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Keywords by which some families change the scores, or choose the keys themselves; ours do neither."""

Mix = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, route logits float32 `[B, 2]`) to z `[B]`, the weight of the full branch."""
Branch = Callable[[Any], torch.Tensor]
"""An index of rows of the batch to their attention `[rows, L, HQ, D]`."""


class Routing:
    """Routes of one batch of prompts: decided in the first call that it is handed to, kept for decoding.

    Args:
        config: What sparse layers see, pool size, and the route policy (`FluxConfig.route`).
        prompt_tokens: Length of each row's prompt, its last token included, 2 or more. Routers read `prompt[:-1]`;
            the first call must hold all of it, and may hold more (an answer, padding on the right). Sparse attention
            treats the later queries as decoding.
        mix: Training: both branches run and are mixed, z * full + (1 - z) * sparse. Called once a layer, and again
            with the same logits when activation checkpointing (use_reentrant=False) runs the layer again, so its noise
            must be drawn beforehand. None: one branch a row, by `router.decide`.
        impl: Implementation of sparse attention; None is the device's default.

    Attributes:
        logits: Layer to route logits, float32 `[B, 2]`, of the layers that the routers decided.
        z: Layer to the weights of the full branch `[B]`, if `mix` is given.
        routes: Layer to the rows' routes, if `mix` is not given.

    Raises:
        ValueError: A prompt without a token before its last one.
    """

    def __init__(
        self, config: FluxConfig, prompt_tokens: Sequence[int], *, mix: Mix | None = None, impl: str | None = None
    ):
        self.prompt_tokens = [int(n) for n in prompt_tokens]
        if not self.prompt_tokens or min(self.prompt_tokens) < 2:
            raise ValueError(f"[Routing] expected prompts of 2 tokens or more, got {self.prompt_tokens}.")
        self.config, self.mix, self.impl = config, mix, impl
        self.logits: dict[int, torch.Tensor] = {}
        self.z: dict[int, torch.Tensor] = {}
        self.routes: dict[int, list[Route]] = {}

    def decide(self, layer: int, router: LayerRouter, queries: torch.Tensor) -> None:
        """Set the route of `layer` from its queries before RoPE, `[B, L, HQ, D]`, or from the policy."""
        policy = self.config.route
        if policy != "auto":
            full = policy == "full" or (policy != "sparse" and layer in policy)
            self.routes[layer] = [Route.FULL if full else Route.SPARSE] * len(self.prompt_tokens)
            return
        pooled_tokens = [n - 1 for n in self.prompt_tokens]
        if queries.shape[1] < max(pooled_tokens):
            raise ValueError(
                f"[Routing] the first call must hold every prompt but its last token: expected {max(pooled_tokens)} "
                f"tokens or more, got {queries.shape[1]}."
            )
        logits = router(pool_queries(queries, self.config.router.pool_tokens, pooled_tokens))
        self.logits[layer] = logits
        if self.mix is None:
            self.routes[layer] = decide(logits)
        else:
            self.z[layer] = self.mix(layer, logits)


def attach(model: PreTrainedModel, config: FluxConfig) -> PreTrainedModel:
    """Make a transformers causal LM route, in place: fresh float32 routers `layers.{i}.self_attn.router` are added.

    Layers with global attention and separate `q_proj` are routed; the others stay as they are.

    Args:
        model: Any causal LM whose attention goes through transformers' attention registry.
        config: Settings, kept as `model.flux`.

    Returns:
        `model`.

    Raises:
        ValueError: No layer can be routed, the route names a layer that is not routed, or `attach` was called before.
    """
    if hasattr(model, "flux"):
        raise ValueError("[attach] the model has routers already.")
    decoder = model.get_decoder()
    config.check_layers(len(decoder.layers))
    attentions = {i: x.self_attn for i, x in enumerate(decoder.layers) if _is_routable(x, decoder.config, i)}
    if not attentions:
        raise ValueError(
            f"[attach] {type(model).__name__}: expected layers with global attention and a q_proj, got none."
        )
    _check_route("attach", config.route, attentions)
    for attention in attentions.values():
        attention.router = LayerRouter(attention.head_dim, config.router).to(attention.q_proj.weight.device)
        _watch_queries(attention)
    AttentionInterface.register(ATTENTION, flux_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    model.flux = config
    return model


def routers(model: PreTrainedModel) -> dict[int, LayerRouter]:
    """The routers of an attached model by layer index."""
    attentions = {i: getattr(layer, "self_attn", None) for i, layer in enumerate(model.get_decoder().layers)}
    return {i: attention.router for i, attention in attentions.items() if hasattr(attention, "router")}


def _check_route(who: str, route: RoutePolicy, routed: Collection[int]) -> None:
    wrong = [] if isinstance(route, str) else [layer for layer in route if layer not in routed]
    if wrong:
        raise ValueError(f"[{who}] expected full layers among the routed ones, {sorted(routed)}; got {wrong}.")


def _is_routable(layer: nn.Module, config: Any, index: int) -> bool:
    attention = getattr(layer, "self_attn", None)
    kinds = getattr(config, "layer_types", None)
    is_global = kinds[index] == "full_attention" if kinds else getattr(config, "sliding_window", None) is None
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx")
    return is_global and all(hasattr(attention, part) for part in parts)


def _watch_queries(attention: nn.Module) -> None:
    """Leave the queries before RoPE, `[B, L, HQ, D]`, as `attention.flux_queries` for the attention function.

    They are q_proj's output, or q_norm's where the family has one. State lies in `__dict__`, out of the sight of
    `parameters()` and `state_dict()`; the hooks are plain functions, so that a model can be copied.
    """
    norm = getattr(attention, "q_norm", None)
    for module, hook in ((attention.q_proj, _keep_projection), (norm, _keep_normed)):
        if isinstance(module, nn.Module):
            module.__dict__["flux_owner"] = attention
            module.register_forward_hook(hook)


def _keep_projection(projection: nn.Module, args: Any, out: torch.Tensor) -> None:
    state = projection.flux_owner.__dict__
    state["flux_layout"] = out.data_ptr(), out.shape[1], out.stride(1)  # not the tensor: it must not be kept alive
    state["flux_queries"] = out.unflatten(-1, (-1, projection.flux_owner.head_dim))


def _keep_normed(norm: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    """Some families norm `[B, L, H * D]`, some `[B, L, H, D]`, some `[B, H, L, D]`.

    The strides of the norm's input, a view of q_proj's output, tell which axis the tokens are.
    """
    attention, x = norm.flux_owner, args[0]
    address, tokens, token_stride = attention.flux_layout
    if x.data_ptr() != address:
        raise ValueError(
            f"[attach] {type(attention).__name__} norms its queries after another step than q_proj; expected q_norm to "
            "read q_proj's output."
        )
    if out.dim() == 3:
        out = out.unflatten(-1, (-1, attention.head_dim))
    elif x.shape[1] != tokens or x.stride(1) != token_stride:
        out = out.transpose(1, 2)
    attention.__dict__["flux_queries"] = out


def flux_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    routing: Routing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of attached models: stock SDPA, except where `routing` wants sparse attention.

    Args:
        module: The attention module; routed if it has a `router`.
        query: `[B, HQ, L, D]` after RoPE.
        key, value: `[B, HKV, S, D]`.
        attention_mask: As stock SDPA. Routed batches are padded on the right and have no padding to mask.

    Returns:
        (`[B, L, HQ, D]`, None).

    Raises:
        ValueError: Masked padding, dropout, scores that sparse attention does not know, or decoding of rows with
            prompts of different lengths.
    """
    queries = module.__dict__.pop("flux_queries", None)

    def full(rows: Any) -> torch.Tensor:
        mask = attention_mask if attention_mask is None or attention_mask.shape[0] == 1 else attention_mask[rows]
        return sdpa_attention_forward(module, query[rows], key[rows], value[rows], mask, dropout, scaling, **kwargs)[0]

    if routing is None or not hasattr(module, "router"):
        return full(slice(None)), None
    check_scores("flux_attention", kwargs)
    _check_call(routing, query, key, attention_mask, dropout)
    if routing.mix is not None or module.layer_idx not in routing.routes:  # training: also when recomputed
        routing.decide(module.layer_idx, module.router, queries)

    def sparse(rows: Any) -> torch.Tensor:
        prompts = routing.prompt_tokens[rows] if isinstance(rows, slice) else [routing.prompt_tokens[i] for i in rows]
        return _sparse(query[rows], key[rows], value[rows], routing, prompts, scaling).transpose(1, 2)

    return _combine(routing, module.layer_idx, query.shape[2], key.shape[2], full, sparse), None


def check_scores(who: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse an attention call, by its keywords, whose scores are not plain causal ones.

    Raises:
        ValueError: One of `UNSUPPORTED` is there and not None.
    """
    extra = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if extra:
        raise ValueError(f"[{who}] expected plain causal scores, got {extra}.")


def _check_call(
    routing: Routing,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
) -> None:
    who, (q_tokens, kv_tokens) = "[flux_attention]", (query.shape[2], key.shape[2])
    if dropout:
        raise ValueError(f"{who} expected plain causal scores, got dropout {dropout}.")
    if query.shape[0] != len(routing.prompt_tokens):
        raise ValueError(f"{who} the routing is of {len(routing.prompt_tokens)} rows, the batch of {query.shape[0]}.")
    chunk = 1 < q_tokens < kv_tokens
    if attention_mask is not None and not (chunk and bool(attention_mask[..., -1, :].all())):
        raise ValueError(f"{who} expected rows padded on the right without an attention mask, got one that masks.")
    if q_tokens < kv_tokens and len(set(routing.prompt_tokens)) > 1:
        raise ValueError(f"{who} rows decode together only if their prompts have one length: {routing.prompt_tokens}.")


def _combine(routing: Routing, layer: int, q_tokens: int, kv_tokens: int, full: Branch, sparse: Branch) -> torch.Tensor:
    """The branches of a batch as its routes say, `[B, L, HQ, D]`."""
    everything = slice(None)
    if _is_dense(routing.config.pattern, q_tokens, kv_tokens):
        return full(everything)
    if layer in routing.z:
        z = routing.z[layer][:, None, None, None]
        dense = full(everything)
        return (z * dense + (1 - z) * sparse(everything)).to(dense.dtype)
    rows = {kind: [i for i, route in enumerate(routing.routes[layer]) if route == kind] for kind in Route}
    if not rows[Route.SPARSE]:
        return full(everything)
    if not rows[Route.FULL]:
        return sparse(everything)
    order = torch.tensor(rows[Route.FULL] + rows[Route.SPARSE]).argsort().tolist()
    return torch.cat([full(rows[Route.FULL]), sparse(rows[Route.SPARSE])])[order]


def _is_dense(pattern: PatternConfig, q_tokens: int, kv_tokens: int) -> bool:
    """Whether sparse attention of this call is full attention; xattention's prefill chooses blocks at any length."""
    return pattern.is_dense(kv_tokens) and (pattern.name != "xattention" or q_tokens < kv_tokens)


def _sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routing: Routing,
    prompt_tokens: Sequence[int],
    scale: float | None,
) -> torch.Tensor:
    """Sparse attention `[B, HQ, L, D]`: exact prefill of each row's `prompt[:-1]`, streaming for later queries."""
    pattern, options = routing.config.pattern, {"scale": scale, "impl": routing.impl}
    if pattern.name == "streaming" or q.shape[2] < k.shape[2]:
        return sparse_attention(q, k, v, pattern, **options)
    rows = []
    for b, n in enumerate(prompt_tokens):
        row = [x[b : b + 1] for x in (q, k, v)]
        prompt = [x[:, :, : n - 1] for x in row]
        parts = [sparse_attention(*prompt, pattern, prompt_tokens=n, **options)]
        if q.shape[2] >= n:
            parts.append(sparse_attention(row[0][:, :, n - 1 :], *row[1:], pattern, **options))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Args:
        tokens: The new tokens.
        routes: Layer to route.
        logits: Layer to route logits `[2]`, of the layers that the routers decided.
    """

    tokens: list[int]
    routes: dict[int, Route]
    logits: dict[int, torch.Tensor]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    route: RoutePolicy | None = None,
    stop_tokens: Sequence[int] = (),
    impl: str | None = None,
) -> Generation:
    """Greedy generation for one prompt: exact prefill of `prompt[:-1]`, then one token at a time on the same routes.

    Args:
        model: An attached model.
        prompt: Token ids, 2 or more.
        max_tokens: New tokens at most.
        route: Policy that stands in for the model's (`FluxConfig.route`).
        stop_tokens: Ids that end the generation; not returned.
        impl: Implementation of sparse attention.

    Raises:
        ValueError: A prompt that is too short, or a route that names layers that are not routed.
    """
    config = model.flux if route is None else replace(model.flux, route=route)
    _check_route("generate", config.route, routers(model))
    routing = Routing(config, [len(prompt)], impl=impl)
    ids = torch.tensor([list(prompt)], device=model.device)
    options = {"past_key_values": DynamicCache(config=model.config), "use_cache": True, "routing": routing}
    model(ids[:, :-1], logits_to_keep=1, **options)
    tokens, token = [], ids[:, -1:]
    while len(tokens) < max_tokens:
        token = model(token, **options).logits[:, -1:].argmax(-1)
        if token.item() in stop_tokens:
            break
        tokens.append(token.item())
    return Generation(
        tokens,
        {layer: rows[0] for layer, rows in routing.routes.items()},
        {layer: rows[0] for layer, rows in routing.logits.items()},
    )
