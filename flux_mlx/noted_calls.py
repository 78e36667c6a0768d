"""Calls of one row that are only noted, and looked at when somebody asks for the route.

Nobody asks while sink and window hold every key: a short prompt pays for no router.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

RESTLESS = object()  # `NotedCalls.calm` of a cache that every call must look at: no layer's `forced`
NEVER = 1 << 62  # an offset that no cache comes to
NOTED_CALLS = 8  # calls noted at most: noted prompts hold on to their inputs


class Call:
    """A call that was noted. Copies of a cache share it, because the layer is the model's.

    Attributes:
        tokens: Their number.
        offset: Position of the first of them.
        layer: The attention module; None if they are too few to be pooled.
        x: `[1, tokens, hidden]`, its input; after `trim` what the router reads of it.

    Of a call that is too short only the number counts. It holds on to nothing: caches outlive their model in a server.
    """

    __slots__ = ("layer", "offset", "tokens", "x")

    def __init__(self, layer: Any, x: mx.array, offset: int):
        self.tokens, self.offset = x.shape[1], offset
        is_pooled = self.tokens >= layer.flux.router.min_prefill_tokens
        self.layer, self.x = (layer, x) if is_pooled else (None, None)

    def __deepcopy__(self, _: Any) -> Call:
        return self

    def trim(self) -> mx.array | None:
        """Keep of the input what the router reads, and return it."""
        if self.layer is not None:
            self.x = self.layer.router_input(self.x)
        return self.x


class NotedCalls:
    """Mixed into `flux_mlx.router_state.RouterState`, whose `skip` and `compute` it calls."""

    calm: Any = RESTLESS  # `forced` of the layer whose short calls `RoutedAttention.decode` may take
    trim_at = NEVER  # offset from which the inputs of noted calls are to be cut down to what the router reads
    noted: tuple[Call, ...] = ()  # calls not looked at yet
    is_idle = False  # a further call that is too short to be pooled changes nothing here
    _shorts = 0  # calls since the newest noted prompt that were too short to be pooled

    def note(self, layer: Any, x: mx.array, offset: int) -> None:
        """Remember a call of the one row; what it means for the route is worked out when somebody asks.

        Args:
            layer: Its attention module, which has `take_in`.
            x: `[1, L, hidden]`, the module's input.
            offset: Position of its first token.
        """
        call = Call(layer, x, offset)
        self.noted += (call,)
        if call.layer is None:
            self._shorts += 1
            self.is_idle = self._shorts >= 2
            return
        self._shorts, self.is_idle = 0, False
        if call.tokens > 2 * layer.flux.router.pool_tokens:
            self.trim_at = call.offset + call.tokens + 2  # behind the first token
        if len(self.noted) >= NOTED_CALLS:
            self.compute()

    def trim_noted(self) -> list[mx.array | None]:
        """Keep of the noted calls' inputs what the router reads, returned to be evaluated: then the rest is free."""
        self.trim_at = NEVER
        return [call.trim() for call in self.noted]

    def catch_up(self, queries: mx.array | None = None) -> None:
        """Look at the noted calls.

        Args:
            queries: Those of the newest of them, which is under way: `[1, L, HQ, D]` before RoPE.
        """
        noted, self.noted, self.trim_at = self.noted, (), NEVER
        for call in noted:
            if call.layer is None:
                self.skip([call.tokens])
            else:
                known = queries if call is noted[-1] else None
                call.layer.take_in(self, call.x, call.tokens, call.offset, known)

    def drop_noted(self) -> None:
        """Forget the noted calls: what they came to is gone, or known from elsewhere."""
        self.noted, self.trim_at = (), NEVER

    def wake(self) -> None:
        """The next call has to be looked at, however short it is."""
        self.is_idle, self.calm, self._shorts = False, RESTLESS, 0
