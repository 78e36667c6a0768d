"""A routed attention module: pools a prompt's queries, takes its router's decision, computes what the route says.

A layer that computes full attention runs the stock module as it is. Only sparse attention needs to know where a family
keeps its projections, norms and rotary embedding: `flux_mlx.families` is that seam.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache, KVCache

from flux_mlx import cuda_kernels, kernel_policy
from flux_mlx.attention import sparse_attention
from flux_mlx.cache import CacheList
from flux_mlx.families import Projected, project, project_keys, project_queries, rotate
from flux_mlx.first_keys import FirstKeys
from flux_mlx.noted_calls import RESTLESS
from flux_mlx.prompt_ends import head_pieces, joined, prompt_ends, tail_pieces
from flux_mlx.router import decide, decide_by_kernel, mean_over_heads, pool_queries, route_codes
from flux_mlx.router_training import Samples, attend_training
from flux_mlx.short_calls import ShortCalls
from flux_mlx.spec import Route
from flux_mlx.streaming import compact
from flux_mlx.token_steps import Tap
from flux_mlx.window_cache import WindowKVCache


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
        if isinstance(cache, CacheList):
            if cache.is_listening:  # a dense call, whose route is seen to when the device has its work
                cache.heard = x
                return super().__call__(x, mask, FirstKeys.of(cache.caches[0]))
            if cache.calm is self.forced:
                rows, tokens, _ = x.shape
                if rows == 1 and tokens < self.flux.router.min_prefill_tokens:
                    return self.decode(x, tokens, mask, cache)
        if cache is None and not self.training and self.forced != Route.FULL:
            return self.attend_uncached(x, mask)
        if cache is None and self.training and self.samples is not None and self.forced is None:
            return attend_training(self, x, mask)
        if isinstance(cache, Tap):
            return cache.attend(self, x)
        if not isinstance(cache, CacheList):
            return super().__call__(x, mask, cache)
        cache.widen(x.shape[0])
        self.route(x, cache)
        parts = cache.take_projected()
        if self.is_dense(cache, x.shape[1]):  # needs no route yet
            return self.attend_full(x, mask, cache, parts)
        if (out := self.attend_undecided(x, cache, parts)) is not None:
            return out
        if Route.SPARSE not in cache.routes:
            return self.attend_full(x, mask, cache, parts)
        return self.attend(x, mask, cache, parts)

    def decode(self, x: mx.array, tokens: int, mask: Any, cache: CacheList) -> mx.array:
        """A short call of one row, which does not change its route. Python's time is a good part of a token's."""
        kv = cache.caches[0]
        offset = kv.offset
        if self.forced is None and not cache.is_idle:
            cache.note(self, x, offset)
        if offset + tokens <= self.flux.pattern.dense_tokens or cache.routes[0] != Route.SPARSE:
            return super().__call__(x, mask, kv)
        if self.evicts and type(kv) is KVCache:
            cache.evict(self.flux.pattern)
            kv = cache.caches[0]
        if tokens == 1 and type(kv) is WindowKVCache:  # it holds what one query sees
            return super().__call__(x, mask, kv)
        return self.attend_short(x, mask, cache)

    def is_dense(self, cache: CacheList, tokens: int) -> bool:
        """Whether sparse attention is full attention in this call; xattention's prefill drops blocks at any length."""
        chooses_blocks = self.flux.pattern.name == "xattention" and cache.pinned is not None
        return not chooses_blocks and self.flux.pattern.is_dense(cache.size() + tokens)

    def new_cache(self) -> CacheList:
        """An empty cache for this layer."""
        return CacheList.new(self.pooled_dim, self.flux.router.pool_tokens)

    def settle(self, x: mx.array, cache: CacheList, offset: int) -> None:
        """`route` after a call of a prompt that began at `offset`, of one row without padding."""
        if self.forced is None:
            cache.note(self, x, offset)
        else:
            cache.set_routes([self.forced])
        cache.calm = self.forced

    def route(self, x: mx.array, cache: CacheList) -> None:
        """Pool this call's prompt tokens and decide, unless the call is too short or the route is fixed."""
        tokens, alone = x.shape[1], cache.is_alone()
        if self.forced is not None:
            cache.set_routes([self.forced] * x.shape[0])
        elif cache.pinned is None and not (cache.is_idle and tokens < self.flux.router.min_prefill_tokens):
            if alone and self.group is None:
                cache.note(self, x, cache.offset)
            else:
                self.route_rows(x, cache)
        if not alone:
            cache.caches[1].advance(tokens)
        takes_notes = self.group is None or self.forced is not None or cache.is_idle
        is_settled = alone and cache.pinned is None and takes_notes
        cache.calm = self.forced if is_settled else RESTLESS

    def take_in(self, cache: CacheList, x: mx.array, tokens: int, offset: int, queries: mx.array | None = None) -> None:
        """Pool and decide a call that `cache` noted: `x` is its input or the `router_input` of it.

        `queries` `[1, tokens, HQ, D]` are those of the whole call before RoPE, where attention has them.
        """
        if queries is None:
            self.feed(self.router_input(x), tokens, cache, offset=offset)
        else:
            self.feed_queries([queries], tokens, cache, offset)
        self.decide(cache, [True])

    def router_input(self, x: mx.array) -> mx.array:
        """What the router reads of a call's input `[1, L, hidden]`: its `prompt_ends`."""
        return prompt_ends([x], self.flux.router.pool_tokens)

    def route_rows(self, x: mx.array, cache: CacheList) -> None:
        """Pool and decide the rows whose part of the call is long enough; note the others."""
        lengths = cache.row_lengths(x.shape[1])
        pooled = [n >= self.flux.router.min_prefill_tokens for n in lengths]
        cache.skip([0 if is_pooled else n for n, is_pooled in zip(lengths, pooled, strict=True)])
        for row, (n, is_pooled) in enumerate(zip(lengths, pooled, strict=True)):
            if is_pooled:
                self.feed(self.router_input(x[row : row + 1, :n]), n, cache, row)
        if any(pooled):
            self.decide(cache, pooled)

    def feed(self, ends: mx.array, tokens: int, cache: CacheList, row: int = 0, offset: int | None = None) -> None:
        """Pool `tokens` prompt tokens of a row, of which `ends` are the `prompt_ends` as this module gets them."""
        rows, P = self.query_rows(ends), self.flux.router.pool_tokens
        cache.feed(row, rows[:P], rows[-P:], tokens, offset)
        cache.inputs = ends

    def feed_queries(self, queries: list[mx.array], tokens: int, cache: CacheList, offset: int | None = None) -> None:
        """The same of one row by queries before RoPE, `[1, ., HQ, D]` in chunks that hold both ends at least.

        They must be of all heads, not of one rank's.
        """
        P = self.flux.router.pool_tokens
        head, tail = (
            joined([mean_over_heads(piece.squeeze(0)) for piece in pieces], 0)
            for pieces in (head_pieces(queries, P), tail_pieces(queries, P))
        )
        cache.feed(0, head, tail, tokens, offset)
        cache.inputs = None  # the call under way computes the queries

    def decide(self, cache: CacheList, fed: list[bool]) -> None:
        """Let the router decide the rows that were fed. The decision stays on the device until it is needed."""
        codes = decide_by_kernel(self.router, *cache.pool_rows()) if self.group is None else None
        cache.decide(route_codes(self.route_logits(cache.pooled())) if codes is None else codes, fed)

    def query_rows(self, x: mx.array) -> mx.array:
        """Queries before RoPE, averaged over the heads of all ranks: `[1, L, hidden]` to float32 `[L, D]`."""
        return self.over_ranks(mean_over_heads(project_queries(self, x).squeeze(0)))

    def over_ranks(self, mean: mx.array) -> mx.array:
        """The mean over the heads of all ranks, of the mean over this rank's."""
        return mean if self.group is None else mx.distributed.all_sum(mean, group=self.group) / self.group.size()

    def route_logits(self, pooled: mx.array) -> mx.array:
        """The router's logits for pooled queries `[B, D]`; those of rank 0, so that all ranks decide the same."""
        logits = self.router(pooled)
        if self.group is not None:
            logits = mx.distributed.all_sum(logits * (self.group.rank() == 0), group=self.group)
        return logits

    def attend(self, x: mx.array, mask: Any, cache: CacheList, parts: Projected | None = None) -> mx.array:
        """Attention with at least one sparse row, output projection included; `parts` are the call's, if known."""
        if self.evicts and (cache.drops_early or x.shape[1] < self.flux.router.min_prefill_tokens):
            cache.evict(self.flux.pattern)
        q, k, v = self.rotated(parts or project(self, x), cache.offset)
        k, v = cache.kv.update_and_fetch(k, v)
        if (out := self.attend_batch(q, cache)) is not None:
            return self.o_proj(out)
        groups = row_groups([route == Route.SPARSE for route in cache.routes], cache.left_padding())
        return self.attend_rows(q, k, v, mask, list(groups), cache)

    def project_at(self, x: mx.array, offset: Any) -> Projected:
        """Queries, keys and values `[B, H, L, D]` of `[B, L, hidden]`, rotated for tokens from `offset` on."""
        return self.rotated(project(self, x), offset)

    def keys_at(self, x: mx.array, offset: int) -> tuple[mx.array, mx.array]:
        """Only keys and values of `project_at`."""
        return self.rotated_keys(*project_keys(self, x), offset)

    def rotated_keys(self, k: mx.array, v: mx.array, offset: int) -> tuple[mx.array, mx.array]:
        """Only keys and values of `rotated`."""
        return rotate(self, k.swapaxes(1, 2), offset), v.swapaxes(1, 2)

    def rotated(self, parts: Projected, offset: Any) -> Projected:
        """What `families.project` gives, `[B, L, H, D]`, as attention takes it: `[B, H, L, D]`, after RoPE."""
        q, k, v = (part.swapaxes(1, 2) for part in parts)
        return rotate(self, q, offset), rotate(self, k, offset), v

    def attend_full(self, x: mx.array, mask: Any, cache: CacheList, parts: Projected | None = None) -> mx.array:
        """Full attention by the stock module, or as it computes it where the call's projections are known."""
        kv = FirstKeys.of(cache.kv)
        if parts is None:
            return super().__call__(x, mask, kv)
        q, k, v = self.rotated(parts, kv.offset)
        k, v = kv.update_and_fetch(k, v)
        return self.attend_rows(q, k, v, mask, [RowGroup(slice(None), sparse=False, padding=0)], cache)

    def attend_undecided(self, x: mx.array, cache: CacheList, parts: Projected | None = None) -> mx.array | None:
        """Attention of a prompt's call by a route that only the device knows, `[1, L, hidden]`.

        None where there is no such route, or no kernel that takes it: then the host has to read it.
        """
        kv, pattern, tokens = cache.kv, self.flux.pattern, x.shape[1]
        if not cuda_kernels.is_available() or type(kv) is not KVCache or not self.may_stay_undecided(tokens, cache):
            return None
        if not cache.noted and cache.undecided() is None:
            return None
        parts = parts or project(self, x)
        shapes, all_tokens = (part.swapaxes(1, 2) for part in parts), cache.pinned or kv.offset + tokens
        if kernel_policy.choose_undecided(*shapes, pattern, cache.pinned, all_tokens) == "ops":
            return None
        cache.catch_up(parts[0])
        if cache.undecided() is None:
            return None
        q, k, v = self.rotated(parts, kv.offset)
        kv.update_and_fetch(k, v)
        sizes = {"prompt_tokens": cache.pinned, "scale": self.scale, "kv_tokens": kv.offset}
        out, _ = cuda_kernels.routed_attention(q, kv.keys, kv.values, cache.lend(), pattern, **sizes)
        return self.o_proj(out.swapaxes(1, 2).reshape(1, tokens, -1))

    def may_stay_undecided(self, tokens: int, cache: CacheList) -> bool:
        """Whether the host can do without this call's route: in exact prefill that reads it later, or a prompt's call.

        A token that is decoded needs it there, and a cache that drops keys.
        """
        if self.group is not None or self.evicts:
            return False
        if cache.pinned is not None:
            return cache.stays_undecided
        return tokens >= self.flux.router.min_prefill_tokens and cache.is_alone()

    def attend_batch(self, q: mx.array, cache: CacheList) -> mx.array | None:
        """Attention of a short call of a batch without padding, `[B, L, hidden]`; None if no kernel takes all rows."""
        if q.shape[2] >= self.flux.router.min_prefill_tokens or type(cache.kv) is not BatchKVCache:
            return None
        if any(cache.left_padding()):
            return None
        return ShortCalls.of(cache).batch(q, cache.kv, self.flux.pattern, self.scale, cache.routes)

    def attend_short(self, x: mx.array, mask: Any, cache: CacheList) -> mx.array:
        """`attend` of a short call of one sparse row."""
        kv = cache.caches[0]
        if type(kv) is not KVCache:
            return self.attend(x, mask, cache)
        q, k, v = self.project_at(x, kv.offset)
        kv.update_and_fetch(k, v)
        return self.o_proj(ShortCalls.of(cache)(q, kv, self.flux.pattern, self.scale))

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
        kv_tokens = None
        if cache is not None and type(cache.kv) is KVCache and len(k) == len(cache.kv.keys):
            k, v, kv_tokens = cache.kv.keys, cache.kv.values, cache.kv.offset
        options = {"prompt_tokens": prompt_tokens, "scale": self.scale, "kv_tokens": kv_tokens}
        return sparse_attention(q, k, v, pattern, **options)


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
