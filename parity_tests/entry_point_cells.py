"""The cells of docs/entry_points.md: an entry point of mlx-lm, run on a family at a precision."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import does_model_support_input_embeddings, quantize_model, save_config, save_model

from flux_mlx import prefill, routes
from flux_mlx.model_directory import flux_config
from flux_mlx.models import apply, set_route
from flux_mlx.safe_loading import load_flux
from flux_mlx.spec import FluxConfig, Route
from parity_tests.tiny_models import PATTERN, ROUTER, prompt, randomise_routers, stock_model, tiny_config

PRECISIONS = ("float32", "bfloat16", "8-bit", "4-bit")
YES, ABSENT, FAILS = "yes", "none in stock", "fails"  # outcomes of a cell
TOKENS = prompt(61)
GROUP_SIZE = 32


class NotThereError(Exception):
    """The stock model does not have this either."""


@dataclass
class Case:
    """One family at one precision: the stock model and the Flux model of the same weights."""

    family: str
    precision: str
    stock: nn.Module
    flux: nn.Module
    config: dict[str, Any]
    unavailable: str = ""  # why the stock model does not run at all on this machine

    def each(self) -> tuple[nn.Module, nn.Module]:
        """The stock model, and the Flux model with full routes."""
        set_route(self.flux, "full")
        return self.stock, self.flux

    def routed(self) -> nn.Module:
        """The Flux model with its routers' routes."""
        set_route(self.flux, "auto")
        return self.flux


def make_case(family: str, precision: str) -> Case:
    """Build both models."""
    models, config = [], tiny_config(family)
    for _ in range(2):
        model = stock_model(family)
        if precision == "bfloat16":
            model.set_dtype(mx.bfloat16)
        elif precision != "float32":
            model, config = quantize_model(model, tiny_config(family), GROUP_SIZE, int(precision[0]))
        models.append(model)
    flux = apply(models[1], FluxConfig(pattern=PATTERN, router=ROUTER))
    randomise_routers(flux)
    case = Case(family, precision, models[0], flux, config)
    try:
        _greedy(case.stock)
    except RuntimeError as error:  # mixtures of experts in bfloat16 on MLX's CPU backend
        case.unavailable = str(error)
    return case


def _greedy(model: nn.Module, tokens: list[int] = TOKENS, **settings: Any) -> list[int]:
    settings = {"max_tokens": 6, "prefill_step_size": 32, **settings}
    return [token for token, _ in generate_step(mx.array(tokens), model, **settings)]


def _same(case: Case, run: Callable[[nn.Module], Any]) -> None:
    """With full routes the run gives what it gives on the stock model; with automatic routes it ends."""
    stock, full = map(run, case.each())
    assert stock == full, f"{full} instead of {stock}"
    run(case.routed())


def generate(case: Case) -> None:
    """`generate_step`, by chunks."""
    _same(case, _greedy)
    cache = case.routed().make_cache()
    _greedy(case.flux, prompt_cache=cache)
    assert Route.UNSET not in routes(cache)


def exact(case: Case) -> None:
    """`flux_mlx.prefill`, then stock generation."""

    def run(model: nn.Module) -> list[int]:
        cache = make_prompt_cache(model)
        rest = prefill(model, mx.array(TOKENS), cache, prefill_step_size=32) if model is case.flux else mx.array(TOKENS)
        return _greedy(model, rest.tolist(), prompt_cache=cache)

    _same(case, run)


def batch(case: Case) -> None:
    """`BatchGenerator` with rows of several lengths."""

    def run(model: nn.Module) -> list[list[int]]:
        generator = BatchGenerator(model, max_tokens=5, prefill_step_size=32)
        out = {uid: [] for uid in generator.insert([TOKENS, prompt(7, 1), prompt(33, 2)])}
        while responses := generator.next_generated():
            for response in responses:
                out[response.uid].append(response.token)
        return list(out.values())

    _same(case, run)


def speculative(case: Case, as_draft: bool) -> None:
    """`speculative_generate_step`."""
    if not can_trim_prompt_cache(make_prompt_cache(case.stock)):
        raise NotThereError("its cache cannot be trimmed")

    def run(model: nn.Module) -> list[int]:
        pair = (case.stock, model) if as_draft else (model, case.stock)
        found = speculative_generate_step(mx.array(TOKENS), *pair, max_tokens=6, num_draft_tokens=3)
        return [token for token, *_ in found]

    _same(case, run)


def input_embeddings(case: Case) -> None:
    """`generate_step(input_embeddings=)`."""
    if not does_model_support_input_embeddings(case.stock):
        raise NotThereError("the family takes no embeddings")
    embeddings = case.stock.model.embed_tokens(mx.array(TOKENS))
    _same(case, lambda model: _greedy(model, [], input_embeddings=embeddings))


def kv_bits(case: Case) -> None:
    """`generate_step(kv_bits=8)`."""
    try:
        _greedy(case.stock, kv_bits=8, kv_group_size=GROUP_SIZE, quantized_kv_start=0)
    except (NotImplementedError, ValueError) as error:
        raise NotThereError(str(error)) from error
    _same(case, partial(_greedy, kv_bits=8, kv_group_size=GROUP_SIZE, quantized_kv_start=0))


def prompt_cache(case: Case) -> None:
    """`save_prompt_cache`, `load_prompt_cache`, and on with another question."""

    def run(model: nn.Module) -> list[int]:
        cache = make_prompt_cache(model)
        _greedy(model, max_tokens=0, prompt_cache=cache)
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "cache.safetensors")
            save_prompt_cache(file, cache)
            loaded = load_prompt_cache(file)
            answer = _greedy(model, prompt(20, 3), prompt_cache=loaded)
        assert answer == _greedy(model, prompt(20, 3), prompt_cache=cache), "saved is not live"
        return answer

    _same(case, run)


def prefix_reuse(case: Case) -> None:
    """A copied cache, trimmed, goes on with another question."""
    if not can_trim_prompt_cache(make_prompt_cache(case.stock)):
        raise NotThereError("its cache cannot be trimmed")

    def run(model: nn.Module) -> list[int]:
        cache = make_prompt_cache(model)
        _greedy(model, max_tokens=0, prompt_cache=cache)
        cache = copy.deepcopy(cache)
        trim_prompt_cache(cache, 25)
        return _greedy(model, prompt(20, 3), prompt_cache=cache)

    _same(case, run)


def no_cache(case: Case) -> None:
    """The model called without a cache, as `mlx_lm.perplexity` calls it."""
    x = mx.array([prompt(40, 1), prompt(40, 2)])
    stock, full = (model(x) for model in case.each())
    assert (
        mx.allclose(stock, full, rtol=2e-2, atol=2e-2) if case.precision == "bfloat16" else mx.array_equal(stock, full)
    )
    mx.eval(case.routed()(x))


def lora(case: Case) -> None:
    """Two compiled steps of `mlx_lm.lora` on copies of the models."""

    def run(model: nn.Module) -> list[float]:
        model = copy.deepcopy(model)
        model.freeze()
        mx.random.seed(0)
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
        model.train()
        optimizer, grad = optim.Adam(1e-3), nn.value_and_grad(model, default_loss)
        state = [model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(x: mx.array, lengths: mx.array) -> mx.array:
            (loss, _), gradient = grad(model, x, lengths)
            optimizer.update(model, gradient)
            return loss

        return [step(mx.array([TOKENS]), mx.array([[0, 60]])).item() for _ in range(2)]

    _same(case, run)


def directory(case: Case) -> None:
    """Written to a model directory and loaded again: the same tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(path, case.routed())
        save_config(flux_config(case.config, FluxConfig(pattern=PATTERN, router=ROUTER)), path / "config.json")
        model, _ = load_flux(path, json.loads((path / "config.json").read_text()))
        assert _greedy(model) == _greedy(case.flux)


ENTRY_POINTS: dict[str, Callable[[Case], None]] = {
    "generate": generate,
    "exact prefill": exact,
    "batch": batch,
    "speculative, target": partial(speculative, as_draft=False),
    "speculative, draft": partial(speculative, as_draft=True),
    "input_embeddings": input_embeddings,
    "kv-bits 8": kv_bits,
    "saved prompt cache": prompt_cache,
    "prefix reuse": prefix_reuse,
    "without cache": no_cache,
    "lora": lora,
    "save and load": directory,
}


def run_case(case: Case, name: str) -> tuple[str, str]:
    """(outcome, reason): YES; ABSENT, the stock model cannot do it either; or FAILS."""
    if case.unavailable:
        return ABSENT, case.unavailable
    try:
        ENTRY_POINTS[name](case)
    except NotThereError as error:
        return ABSENT, str(error)
    except Exception as error:
        return FAILS, f"{type(error).__name__}: {error}"
    return YES, ""
