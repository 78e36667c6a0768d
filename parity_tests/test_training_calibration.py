"""The calibrated start of the routers: inputs centred and scaled, variance kept, decisions as configured."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing import active_children

import pytest
import torch

from cuda_reference.calibration import (
    SILU_SECOND_MOMENT,
    agreement,
    calibrate,
    calibrate_model,
    fit_masks,
    joined,
    pooled_queries,
)
from cuda_reference.data import stream
from cuda_reference.data_packing import TILE, pack
from cuda_reference.data_prompts import TASKS
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import load_recipe
from cuda_reference.router import LayerRouter, pool_queries
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig
from parity_tests.test_data_packing import made
from parity_tests.tiny_training import tiny_model

D = 16


def pooled(n=4000):
    generator = torch.Generator().manual_seed(0)
    return 5.0 + torch.randn(n, D, generator=generator) * torch.linspace(0.01, 0.04, D)


def spread(router, x):
    """Standard deviation over prompts of the last hidden layer."""
    return float(router.head[:-1](router.encoder(x)).std(0).mean())


@torch.no_grad()
def test_prompts_stay_apart_up_to_the_last_layer():
    torch.manual_seed(0)
    fresh, calibrated = LayerRouter(D, RouterConfig()), LayerRouter(D, RouterConfig())
    calibrate(calibrated, pooled())
    first = calibrated.encoder[0](pooled())
    assert first.mean(0).abs().max() < 1e-3
    assert float(first.std()) == pytest.approx(1.0, abs=0.2)
    assert spread(calibrated, pooled()) > 0.3
    assert spread(fresh, pooled()) < 0.01


def test_the_first_decision_is_the_configured_one():
    router = LayerRouter(D, RouterConfig(init_bias=2.5))
    calibrate(router, pooled())
    assert torch.equal(router(pooled(7)), torch.tensor([[0.0, 2.5]]).expand(7, 2))


def test_the_constant_is_the_second_moment_of_silu():
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5
    moment = torch.trapezoid(torch.nn.functional.silu(x).square() * density, x)
    assert pytest.approx(float(moment), abs=1e-3) == SILU_SECOND_MOMENT


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="n >= 2, 16"):
        calibrate(LayerRouter(D, RouterConfig()), pooled(1))


def test_pooled_queries_are_those_of_the_prompts():
    config = FluxConfig(PatternConfig(block_size=16, sink_tokens=16, window_tokens=48), RouterConfig(pool_tokens=10))
    model = PackedModel(tiny_model(), config)
    samples = made([100, 150])
    row = pack(samples, TASKS, 10, 3 * TILE)
    found, task = joined([pooled_queries(model, row), pooled_queries(model, row)])
    assert task.tolist() == [0, 1, 0, 1]
    assert {layer: tuple(x.shape) for layer, x in found.items()} == {0: (4, 8), 1: (4, 8)}
    embedded = model.backbone.model.embed_tokens(
        torch.from_numpy(samples[1].tokens[: samples[1].prompt_tokens - 1]).long()
    )
    layer = model.backbone.model.layers[0]
    queries = layer.self_attn.q_proj(layer.input_layernorm(embedded)).view(1, -1, 6, 8)
    assert torch.allclose(found[0][1], pool_queries(queries, 10)[0], atol=1e-6)
    before = [p.clone() for p in model.routers().values()]
    calibrate_model(model, iter([row, row]), replace(load_recipe("smollm2"), calibration_rows=2, start={}))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.routers().values(), strict=True))


def test_the_loader_of_a_start_ends_with_it():
    model = PackedModel(tiny_model(), FluxConfig(PatternConfig(block_size=16, sink_tokens=16, window_tokens=48)))
    rows = [pack(made([100, 150]), TASKS, 10, 3 * TILE)] * 2
    packs = stream(rows, range(2), workers=1)
    assert active_children()
    calibrate_model(model, packs, replace(load_recipe("smollm2"), calibration_rows=2, start={}))
    assert not active_children()


def test_a_fitted_start_decides_as_its_masks_say():
    torch.manual_seed(0)
    routers = {layer: LayerRouter(D, RouterConfig(init_bias=1.5)) for layer in range(3)}
    task = torch.arange(40) % 2
    x = pooled(40) + 0.02 * task[:, None]  # two kinds of prompts, a standard deviation apart
    for router in routers.values():
        calibrate(router, x)
    masks = torch.tensor([[True, False, True], [False, False, True]])
    before = agreement(routers, dict.fromkeys(routers, x), task, masks)
    fit_masks(routers, dict.fromkeys(routers, x), task, masks, 0.9)
    gaps = torch.stack([router(x).diff(dim=1).squeeze(1).detach() for router in routers.values()], dim=1)
    share = agreement(routers, dict.fromkeys(routers, x), task, masks)
    assert before < share == float(((gaps > 0) == masks[task]).float().mean()) == 1.0
    assert gaps.sigmoid().clamp(0.5).mean() < 0.95
    assert all(p.grad is None for p in routers[0].parameters())
