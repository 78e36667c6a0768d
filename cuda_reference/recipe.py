"""Recipes: everything that training depends on, read from a TOML file; overrides are `section.name=value`."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cuda_reference.schedules import Schedules
from flux_mlx.declared_types import is_of_type
from flux_mlx.spec import PatternConfig, RouterConfig

RECIPES = Path(__file__).parent / "recipes"
LOSSES = ("nll", "kl")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Args:
        tasks: Task to its share of the samples (any positive numbers). With `jsonl`, the file's tasks.
        shortest_tokens, longest_tokens: Sample lengths; drawn with a uniform logarithm.
        row_tokens: Tokens of a packed row: the batch of one process and one micro-step. A multiple of 128.
        micro_steps: Rows for one optimiser step and process.
        text_chars: Characters of code and of prose to collect.
        truncated_share: Share of the made-up samples whose routers read a random first part of the prompt, as those of
            an early chunk do in stock prefill.
        jsonl: A user's own samples instead: lines {"prompt": .., "answer": .., "task": ..}.
    """

    tasks: Mapping[str, float] = field(default_factory=dict)
    shortest_tokens: int = 512
    longest_tokens: int = 8192
    row_tokens: int = 65536
    micro_steps: int = 1
    text_chars: int = 40_000_000
    truncated_share: float = 0.0
    jsonl: str = ""


@dataclass(frozen=True)
class OptimiserConfig:
    """Steps and learning rates.

    Args:
        steps: Optimiser steps.
        lr: Of the routers (AdamW).
        lambda_lr: Of the multipliers, which ascend.
        betas, weight_decay: AdamW's.
        clip: Largest gradient norm of the routers.
    """

    steps: int = 300
    lr: float = 5e-4
    lambda_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 5.0


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        seed: Of routers, data, noise and multipliers.
        targets: Task to target Omega.
        hard: Straight-through routes; False trains the soft mixture.
        by_head: Routes for heads instead of layers (a baseline; such routers cannot be shipped).
        loss: "nll", of the answers, as published; "kl", divergence from the backbone with every layer full.
        calibration_rows: Rows of training data whose pooled queries set the routers' start (`calibration`); 0 keeps
            PyTorch's usual start.
        calibration_tokens: Shortest and longest sample of those rows; empty: those of the data. Routers read both ends
            of a prompt: many short prompts teach them more than a few long ones.
        start: Task to the full layers that the routers are fitted to before training (`calibration.fit_masks`), on
            the calibration rows; empty: no fit.
        start_layers: Layers of the model that `start` was found for; training refuses any other.
        start_confidence: p that the fit aims at for each decision: what is left to explore.
        gradient_checkpointing: Recompute layers in the backward pass.
        pattern, router, schedules, data, optimiser: See the classes.
    """

    seed: int = 0
    targets: Mapping[str, float] = field(default_factory=dict)
    hard: bool = True
    by_head: bool = False
    loss: str = "nll"
    calibration_rows: int = 0
    calibration_tokens: tuple[int, ...] = ()
    start: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    start_layers: int = 0
    start_confidence: float = 0.9
    gradient_checkpointing: bool = False
    pattern: PatternConfig = field(default_factory=PatternConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    schedules: Schedules = field(default_factory=Schedules)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"[Recipe] loss must be one of {list(LOSSES)}, got {self.loss!r}.")
        fits = self.calibration_rows and self.start_layers and not self.by_head
        if self.start and not (fits and set(self.start) == set(self.targets)):
            raise ValueError(
                f"[Recipe] start needs calibration_rows, start_layers, routes of layers and full layers for "
                f"{sorted(self.targets)}, got calibration_rows {self.calibration_rows}, start_layers "
                f"{self.start_layers}, by_head {self.by_head} and {sorted(self.start)}."
            )
        if self.data.jsonl and (self.calibration_tokens or self.data.truncated_share):
            raise ValueError(
                "[Recipe] calibration_tokens and data.truncated_share are of made-up samples: with data.jsonl expected "
                f"[] and 0, got {list(self.calibration_tokens)} and {self.data.truncated_share}."
            )
        lengths = self.calibration_tokens
        if lengths and not (len(lengths) == 2 and 0 < lengths[0] <= lengths[1] <= self.data.row_tokens):
            raise ValueError(
                f"[Recipe] calibration_tokens must be a shortest and a longest length, at most row_tokens "
                f"{self.data.row_tokens}, got {list(lengths)}."
            )
        if not 0.5 < self.start_confidence < 1.0:
            raise ValueError(f"[Recipe] start_confidence must lie in (0.5, 1), got {self.start_confidence!r}.")
        missing = sorted(set(self.data.tasks) - set(self.targets))
        if missing or not self.targets:
            raise ValueError(f"[Recipe] expected a target for every task, got none for {missing or 'any'}.")
        wrong = {task: t for task, t in self.targets.items() if not 0.0 <= t <= 1.0}
        if wrong:
            raise ValueError(f"[Recipe] targets must lie in [0, 1], got {wrong}.")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of the targets."""
        return tuple(self.targets)

    def for_calibration(self) -> Recipe:
        """The recipe whose rows calibrate the routers: other lengths of samples."""
        if not self.calibration_tokens:
            return self
        shortest, longest = self.calibration_tokens
        return replace(self, data=replace(self.data, shortest_tokens=shortest, longest_tokens=longest))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)


_SECTIONS = {
    "pattern": PatternConfig,
    "router": RouterConfig,
    "schedules": Schedules,
    "data": DataConfig,
    "optimiser": OptimiserConfig,
}


def _build(cls: type, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"[recipe] {cls.__name__} must be a table of settings, got {values!r}.")
    known = {f.name: str(f.type).partition("[")[0] for f in dataclasses.fields(cls)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ValueError(f"[recipe] {cls.__name__} has no settings {unknown}; it has {sorted(known)}.")
    for name, value in values.items():
        if not is_of_type(known[name], value):
            raise ValueError(f"[recipe] {name} must be of type {known[name]}, got {value!r}.")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def recipe_from_dict(raw: Mapping[str, Any]) -> Recipe:
    """Inverse of `Recipe.to_dict`. Raises ValueError on unknown settings and on bad values."""
    values = {k: _build(_SECTIONS[k], v) if k in _SECTIONS else v for k, v in raw.items()}
    return _build(Recipe, values)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: A TOML file, or the name of one of the package's recipes.
        overrides: "seed=1", "optimiser.steps=100", ..: values in TOML's form.

    Raises:
        FileNotFoundError: No such file or recipe.
        ValueError: Not TOML, unknown settings, or bad values.
    """
    file = Path(path)
    if not file.is_file():
        file = RECIPES / f"{path}.toml"
    if not file.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.toml"))
        raise FileNotFoundError(f"[recipe] no file {path} and no recipe of that name; there are {names}.")
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
        for override in overrides:
            _override(raw, override)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"[recipe] {file} or an override is not TOML: {error}") from None
    return recipe_from_dict(raw)


def _override(raw: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"[recipe] an override must be name=value, got {override!r}.")
    *sections, last = name.strip().split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ValueError(f"[recipe] the override {override!r} looks for a table {section!r}, which is {raw!r}.")
    raw[last] = tomllib.loads(f"value = {value}")["value"]
