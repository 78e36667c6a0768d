"""A block around a routed attention module: one row's newest token by the shortest way on the host."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from flux_mlx.cache import CacheList
from flux_mlx.short_calls import ShortCalls
from flux_mlx.spec import Route
from flux_mlx.token_buffers import append_token, keys_in_use, position_array
from flux_mlx.token_steps import StepSeen, TokenStep, TokenSteps
from flux_mlx.window_cache import WindowKVCache

_PLAIN_KEYS = (KVCache, WindowKVCache)
EARLY_TOKENS = 768  # of a call that goes in pieces; an H100 has done a shorter one before Python has built it
LAYERS_AT_ONCE = 4  # handed over together, behind the first routed one: about a graph of MLX's CUDA backend


class RoutedBlock:
    """Mixed in front of a stock transformer block whose `self_attn` is a `RoutedAttention`.

    Attributes:
        token_steps: What of the block is compiled for a single token.
        hands_over: Whether the device gets what is built of a prompt's call so far, once this block is. mlx-lm hands
            over a whole call, and the device is idle until Python has built its last layer, in each chunk anew.
    """

    token_steps: TokenSteps
    hands_over = False

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if type(cache) is not CacheList:
            self.token_steps.drop_old()
            return super().__call__(x, mask, cache)
        if mask is None and self.is_plain_token(x, cache):
            step = self.token_step(x, cache)
            return self.decode_token(step, x, cache) if step.is_traced else super().__call__(x, mask, cache)
        cache.token_step = None
        out = super().__call__(x, mask, cache)
        if self.hands_over and x.size >= EARLY_TOKENS * x.shape[-1]:
            self.hand_over(out, cache)
        if not cache.is_listening:  # exact prefill does it when the device has its work
            self.token_steps.drop_old()
        return out

    def hand_over(self, out: Any, cache: CacheList) -> None:
        """Start the work of a prompt's call up to `out`, what the block puts out, unless exact prefill sees to it.

        MLX refuses that while it traces the call, for a gradient or a compiled function: there the call stays whole.
        """
        if cache.pinned is not None:
            return
        try:
            mx.async_eval(out)
        except ValueError as error:
            if "graph transformation" not in str(error):
                raise

    def is_plain_token(self, x: mx.array, cache: CacheList) -> bool:
        """Whether the call is one token of one row that changes no route, over keys as they are."""
        if cache.calm is not self["self_attn"].forced or cache.is_listening:
            return False
        rows, tokens, _ = x.shape
        return tokens == 1 and rows == 1 and type(cache.caches[0]) in _PLAIN_KEYS

    def token_step(self, x: mx.array, cache: CacheList) -> TokenStep:
        """What is compiled for such calls; looked at in full when the cache's tokens begin to be decoded."""
        known = cache.token_step
        step = known() if known is not None else None
        if step is None or not step.is_of(self) or (step.is_traced and not step.is_held()):
            step = self.token_steps.find(self, x)
            cache.token_step = StepSeen(step)
        return step

    def decode_token(self, step: TokenStep, x: mx.array, cache: CacheList) -> mx.array:
        """`RoutedAttention.decode` of one token, and all of the block around it."""
        attn, kv = self["self_attn"], cache.caches[0]
        offset = kv.offset
        if attn.forced is None and not cache.is_idle:
            cache.note(attn, x, offset)
        q, k, v = step.before(x, position_array(offset))
        if offset >= attn.flux.pattern.dense_tokens and cache.routes[0] == Route.SPARSE:
            if attn.evicts and type(kv) is KVCache:
                cache.evict(attn.flux.pattern)
                kv = cache.caches[0]
            if type(kv) is KVCache:
                append_token(kv, k, v)
                return step.after(x, ShortCalls.of(cache)(q, kv, attn.flux.pattern, attn.scale))
        return step.after(x, _full_attention(attn, q, k, v, kv))


def _full_attention(attn: nn.Module, q: mx.array, k: mx.array, v: mx.array, kv: KVCache | WindowKVCache) -> mx.array:
    """Attention of a token to all keys that `kv` holds, its own among them: `[1, HQ, 1, D]`."""
    if type(kv) is KVCache:
        append_token(kv, k, v)
        keys, values = keys_in_use(kv)
    else:
        keys, values = kv.update_and_fetch(k, v)
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=attn.scale)
