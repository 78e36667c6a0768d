"""One Flux model directory, loaded by MLX and by Torch: the same routes, the same logits, the same greedy tokens."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step
from transformers import PreTrainedModel

from cuda_reference.loading import load
from cuda_reference.model import Routing, generate
from flux_mlx.exact_prefill import prefill
from flux_mlx.models import routed_layers
from flux_mlx.spec import FluxConfig, PatternConfig, Route
from parity_tests import tiny_models
from parity_tests.properties import Decisions
from parity_tests.test_torch_loading import flux_config, write_directory
from parity_tests.tolerances import NEAR_TIE, network_reference

torch.set_num_threads(2)

PATTERN = PatternConfig(block_size=8, sink_tokens=8, window_tokens=16, last_tokens=20, stride=4, threshold=0.7)
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "olmo2": {"eos_token_id": 2},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "cohere": {"tie_word_embeddings": True, "eos_token_id": 2},
    "gemma3_text": {"tie_word_embeddings": True, "hidden_size": 64},  # MLX rounds its root to bfloat16: 8 is exact
}
"""Families that both libraries have, with the settings that both must be told."""


class Run:
    """What a model did with a prompt, as numpy: routes and route logits by layer, next-token logits."""

    def __init__(self, routes: dict[int, Route], route_logits: dict[int, np.ndarray], logits: np.ndarray):
        self.routes, self.route_logits, self.logits = routes, route_logits, logits


def run_mlx(model: nn.Module, tokens: list[int]) -> Run:
    """Exact prefill, then the last token."""
    cache = model.make_cache()
    last = prefill(model, mx.array(tokens), cache, prefill_step_size=32)
    routers = routed_layers(model)
    routes = {i: cache[i].routes[0] for i in routers}
    route_logits = {i: np.array(attn.router(cache[i].pooled()))[0] for i, attn in routers.items()}
    return Run(routes, route_logits, np.array(model(last[None], cache=cache))[0, -1])


@torch.no_grad()
def run_torch(model: PreTrainedModel, tokens: list[int]) -> Run:
    """One call over the whole prompt."""
    routing = Routing(model.flux, [len(tokens)])
    logits = model(torch.tensor([tokens]), routing=routing, logits_to_keep=1).logits[0, -1]
    routes = {i: rows[0] for i, rows in routing.routes.items()}
    return Run(routes, {i: x[0].numpy() for i, x in routing.logits.items()}, logits.numpy())


def oracle_of(model: PreTrainedModel, tokens: list[int]) -> Run:
    """`run_torch` with the backbone in float64."""
    model.double()
    for layer in model.get_decoder().layers:
        if hasattr(layer.self_attn, "router"):
            layer.self_attn.router.float()
    try:
        return run_torch(model, tokens)
    finally:
        model.float()


def compare_routes(mlx_run: Run, torch_run: Run, oracle: Run) -> list[str]:
    """Fail unless route logits keep within the budget and routes are equal; near-ties are returned, not compared."""
    layers = sorted(oracle.routes)
    assert sorted(mlx_run.routes) == sorted(torch_run.routes) == layers
    each = [np.stack([run.route_logits[i] for i in layers]) for run in (mlx_run, torch_run, oracle)]
    ties = []
    for i, margin in zip(layers, each[2][:, 1] - each[2][:, 0], strict=True):
        if abs(margin) < NEAR_TIE:
            ties.append(f"layer {i}, margin {margin:.1e}")
            break  # a layer after it may follow another route
        assert mlx_run.routes[i] == torch_run.routes[i] == oracle.routes[i], f"layer {i}"
    if not ties:
        network_reference(each[2], each[1]).check("route logits", each[0])
    return ties


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> tuple[nn.Module, PreTrainedModel]:
    """A tiny model of one family in MLX, and in Torch from its directory."""
    changes = FAMILIES[request.param]
    model = tiny_models.flux_model(request.param, **changes)
    path = tmp_path_factory.mktemp("parity") / "flux"
    return model, load(write_directory(path, model, flux_config(request.param, **changes)))[0]


def set_flux(pair: tuple[nn.Module, PreTrainedModel], name: str) -> None:
    mlx_model, torch_model = pair
    config = FluxConfig(pattern=replace(PATTERN, name=name), router=tiny_models.ROUTER)
    torch_model.flux = config
    for attn in routed_layers(mlx_model).values():
        attn.flux = config


@pytest.mark.parametrize("name", ["streaming", "triangle", "xattention"])
@pytest.mark.parametrize("tokens", [23, 150])
def test_prefill(pair, name, tokens, record_property):
    set_flux(pair, name)
    ids = tiny_models.prompt(tokens, seed=tokens)
    mlx_run, torch_run, oracle = run_mlx(pair[0], ids), run_torch(pair[1], ids), oracle_of(pair[1], ids)
    ties = compare_routes(mlx_run, torch_run, oracle)
    Decisions(len(oracle.routes), ties).report(record_property)
    if not ties:
        network_reference(oracle.logits, torch_run.logits).check("logits", mlx_run.logits)


def test_greedy_tokens(pair):
    set_flux(pair, "streaming")
    ids = tiny_models.prompt(90, seed=4)
    cache = pair[0].make_cache()
    last = prefill(pair[0], mx.array(ids), cache)
    expected = [token for token, _ in generate_step(last, pair[0], max_tokens=12, prompt_cache=cache)]
    assert generate(pair[1], ids, 12).tokens == expected
