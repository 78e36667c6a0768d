"""Routing hung onto mlx-lm's own models: one class for every family, no copies of their code.

A routed layer that computes full attention runs the stock attention module as it is. Only sparse attention needs to
know where a family keeps its projections, norms and rotary embedding: `flux_mlx.families` is that seam.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import _get_classes

from flux_mlx.attention import sparse_attention
from flux_mlx.cache import CacheList, describe_routes
from flux_mlx.cache import routes as taken_routes
from flux_mlx.callers import refuse_gguf_export
from flux_mlx.families import ATTENTION_MODULES, head_dim, is_routable, project, project_queries, rotate
from flux_mlx.router import Affine, LayerRouter, decide, is_sparse, pool_queries
from flux_mlx.router_training import Samples, TrainableAffine, attend_training, make_trainable
from flux_mlx.spec import FluxConfig, Route, parse_route
from flux_mlx.spec.config import ROUTER_INFIX, RoutePolicy
from flux_mlx.streaming import compact

KV_POLICIES = ("keep", "evict")


class RoutedAttention:
    """Mixed in front of a stock attention class: routes a prompt, then computes what the route says.

    Attributes:
        router: The layer's `LayerRouter`.
        pooled_dim: D.
        flux: Settings shared by the layers of the model.
        forced: Route that stands in for the router's decision, or None.
        group: The ranks that share the layer's heads, or None.
        evicts: Whether caches of this layer drop, once it is sparse, what it no longer sees.
        samples: Of the training step, if the router is to be trained (`flux_mlx.router_training`); else None.
    """

    group: mx.distributed.Group | None = None
    evicts = False
    samples: Samples | None = None

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is None and not self.training and self.forced != Route.FULL:
            return self.attend_uncached(x, mask)
        if cache is None and self.training and self.samples is not None and self.forced is None:
            return attend_training(self, x, mask)
        if not isinstance(cache, CacheList):
            return super().__call__(x, mask, cache)
        cache.widen(x.shape[0])
        self.route(x, cache)
        if self.is_dense(cache, x.shape[1]) or Route.SPARSE not in cache.routes:  # dense calls need no route yet
            return super().__call__(x, mask, cache.kv)
        return self.attend(x, mask, cache)

    def is_dense(self, cache: CacheList, tokens: int) -> bool:
        """Whether sparse attention is full attention in this call; xattention's prefill drops blocks at any length."""
        chooses_blocks = self.flux.pattern.name == "xattention" and cache.pinned is not None
        return not chooses_blocks and self.flux.pattern.is_dense(cache.size() + tokens)

    def new_cache(self) -> CacheList:
        """An empty cache for this layer."""
        return CacheList.new(self.pooled_dim, self.flux.router.pool_tokens)

    def route(self, x: mx.array, cache: CacheList) -> None:
        """Pool this call's prompt tokens and decide, unless the call is too short or the route is fixed."""
        if self.forced is not None:
            cache.set_routes([self.forced] * x.shape[0])
        elif cache.pinned is None and not (cache.is_idle and x.shape[1] < self.flux.router.min_prefill_tokens):
            self.route_rows(x, cache)
        cache.caches[1].advance(x.shape[1])

    def route_rows(self, x: mx.array, cache: CacheList) -> None:
        """Pool and decide the rows whose part of the call is long enough; note the others."""
        lengths = cache.row_lengths(x.shape[1])
        pooled = [n >= self.flux.router.min_prefill_tokens for n in lengths]
        cache.skip([0 if is_pooled else n for n, is_pooled in zip(lengths, pooled, strict=True)])
        for row, (n, is_pooled) in enumerate(zip(lengths, pooled, strict=True)):
            if is_pooled:
                self.feed(prompt_ends([x[row : row + 1, :n]], self.flux.router.pool_tokens), n, cache, row)
        if any(pooled):
            self.decide(cache, pooled)

    def feed(self, ends: mx.array, tokens: int, cache: CacheList, row: int = 0) -> None:
        """Pool `tokens` prompt tokens of a row, of which `ends` are the `prompt_ends` as this module gets them."""
        rows, P = self.query_rows(ends), self.flux.router.pool_tokens
        cache.feed(row, rows[:P], rows[-P:], tokens)
        cache.inputs = ends

    def decide(self, cache: CacheList, fed: list[bool]) -> None:
        """Let the router decide the rows that were fed. The decision stays on the device until it is needed."""
        cache.decide(is_sparse(self.route_logits(cache.pooled())), fed)

    def query_rows(self, x: mx.array) -> mx.array:
        """Queries before RoPE, averaged over the heads of all ranks: `[1, L, hidden]` to float32 `[L, D]`."""
        return self.over_ranks(project_queries(self, x)[0].astype(mx.float32).mean(axis=1))

    def over_ranks(self, mean: mx.array) -> mx.array:
        """The mean over the heads of all ranks, of the mean over this rank's."""
        return mean if self.group is None else mx.distributed.all_sum(mean, group=self.group) / self.group.size()

    def route_logits(self, pooled: mx.array) -> mx.array:
        """The router's logits for pooled queries `[B, D]`; those of rank 0, so that all ranks decide the same."""
        logits = self.router(pooled)
        if self.group is not None:
            logits = mx.distributed.all_sum(logits * (self.group.rank() == 0), group=self.group)
        return logits

    def attend(self, x: mx.array, mask: Any, cache: CacheList) -> mx.array:
        """Attention with at least one sparse row, output projection included."""
        if self.evicts and (cache.drops_early or x.shape[1] < self.flux.router.min_prefill_tokens):
            cache.evict(self.flux.pattern)
        offset = cache.offset
        q, k, v = (part.swapaxes(1, 2) for part in project(self, x))  # [B, H, L, D]
        q, k = rotate(self, q, offset), rotate(self, k, offset)
        k, v = cache.kv.update_and_fetch(k, v)
        groups = row_groups([route == Route.SPARSE for route in cache.routes], cache.left_padding())
        return self.attend_rows(q, k, v, mask, list(groups), cache)

    def attend_uncached(self, x: mx.array, mask: Any) -> mx.array:
        """Attention over whole rows without a cache, each routed by itself: `mlx_lm.perplexity`, calibration.

        Training is full attention instead. Every projection runs once, as tools that listen to them expect.
        """
        q, k, v = project(self, x)  # [B, L, H, D]
        routes = [self.forced] * x.shape[0]
        if self.forced is None:
            routes = decide(self.route_logits(self.over_ranks(pool_queries(q, self.flux.router.pool_tokens))))
        q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
        groups = row_groups([route == Route.SPARSE for route in routes], [0] * x.shape[0])
        return self.attend_rows(rotate(self, q, 0), rotate(self, k, 0), v, mask, list(groups), None)

    def attend_rows(
        self, q: mx.array, k: Any, v: Any, mask: Any, groups: list[RowGroup], cache: CacheList | None
    ) -> mx.array:
        """Attention of a batch, group of rows by group, and the output projection: `[B, L, hidden]`."""
        outputs = []
        for group in groups:
            queries, keys, values = q, k, v
            if len(groups) > 1 or group.padding:
                queries, (keys, values) = q[group.rows], (tree_map(group.cut, x) for x in (k, v))
            if group.sparse:
                outputs.append(self.attend_sparse(queries, keys, values, cache))
                continue
            own = mask[group.rows] if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[0] > 1 else mask
            kv = None if cache is None else cache.kv
            out = scaled_dot_product_attention(queries, keys, values, cache=kv, scale=self.scale, mask=own)
            outputs.append(out)
        out = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        return self.o_proj(out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1))

    def attend_sparse(self, q: mx.array, k: Any, v: Any, cache: CacheList | None) -> mx.array:
        """Sparse attention over keys without padding; of quantised keys only the visible ones are dequantised."""
        pattern, prompt_tokens = self.flux.pattern, None if cache is None or cache.is_evicted else cache.pinned
        if cache is not None and hasattr(cache.kv, "bits"):
            if prompt_tokens is None or pattern.name == "streaming":
                k, v = (tuple(compact(part, pattern, q.shape[2]) for part in x) for x in (k, v))
            sizes = {"group_size": cache.kv.group_size, "bits": cache.kv.bits}
            k, v = (mx.dequantize(*x, **sizes).astype(q.dtype) for x in (k, v))
        return sparse_attention(q, k, v, pattern, prompt_tokens=prompt_tokens, scale=self.scale)


class RowGroup(NamedTuple):
    """Consecutive rows of a batch that one attention call can serve."""

    rows: slice
    sparse: bool
    padding: int  # keys on the left to leave out

    def cut(self, x: mx.array) -> mx.array:
        """The group's part of keys or values `[B, HKV, S, D]`."""
        return x[self.rows, :, self.padding :]


def row_groups(sparse: list[bool], left_padding: list[int]) -> Iterator[RowGroup]:
    """The runs of rows that take one route, in order.

    Full rows keep their padding, which their mask hides; sparse rows go without, so that positions are absolute.
    """
    how = [(row, padding if row else 0) for row, padding in zip(sparse, left_padding, strict=True)]
    start = 0
    for key, run in itertools.groupby(how):
        stop = start + len(list(run))
        yield RowGroup(slice(start, stop), *key)
        start = stop


def prompt_ends(chunks: list[mx.array], pool_tokens: int) -> mx.array:
    """What the router pools of a prompt in chunks `[1, ., hidden]`: its first and last `pool_tokens` rows, or all."""
    if sum(chunk.shape[1] for chunk in chunks) <= 2 * pool_tokens:
        return chunks[0] if len(chunks) == 1 else mx.concatenate(chunks, axis=1)
    head, head_tokens, tail, tail_tokens = [], pool_tokens, [], pool_tokens  # tokens that are missing
    for chunk in chunks:
        if head_tokens > 0:
            head.append(chunk[:, :head_tokens])
            head_tokens -= chunk.shape[1]
    for chunk in reversed(chunks):
        if tail_tokens > 0:
            tail.insert(0, chunk[:, -tail_tokens:])
            tail_tokens -= chunk.shape[1]
    return mx.concatenate(head + tail, axis=1)


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
        for entry in cache:
            CacheList.adopt(entry)
        before = taken_routes(cache) if self.flux_show else None
        out = stock.__call__(self, *args, **kwargs)
        if self.flux_show and (after := taken_routes(cache)) != before:
            _show(cache, max(len(route) if isinstance(route, list) else 1 for route in after))
        return out

    return call


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
    attns = {i: getattr(layer, "self_attn", None) for i, layer in enumerate(model.layers)}
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
    for i, attn in chosen.items():
        attn.__class__ = _mixed(RoutedAttention, type(attn))
        attn.pooled_dim = head_dim(attn)
        attn.router = LayerRouter(attn.pooled_dim, config.router, seed=i if fresh else None)
        attn.flux = config
    model.__class__ = _mixed(FluxModel, type(model))
    model.flux = config
    model.flux_show = _switched_on("FLUX_MLX_SHOW_ROUTES")
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
    if route := os.environ.get("FLUX_MLX_ROUTE"):
        set_route(model, parse_route(route))
    if _switched_on("FLUX_MLX_TRAIN_ROUTERS"):
        model.flux_samples = make_trainable(routed_layers(model).values())
    return model


def _switched_on(name: str) -> bool:
    """Whether a variable of the environment is set, and not to 0."""
    return os.environ.get(name, "") not in ("", "0")


def _check_types(config: dict[str, Any], stock_args: type) -> None:
    """Refuse numbers, words and switches of another type than the stock model declares: it would fail in use."""
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for field in dataclasses.fields(stock_args) if dataclasses.is_dataclass(stock_args) else ():
        declared = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        value = config.get(field.name)
        if declared not in kinds or value is None:
            continue
        wrong_bool = isinstance(value, bool) and declared in ("int", "float")
        if wrong_bool or not isinstance(value, kinds[declared]):
            raise ValueError(f"[Model] {field.name} must be of type {declared}, got {value!r}.")
