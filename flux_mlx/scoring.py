"""Scores of prompts and answers in MLX: routes, route logits, answer likelihoods. `flux_mlx.evaluate --backend mlx`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from flux_mlx.base_model import load_base
from flux_mlx.cuda_settings import prepare_cuda
from flux_mlx.exact_prefill import prefill
from flux_mlx.models import apply, routed_layers, set_route
from flux_mlx.spec import FluxConfig, Route
from flux_mlx.spec.config import RoutePolicy
from flux_mlx.weights import check_routers, read_routers


@dataclass(frozen=True)
class PromptScore:
    """What one prompt gave.

    Args:
        nlls: Negative log-likelihood of each answer, the sum over its tokens, natural log.
        exact: Whether each token of the first answer is the likeliest after those before it.
        full: Routed layer by layer, whether it is full.
        gaps: logit 1 - logit 0 of each routed layer; empty with a static policy.
    """

    nlls: list[float]
    exact: bool
    full: list[bool]
    gaps: list[float]


class Scorer:
    """A model directory, Flux or not, whose routes can be changed from score to score.

    Args:
        path: Local directory.

    Raises:
        ValueError: No layer can be routed, or the weights do not fit.
    """

    def __init__(self, path: str | Path):
        prepare_cuda()
        base, _ = load_base(Path(path))
        self.model: nn.Module = apply(base, FluxConfig())
        self.layers = len(self.model.layers)

    def use(self, config: FluxConfig, routers: str | Path | None, route: RoutePolicy) -> None:
        """Choose settings, routers and route policy of the scores that follow.

        Args:
            config: Pattern and router sizes.
            routers: Routers file; None leaves the routers as they are.
            route: As `flux_mlx.set_route` takes it.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Routers that do not fit the model, or a route that names other layers.
        """
        routed = routed_layers(self.model)
        if routers is not None:
            found = read_routers(routers).routers
            check_routers(found, {index: attn.pooled_dim for index, attn in routed.items()})
            for index, attn in routed.items():
                attn.router.load_weights(list(found[index].items()))
        self.model.flux = config
        for attn in routed.values():
            attn.flux = config
        set_route(self.model, route)

    def score(self, prompt: Sequence[int], answers: Sequence[Sequence[int]], chunk_tokens: int = 0) -> PromptScore:
        """Score the answers to one prompt.

        Args:
            prompt: Token ids, 2 or more.
            answers: Token ids of each answer, 1 or more answers.
            chunk_tokens: Prefill as stock does with this step, each chunk routed anew; 0 routes exactly.
        """
        cache = self.model.make_cache()
        tokens = mx.array(list(prompt))
        if chunk_tokens:
            for start in range(0, tokens.size - 1, chunk_tokens):
                self.model(tokens[None, start : min(start + chunk_tokens, tokens.size - 1)], cache=cache)
                mx.eval([entry.state for entry in cache])
        else:
            prefill(self.model, tokens, cache)
        routed = routed_layers(self.model)
        full = [cache[index].routes[0] != Route.SPARSE for index in routed]
        free = [index for index, attn in routed.items() if attn.forced is None]
        gaps = [self._gap(routed[index], cache[index]) for index in free]
        nlls, hits = zip(*(self._answer(prompt[-1], answer, cache) for answer in answers), strict=True)
        return PromptScore(list(nlls), hits[0], full, gaps)

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Greedy answer of `tokens` tokens to one prompt, routed exactly."""
        cache = self.model.make_cache()
        last = prefill(self.model, mx.array(list(prompt)), cache)
        return [token for token, _ in generate_step(last, self.model, max_tokens=tokens, prompt_cache=cache)]

    def _gap(self, attn: Any, entry: Any) -> float:
        """logit 1 - logit 0 of the newest decision."""
        sparse, full = attn.router(entry.pooled())[0].tolist()
        return full - sparse

    def _answer(self, last: int, answer: Sequence[int], cache: list[Any]) -> tuple[float, bool]:
        """(NLL, whether greedy decoding says it) of one answer after the prompt's last token; the cache comes back."""
        fed = mx.array([last, *answer[:-1]])
        step = self.model.flux.router.min_prefill_tokens - 1  # longer calls would be taken for a prompt
        parts = [self.model(fed[None, i : i + step], cache=cache)[0] for i in range(0, fed.size, step)]
        logits = mx.concatenate(parts).astype(mx.float32)
        wanted = mx.array(list(answer))[:, None]
        nll = (mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, wanted, axis=-1)[:, 0]).sum()
        hit = (logits.argmax(-1) == wanted[:, 0]).all()
        found = float(nll), bool(hit)
        for entry in cache:
            entry.trim(fed.size)
        return found
