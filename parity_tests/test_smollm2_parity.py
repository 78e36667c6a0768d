"""SmolLM2 over a long prompt: MLX and Torch take the same routes and say the same, from one Flux model directory."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step
from tokenizers import Tokenizer

from cuda_reference.loading import load as load_torch
from cuda_reference.model import generate
from flux_mlx.exact_prefill import prefill
from flux_mlx.gguf_directory import write_plain_directory
from flux_mlx.loading import load as load_mlx
from flux_mlx.models import Model, ModelArgs, routed_layers
from flux_mlx.smollm2 import fetch_gguf
from flux_mlx.spec import FluxConfig, PatternConfig, Route
from parity_tests.properties import Decisions
from parity_tests.test_torch_loading import write_directory
from parity_tests.tiny_models import randomise_routers
from parity_tests.tolerances import NEAR_TIE, network_reference

ROOT = Path(__file__).parent.parent
PROMPT_TOKENS, NEW_TOKENS = 1500, 16
FLUX = FluxConfig(pattern=PatternConfig(block_size=64, sink_tokens=64, window_tokens=256))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """SmolLM2 with random routers that take both routes."""
    plain = tmp_path_factory.mktemp("smollm2") / "plain"
    write_plain_directory(fetch_gguf(ROOT / ".cache" / "smollm2"), plain)
    config = json.loads((plain / "config.json").read_text()) | {"flux": FLUX.to_dict()}
    model = Model(ModelArgs(config))
    randomise_routers(model)
    model.load_weights(str(plain / "model.safetensors"), strict=False)
    path = write_directory(plain.parent / "flux", model, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).rename(path / name)
    return path


@pytest.fixture(scope="module")
def tokens(directory):
    text = (ROOT / "examples" / "data" / "us_constitution_1787.txt").read_text(encoding="utf-8")
    return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids[:PROMPT_TOKENS]


@pytest.fixture(scope="module")
def mlx_result(directory, tokens):
    """(tokens, routes, route logits) of flux_mlx."""
    model, _ = load_mlx(directory)
    cache = model.make_cache()
    last = prefill(model, mx.array(tokens), cache)
    routers = routed_layers(model)
    logits = {i: np.array(attn.router(cache[i].pooled()))[0] for i, attn in routers.items()}
    said = [token for token, _ in generate_step(last, model, max_tokens=NEW_TOKENS, prompt_cache=cache)]
    return said, {i: cache[i].routes[0] for i in routers}, logits


@pytest.fixture(scope="module")
def torch_result(directory, tokens):
    """(tokens, routes, route logits) of cuda_reference."""
    gc.collect()
    torch.set_num_threads(2)
    result = generate(load_torch(directory)[0], tokens, NEW_TOKENS)
    return result.tokens, result.routes, {i: x.numpy() for i, x in result.logits.items()}


def test_same_routes_and_the_same_greedy_tokens(mlx_result, torch_result, record_property):
    said, routes, logits = zip(mlx_result, torch_result, strict=True)
    layers = range(30)
    each = [np.stack([x[i] for i in layers]) for x in logits]
    network_reference(each[1].astype(np.float64), each[1]).check("route logits", each[0])
    ties = [i for i, margin in enumerate(each[1][:, 1] - each[1][:, 0]) if abs(margin) < NEAR_TIE]
    Decisions(len(layers), [f"layer {i}" for i in ties]).report(record_property)
    assert not ties, "choose other random routers: a decision of this test is too close to compare"
    assert routes[0] == routes[1]
    assert set(routes[0].values()) == {Route.FULL, Route.SPARSE}
    assert said[0] == said[1]
