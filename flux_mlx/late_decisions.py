"""The decisions of a prompt's layers that stay on the device: joined, and read at once.

A layer whose kernels take the route from the device does not need it on the host before the next token. Reading it
there would cost the host a wait for each layer. Exact prefill joins them in the last layer and reads them behind it;
of a prompt in stock's chunks they are read before the first token.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from flux_mlx.cache import CacheList
from flux_mlx.router_decision import Decision


class LateDecisions:
    """Of one row's prompt.

    Args:
        may_wait: Whether a layer may be done before the host knows its route.

    Attributes:
        entries: Caches of the layers that ran without their route on the host, in order.
    """

    def __init__(self, may_wait: bool = True) -> None:
        self.may_wait = may_wait
        self.entries: list[CacheList] = []
        self._joined: Decision | None = None

    def add(self, entry: CacheList) -> None:
        """Take on the decision of a layer whose calls are handed over, if nobody has read it."""
        if entry.undecided() is not None:
            self.entries.append(entry)
            entry.inputs = None  # the pools are computed with the decision

    def join(self) -> list[mx.array]:
        """Join them, once. What it returns is to be computed, best in one piece of work with what does not need it."""
        if self._joined is None:
            self.entries = [entry for entry in self.entries if entry.undecided() is not None]  # callbacks may read
            if self.entries:
                self._joined = Decision.joined([entry.undecided() for entry in self.entries])
        return [] if self._joined is None else [self._joined.codes]

    def read(self) -> None:
        """Have each cache know its route. Waits for the device: until they are joined, not for what follows."""
        if self._joined is not None:
            for entry, route in zip(self.entries, self._joined.read(), strict=True):
                entry.learn([route])


def read_late(cache: list[Any]) -> None:
    """Read what the routers of one row decided, for all layers at once; what was only noted is decided first."""
    late = LateDecisions()
    for entry in cache:
        if isinstance(entry, CacheList) and entry.rows_held == 1:
            entry.catch_up()
            late.add(entry)
    mx.async_eval(late.join())
    late.read()
