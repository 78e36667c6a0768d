"""Routing hung onto mlx-lm's own models: one class for every family, no copies of their code.

What a layer does is `flux_mlx.routed_attention`; here are the model around it, and loading.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import _get_classes

from flux_mlx.cache import CacheList, describe_routes, trim_noted
from flux_mlx.cache import routes as taken_routes
from flux_mlx.callers import refuse_gguf_export, refuse_long_drafts
from flux_mlx.declared_types import is_of_type
from flux_mlx.environment import forced_route, switched_on
from flux_mlx.families import ATTENTION_MODULES, head_dim, is_routable
from flux_mlx.late_decisions import read_late
from flux_mlx.routed_attention import RoutedAttention
from flux_mlx.routed_block import LAYERS_AT_ONCE, RoutedBlock
from flux_mlx.router import Affine, LayerRouter
from flux_mlx.router_training import Samples, TrainableAffine, make_trainable
from flux_mlx.spec import FluxConfig, Route
from flux_mlx.spec.config import ROUTER_INFIX, RoutePolicy
from flux_mlx.token_steps import TokenSteps
from flux_mlx.window_cache import ROOM_TOKENS

KV_POLICIES = ("keep", "evict")


class FluxModel:
    """Mixed in front of a stock model class: caches, weights and settings of a routed model."""

    flux_samples: Samples | None = None

    def make_cache(self) -> list[Any]:
        """The stock cache, with a routed cache for every routed layer."""
        entries = self._stock_cache()
        for i, attn in routed_layers(self).items():
            entries[i] = attn.new_cache()
        return entries

    def _stock_cache(self) -> list[Any]:
        stock = getattr(super(), "make_cache", None)
        return stock() if stock else [KVCache() for _ in self.layers]

    @property
    def max_draft_tokens(self) -> int | None:
        """Drafts that one call can verify: not taken for a prompt by routers, not too many for a window to take back.

        None: any number, with forced routes and all keys.
        """
        if self.flux.route == "auto":
            return self.flux.router.max_draft_tokens
        return ROOM_TOKENS - 1 if any(attn.evicts for attn in routed_layers(self).values()) else None

    @property
    def cast_predicate(self):
        """For `mlx_lm.convert`: routers keep their dtype."""
        stock = getattr(super(), "cast_predicate", lambda _: True)
        return lambda name: ROUTER_INFIX not in name and stock(name)

    @staticmethod
    def trainable_parameter_filter(module: nn.Module, key: str, value: Any) -> bool:
        """For `mlx_lm.lora`: full fine-tuning leaves routers alone, as LoRA does, unless asked for them."""
        frozen = isinstance(module, Affine) and not isinstance(module, TrainableAffine)
        return not frozen and nn.Module.trainable_parameter_filter(module, key, value)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The stock model's renaming; router weights pass through it."""
        stock = getattr(super(), "sanitize", lambda w: w)
        routers = {name: weight for name, weight in weights.items() if ROUTER_INFIX in name}
        return stock({name: weight for name, weight in weights.items() if name not in routers}) | routers


def _checked_call(stock: type) -> Any:
    """`stock.__call__` behind a check of the cache; the signature stays, because mlx-lm reads it."""

    @functools.wraps(stock.__call__)
    def call(self, *args: Any, **kwargs: Any) -> mx.array:
        cache = kwargs.get("cache", args[1] if len(args) > 1 else None)
        if cache is None:
            if self.training and self.flux_samples is not None:
                self.flux_samples.note(args[0] if args else kwargs["inputs"])
            return stock.__call__(self, *args, **kwargs)
        if len(cache) != len(self.layers):
            raise ValueError(f"[FluxModel] the cache has {len(cache)} entries, the model {len(self.layers)} layers.")
        inputs = args[0] if args else kwargs.get("inputs")
        if args:  # mlx-lm passes tokens by position
            refuse_long_drafts(self, inputs)
        is_late = False
        for entry in cache:
            CacheList.adopt(entry)
            is_late = is_late or (type(entry) is CacheList and (entry.decision is not None or bool(entry.noted)))
        trim_noted(cache)
        tokens = 0 if inputs is None else inputs.shape[-1]
        if is_late and _needs_routes(self.flux, tokens, cache):
            read_late(cache)
        before = taken_routes(cache) if self.flux_show else None
        out = stock.__call__(self, *args, **kwargs)
        if self.flux_show and (after := taken_routes(cache)) != before:
            _show(cache, max(len(route) if isinstance(route, list) else 1 for route in after))
        return out

    return call


def _needs_routes(config: FluxConfig, tokens: int, cache: list[Any]) -> bool:
    """Whether a call has so few tokens that the host must know the routes, and they matter."""
    held = next(entry for entry in cache if isinstance(entry, CacheList)).size()
    return 0 < tokens < config.router.min_prefill_tokens and not config.pattern.is_dense(held + tokens)


def _show(cache: list[Any], rows: int) -> None:
    """Print the routes of every row to stderr."""
    for row in range(rows):
        name = f"row {row}: " if rows > 1 else ""
        print(f"flux: {name}{describe_routes(cache, row)}", file=sys.stderr)


def _shard(stock: type) -> Any:
    """`stock.shard`, which splits heads over ranks, with the layers told of it."""

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        group = group or mx.distributed.init()
        stock.shard(self, group)
        for attn in routed_layers(self).values():
            attn.group = group

    return shard


@functools.cache
def _mixed(mixin: type, stock: type) -> type:
    members = {"__call__": _checked_call(stock)} if mixin is FluxModel else {}
    if mixin is FluxModel and hasattr(stock, "shard"):
        members["shard"] = _shard(stock)
    return type(f"Flux{stock.__name__}", (mixin, stock), {"__module__": stock.__module__, **members})


def routed_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The routed attention modules of a model, by layer index."""
    attns = {i: dict.get(layer, "self_attn") for i, layer in enumerate(model.layers) if isinstance(layer, dict)}
    return {i: attn for i, attn in attns.items() if isinstance(attn, RoutedAttention)}


def apply(model: nn.Module, config: FluxConfig) -> nn.Module:
    """Make a loaded mlx-lm model route, in place. Its weights and their names stay; fresh routers are added.

    Args:
        model: A model of mlx-lm, quantised or not. Layers that are not `is_routable` stay as they are.
        config: Settings.

    Returns:
        `model`.

    Raises:
        ValueError: No layer can be routed, or the route names a layer that is not there.
    """
    return _apply(model, config, fresh=True)


def _apply(model: nn.Module, config: FluxConfig, fresh: bool) -> nn.Module:
    """`apply`; unless `fresh`, the routers wait for weights that are loaded next."""
    if isinstance(model, FluxModel):
        raise ValueError("[apply] the model is a Flux model already; change its routes with set_route.")
    if not hasattr(model, "layers"):
        raise ValueError(f"[apply] {type(model).__name__} has no layers that could be routed.")
    config.check_layers(len(model.layers))
    attns = {i: getattr(layer, "self_attn", None) for i, layer in enumerate(model.layers)}
    entries = make_prompt_cache(model)
    chosen = {i: attn for i, attn in attns.items() if is_routable(attn, entries[i])}
    if not chosen:
        raise ValueError(
            f"[apply] {type(model).__module__} has no layer that can be routed: expected global attention of one of "
            f"{', '.join(ATTENTION_MODULES)}."
        )
    next_piece = 0
    for i, attn in chosen.items():
        attn.__class__ = _mixed(RoutedAttention, type(attn))
        attn.pooled_dim = head_dim(attn)
        attn.router = LayerRouter(attn.pooled_dim, config.router, seed=i if fresh else None)
        attn.flux = config
        block = model.layers[i]
        block.__class__ = _mixed(RoutedBlock, type(block))
        block.token_steps = TokenSteps()
        block.hands_over = next_piece <= i < len(model.layers) - 1
        next_piece = i + LAYERS_AT_ONCE if block.hands_over else next_piece
    model.__class__ = _mixed(FluxModel, type(model))
    model.flux = config
    model.flux_show = switched_on("FLUX_MLX_SHOW_ROUTES")
    set_route(model, config.route)
    return model


def set_route(model: nn.Module, policy: RoutePolicy) -> None:
    """Choose how layers are routed from now on.

    Args:
        model: A Flux model.
        policy: "auto" (the routers decide), "full", "sparse", or the full layers (the other routed ones are sparse).

    Raises:
        ValueError: A layer of the list is not a routed layer of the model.
    """
    routed = routed_layers(model)
    wrong = [] if isinstance(policy, str) else sorted(set(policy) - set(routed))
    if wrong:
        raise ValueError(f"[set_route] {wrong} are not routed layers; the model routes layers {sorted(routed)}.")
    model.flux = dataclasses.replace(model.flux, route=policy if isinstance(policy, str) else tuple(policy))
    words = {"auto": None, "full": Route.FULL, "sparse": Route.SPARSE}
    for i, attn in routed.items():
        attn.forced = words[policy] if isinstance(policy, str) else Route.FULL if i in policy else Route.SPARSE


def set_kv_policy(model: nn.Module, policy: str) -> None:
    """Choose what sparse layers keep from now on.

    Args:
        model: A Flux model.
        policy: "keep": all keys and values. "evict": once a layer is sparse, sink and window only, dropped for good:
            the layer stays sparse as long as the cache lives, and cuts reach back one block. For one row at a time.

    Raises:
        ValueError: Another word.
    """
    if policy not in KV_POLICIES:
        raise ValueError(f"[set_kv_policy] policy must be one of {list(KV_POLICIES)}, got {policy!r}.")
    for attn in routed_layers(model).values():
        attn.evicts = policy == "evict"


class ModelArgs:
    """The whole config.json of a Flux model directory, as mlx-lm's loader asks for it."""

    def __init__(self, config: dict[str, Any]):
        if "flux" not in config:
            raise ValueError("[ModelArgs] config.json has no flux section; make the directory with flux_mlx.convert.")
        self.config = config
        self.flux = FluxConfig.from_dict(config["flux"])

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """The form of the call in mlx-lm."""
        return cls(config)


def Model(args: ModelArgs) -> nn.Module:  # noqa: N802 (mlx-lm's loader asks for this name)
    """Build the stock model of the config's `model_type` and make it route; its routers wait for their weights.

    Stock commands have no flags for this: `FLUX_MLX_ROUTE` in the environment overrides the config's route,
    `FLUX_MLX_TRAIN_ROUTERS=1` opens the routers to trainers.

    Raises:
        ValueError: The config does not fit the stock model, or `mlx_lm.fuse --export-gguf` loads it.
    """
    refuse_gguf_export()
    stock_model, stock_args = _get_classes(args.config)
    _check_types(args.config, stock_args)
    model = _apply(stock_model(stock_args.from_dict(args.config)), args.flux, fresh=False)
    if (route := forced_route()) is not None:
        set_route(model, route)
    if switched_on("FLUX_MLX_TRAIN_ROUTERS"):
        model.flux_samples = make_trainable(routed_layers(model).values())
    return model


def _check_types(config: dict[str, Any], stock_args: type) -> None:
    """Refuse numbers, words and switches of another type than the stock model declares: it would fail in use."""
    for field in dataclasses.fields(stock_args) if dataclasses.is_dataclass(stock_args) else ():
        declared = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        value = config.get(field.name)
        if value is not None and not is_of_type(declared, value):
            raise ValueError(f"[Model] {field.name} must be of type {declared}, got {value!r}.")
