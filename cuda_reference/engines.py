"""Who computes in an evaluation: Torch over packed rows, or MLX prompt by prompt. Both give the same `Score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from cuda_reference.checkpoints import load_routers
from cuda_reference.contenders import Contender
from cuda_reference.data_prompts import Sample
from cuda_reference.model import ATTENTION, generate
from cuda_reference.packed_model import ATTENTION_NAME
from cuda_reference.recipe import Recipe
from cuda_reference.scoring import Policy, Score, score
from cuda_reference.train import load_model
from flux_mlx.spec.config import RoutePolicy


class Engine(Protocol):
    """Scores samples under the contender in use."""

    layers: int

    def use(self, contender: Contender) -> None:
        """Load its routers and settings."""

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Score samples, in their order."""

    def generate(self, sample: Sample) -> list[int]:
        """Greedy answer to a sample's prompt, as long as its answer."""


class TorchEngine:
    """The packed model.

    Args:
        path: Directory or hub id of a transformers causal LM.
        recipe: Settings to begin with.
        device: "cpu" or "cuda"; None takes CUDA where there is one.
        row_tokens: Tokens of a packed row.
        compiled: Compile MLPs and norms.
    """

    def __init__(self, path: str, recipe: Recipe, device: str | None, row_tokens: int, compiled: bool = False):
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        recipe = replace(recipe, gradient_checkpointing=False)
        self.model = load_model(path, recipe, torch.device(kind), compiled=compiled)
        self.layers = len(self.model.backbone.get_decoder().layers)
        self.row_tokens, self.contender = row_tokens, None

    def use(self, contender: Contender) -> None:
        """As `Engine`. Raises ValueError if the routers do not fit."""
        if contender.routers is not None:
            load_routers(contender.routers, self.model.routers())
        self.model.config, self.model.by_head = contender.config, contender.by_head
        self.contender = contender

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """As `Engine`."""
        return score(self.model, samples, self.contender.policy, self.row_tokens, self.contender.chunk_tokens)

    def generate(self, sample: Sample) -> list[int]:
        """As `Engine`, on the unpacked model; routers of layers only, exact."""
        backbone = self.model.backbone
        backbone.flux = self.contender.config
        backbone.set_attn_implementation(ATTENTION)
        try:
            prompt = sample.tokens[: sample.prompt_tokens].tolist()
            return generate(backbone, prompt, len(sample.answer), route=route_of(self.contender.policy)).tokens
        finally:
            backbone.set_attn_implementation(ATTENTION_NAME)


class MlxEngine:
    """`flux_mlx` itself, through `flux_mlx.scoring`: imported when it is asked for, since it needs MLX.

    Args: as `TorchEngine`; of them only `path` is used.
    """

    def __init__(self, path: str, recipe: Recipe, device: str | None, row_tokens: int, compiled: bool = False):
        from flux_mlx.scoring import Scorer

        self.scorer = Scorer(path)
        self.layers, self.contender = self.scorer.layers, None

    def use(self, contender: Contender) -> None:
        """As `Engine`. Raises ValueError if the routers do not fit, or decide for heads."""
        if contender.by_head:
            raise ValueError(f"[evaluate] MLX routes layers, but the routers of {contender.name} decide for heads.")
        self.scorer.use(contender.config, contender.routers, route_of(contender.policy))
        self.contender = contender

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """As `Engine`."""
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Score:
        answers = [answer.tolist() for answer in sample.candidates] or [sample.answer.tolist()]
        prompt = sample.tokens[: sample.prompt_tokens].tolist()
        found = self.scorer.score(prompt, answers, self.contender.chunk_tokens)
        chosen = min(range(len(answers)), key=found.nlls.__getitem__) if sample.candidates else -1
        full = tuple(map(float, found.full))
        omega = 1.0 - sum(full) / len(full)
        nll = found.nlls[0] / len(sample.answer)
        return Score(nll, chosen, found.exact, omega, full, tuple(found.gaps))

    def generate(self, sample: Sample) -> list[int]:
        """As `Engine`."""
        return self.scorer.generate(sample.tokens[: sample.prompt_tokens].tolist(), len(sample.answer))


ENGINES = {"torch": TorchEngine, "mlx": MlxEngine}


def route_of(policy: Policy) -> RoutePolicy:
    """A policy as `FluxConfig.route` has it."""
    return policy if isinstance(policy, str) else tuple(policy.nonzero().flatten().tolist())
