"""A server's answers once more, one after the other and alone: the same chunks, on the same cached prefixes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import trim_prompt_cache

from flux_mlx import describe_routes
from flux_mlx.models import routed_layers
from parity_tests.tolerances import NEAR_TIE


@dataclass
class Answered:
    """A request's prompt, the tokens that the server answered, and what its `/stats` say of it."""

    prompt: list[int]
    answer: list[int]
    served: dict[str, Any]


@dataclass
class Replay:
    """Runs requests again.

    Args:
        model: The server's model.
        requests: Id to request; all whose caches others went on with must be there.
        near_ties: Requests of which a route or a token was too close to compare.
    """

    model: nn.Module
    requests: dict[str, Answered]
    near_ties: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        sources = [request.served["cached_from"] for request in self.requests.values()]
        self._wanted = {tuple(source) for source in sources if source}
        self._kept: dict[tuple[str, int], list[Any]] = {}
        self._done: set[str] = set()

    def check(self, name: str) -> None:
        """Assert that a request's routes and tokens are those of its replay."""
        if name in self._done:
            return
        self._done.add(name)
        request = self.requests[name]
        if source := request.served["cached_from"]:
            self.check(source[0])
        cache = self._prefix(request.served)
        if not self._same_routes(name, cache) or not self._same_answer(name, cache):
            self.near_ties.add(name)

    def _prefix(self, served: dict[str, Any]) -> list[Any]:
        """The cache that the request started from."""
        if served["cached_from"] is None:
            return self.model.make_cache()
        cache = copy.deepcopy(self._kept[tuple(served["cached_from"])])
        trim_prompt_cache(cache, served["cached_from"][1] - served["cached_tokens"])
        return cache

    def _run(self, name: str, tokens: list[int], cache: list[Any]) -> mx.array:
        """One call; logits of the last token. The cache is kept if another request went on with it."""
        logits = self.model(mx.array([tokens]), cache=cache)[0, -1]
        mx.eval(logits, [entry.state for entry in cache])
        if (name, cache[0].offset) in self._wanted:
            self._kept[name, cache[0].offset] = copy.deepcopy(cache)
        return logits

    def _same_routes(self, name: str, cache: list[Any]) -> bool:
        """Run the prompt but its last token. False: the routes are others, but they were near-ties."""
        request = self.requests[name]
        margin, at = float("inf"), cache[0].offset
        for tokens in request.served["chunks"][:-1]:
            self._run(name, request.prompt[at : at + tokens], cache)
            at += tokens
            for entry, attn in zip(cache, routed_layers(self.model).values(), strict=True):
                logits = attn.router(entry.pooled())[0]
                margin = min(margin, abs(float(logits[1] - logits[0])))
        assert at == len(request.prompt) - request.served["chunks"][-1] == len(request.prompt) - 1, request.served
        if describe_routes(cache) == request.served["routes"]:
            return True
        assert margin < NEAR_TIE, f"{name}: {describe_routes(cache)} instead of {request.served}"
        return False

    def _same_answer(self, name: str, cache: list[Any]) -> bool:
        """Run the last token and the answer. False: a token is another, but it was a near-tie."""
        request, same = self.requests[name], True
        for token, following in zip([request.prompt[-1], *request.answer], [*request.answer, None], strict=True):
            logits = self._run(name, [token], cache)
            if following is not None and int(mx.argmax(logits)) != following:
                margin = float(mx.max(logits) - logits[following])
                near = NEAR_TIE * max(1.0, float(mx.abs(logits[following])))
                assert margin < near, f"{name}: {following} is {margin} below {int(mx.argmax(logits))}"
                same = False
        return same
