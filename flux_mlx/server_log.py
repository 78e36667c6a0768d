"""What the server knows of its requests: counts, and of each the routes and everything that they follow from."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from mlx_lm.server import GenerationContext

from flux_mlx.cache import describe_routes

RECENT_REQUESTS = 100


class Saved(NamedTuple):
    """A prompt cache that was kept: which request's, and how many tokens it held."""

    request: str
    tokens: int


@dataclass(frozen=True)
class Served:
    """A request that was answered.

    Its routes follow from this: take the cache that `cached_from` left, cut it to `cached_tokens`, run the rest of the
    prompt in `chunks`, the last of which is the prompt's last token.
    """

    id: str
    prompt_tokens: int
    cached_tokens: int
    cached_from: Saved | None
    chunks: list[int]
    answer_tokens: int
    routes: str


@dataclass
class _Open:
    """A request whose answer is not whole yet."""

    id: str
    context: weakref.ref[GenerationContext]
    cached_from: Saved | None = None
    ends: list[int] = field(default_factory=lambda: [0])  # of its chunks, the cached tokens not counted
    saved: int = 0  # tokens that its newest kept cache held

    def is_waited_for(self) -> bool:
        """Whether somebody still wants the answer: mlx-lm's code drops the context, or marks it and keeps the last."""
        context = self.context()
        return context is not None and not context._should_stop

    def held(self) -> int:
        """Prompt tokens in its cache by now."""
        context = self.context()
        return 0 if context is None else max(0, context.prompt_cache_count) + self.ends[-1]

    def has_come_to(self, tokens: list[int]) -> bool:
        """Whether its cache holds `tokens`, and no cache of them was kept for it."""
        context = self.context()
        reached = context is not None and self.saved < self.held() == len(tokens)
        return reached and context.prompt[: len(tokens)] == tokens


class RequestLog:
    """Counts, and the latest requests. mlx-lm's generation thread tells it in its own order what happens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[_Open] = []
        self._recent: deque[Served] = deque(maxlen=RECENT_REQUESTS)
        self._fetched: Saved | None = None
        self._ended: str | None = None
        self.requests = self.answered = self.failed = 0

    def started(self, request_id: str, context: GenerationContext) -> None:
        """Note that a request's prompt is being processed. Dropped requests are forgotten here."""
        with self._lock:
            self.requests += 1
            self._open = [entry for entry in self._open if entry.is_waited_for()]
            self._open.append(_Open(request_id, weakref.ref(context)))
            if context.prompt_cache_count >= 0:  # of a batch; requests served alone look for a cache after this
                self._open[-1].cached_from = self._fetched

    def fetched(self, source: Saved | None) -> None:
        """Note which kept cache the request that starts next, or has just started, goes on with."""
        with self._lock:
            self._fetched = source
            context = self._open[-1].context() if self._open else None
            if context is not None and context.prompt_cache_count < 0:
                self._open[-1].cached_from = source

    def progressed(self, request_id: str, tokens: int) -> None:
        """Note that so many tokens of a prompt have been run, the cached ones not counted."""
        with self._lock:
            for entry in self._open:
                if entry.id == request_id and tokens > entry.ends[-1]:
                    entry.ends.append(tokens)

    def ended(self, request_id: str) -> None:
        """Note that a request's answer is whole: the cache that is kept next is its."""
        self._ended = request_id

    def failed_one(self) -> None:
        """Note that a request failed."""
        with self._lock:
            self.failed += 1

    def saved(self, tokens: list[int], cache: list[Any]) -> Saved | None:
        """Note that a cache of `tokens` is kept, of a whole answer or a prompt's beginning; whose it is, if known."""
        with self._lock:
            ended, self._ended = self._ended, None
            if ended is not None:
                return self._finish(ended, tokens, cache)
            found = next((entry for entry in self._open if entry.has_come_to(tokens)), None)
            if found is None:
                return None
            found.saved = len(tokens)
            return Saved(found.id, len(tokens))

    def _finish(self, request_id: str, tokens: list[int], cache: list[Any]) -> Saved | None:
        entry = next((entry for entry in self._open if entry.id == request_id), None)
        context = None if entry is None else entry.context()
        if entry is None or context is None:
            return None
        self._open.remove(entry)
        prompt_tokens, cached = len(context.prompt), max(0, context.prompt_cache_count)
        chunks = [stop - start for start, stop in itertools.pairwise(entry.ends)]
        routes, answer_tokens = describe_routes(cache), len(tokens) - prompt_tokens
        source = entry.cached_from if cached else None
        self.answered += 1
        self._recent.append(Served(request_id, prompt_tokens, cached, source, chunks, answer_tokens, routes))
        logging.info("%s: %d prompt tokens, %d of them cached; %s", request_id, prompt_tokens, cached, routes)
        return Saved(request_id, len(tokens))

    def stats(self) -> dict[str, Any]:
        """JSON form, the latest request last."""
        with self._lock:
            counts = {"requests": self.requests, "answered": self.answered, "failed": self.failed}
            counts["open"] = sum(entry.is_waited_for() for entry in self._open)
            return {**counts, "recent": [asdict(entry) for entry in self._recent]}
