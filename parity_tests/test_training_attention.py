"""Packed attention and the packed model against the specification and against the unpacked model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cuda_reference.data_packing import TILE, pack
from cuda_reference.data_prompts import TASKS, Sample
from cuda_reference.model import Routing, attach
from cuda_reference.packed_attention import PackedAttention, _pack_tables
from cuda_reference.packed_model import PackedModel
from cuda_reference.xattention import select_blocks
from flux_mlx.spec import FluxConfig, PatternConfig, Route, RouterConfig, full_attention, sparse_attention
from parity_tests.test_data_packing import made
from parity_tests.tiny_training import tiny_model

PATTERN = PatternConfig(block_size=16, sink_tokens=16, window_tokens=48)
CONFIG = FluxConfig(pattern=PATTERN, router=RouterConfig(pool_tokens=10, init_bias=0.0))
HQ, HKV, D, SCALE = 6, 2, 8, 8**-0.5


def qkv(tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, tokens, D, generator=generator, dtype=dtype) for h in (HQ, HKV, HKV)]


def expected(q, k, v, full):
    pair = [x.detach().numpy() for x in (q, k, v)]
    return full_attention(*pair, scale=SCALE) if full else sparse_attention(*pair, PATTERN, scale=SCALE)


def first(result):
    return torch.from_numpy(np.asarray(result[0] if isinstance(result, tuple) else result))


@pytest.mark.parametrize("routes", [[True, False, True], [False, True, False]])
def test_every_sample_follows_its_route(routes):
    packed = pack(made([130, 300, 200]), TASKS, 10, 7 * TILE)
    q, k, v = qkv(7 * TILE)
    out = PackedAttention(packed, PATTERN)(q, k, v, torch.tensor([routes]), SCALE)
    for index, full in enumerate(routes):
        rows = packed.sample == index
        assert torch.allclose(out[:, :, rows], first(expected(*(x[:, :, rows] for x in (q, k, v)), full)), atol=1e-12)


def test_routes_of_heads():
    packed = pack(made([250]), TASKS, 10, 2 * TILE)
    q, k, v = qkv(2 * TILE)
    routes = torch.tensor([[True], [False], [False], [True], [True], [False]])
    out = PackedAttention(packed, PATTERN)(q, k, v, routes, SCALE)
    for head, full in enumerate(routes[:, 0].tolist()):
        assert torch.allclose(out[:, head], first(expected(q, k, v, full))[:, head], atol=1e-12)


@pytest.mark.parametrize("groups", [1, HQ])
def test_the_shortcut_has_the_gradients_of_the_mixture(groups):
    packed = pack(made([130, 300]), TASKS, 10, 5 * TILE)
    attention = PackedAttention(packed, PATTERN)
    generator = torch.Generator().manual_seed(1)
    z = (torch.rand(groups, 2, generator=generator) > 0.5).double()
    z[0] = torch.tensor([0.0, 1.0])
    weight = torch.randn(1, HQ, 5 * TILE, D, generator=generator, dtype=torch.float64)
    results = []
    for hard in (True, False):
        inputs = [x.clone().requires_grad_() for x in (*qkv(5 * TILE), z)]
        out = attention.mixture(*inputs, SCALE, hard=hard)
        out.backward(weight)
        results.append([out.detach(), *(x.grad for x in inputs)])
    for shortcut, plain in zip(*results, strict=True):
        assert torch.allclose(shortcut, plain, rtol=2e-6, atol=1e-6 * plain.abs().max())
    assert results[0][4].abs().min() > 0


WIDER = PatternConfig(block_size=64, sink_tokens=128, window_tokens=200)
LOCAL = PatternConfig(block_size=1, sink_tokens=0, window_tokens=200)  # a sliding window of the family's own


@pytest.mark.parametrize("pattern", [PATTERN, WIDER, LOCAL, replace(PATTERN, name="triangle", last_tokens=100)])
def test_tile_tables_bound_the_mask(pattern):
    samples = made([400, 150, 700], candidates=4)
    packed = pack(samples, TASKS, 10, 14 * TILE, candidates=True)
    attention = PackedAttention(packed, pattern)
    index = torch.arange(14 * TILE)
    for full, tables in zip((True, False), attention._tables(), strict=True):
        allowed = attention._allowed(torch.full((1, 14 * TILE), full))
        tiles = allowed(0, 0, index[:, None], index[None, :]).view(14, TILE, 14, TILE).permute(0, 2, 1, 3)
        partial, whole = torch.zeros(2, 14, 14, dtype=torch.bool)
        for kept, (counts, columns) in zip((partial, whole), (tables[:2], tables[2:4]), strict=True):
            for row, count in enumerate(counts[0, 0].tolist()):
                kept[row, columns[0, 0, row, :count].long()] = True
        assert not (partial & whole).any()
        assert torch.equal(tiles.any(-1).any(-1) & ~(partial | whole), torch.zeros(14, 14, dtype=torch.bool))
        assert tiles.all(-1).all(-1)[whole].all()
        assert full or whole.sum() < 0.6 * (partial | whole).sum() or pattern is not PATTERN


def test_tables_by_key_are_the_transpose():
    kept = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    tables = _pack_tables(kept, kept & torch.eye(5, dtype=torch.bool))
    assert all(
        torch.equal(a, b)
        for a, b in zip(tables[4:], _pack_tables(kept.T, kept.T & torch.eye(5, dtype=torch.bool))[:4], strict=True)
    )


PATTERNS = {
    "streaming": PATTERN,
    "triangle": PatternConfig("triangle", block_size=16, sink_tokens=16, window_tokens=48, last_tokens=20),
    "xattention": PatternConfig("xattention", block_size=64, sink_tokens=64, window_tokens=64, stride=8, threshold=0.5),
}


@pytest.fixture
def model(request):
    torch.manual_seed(5)
    pattern = PATTERNS[getattr(request, "param", "streaming")]
    model = PackedModel(tiny_model(layers=3), FluxConfig(pattern, CONFIG.router))
    for name, parameter in model.routers().items():
        if "head.4.weight" in name:
            torch.nn.init.normal_(parameter, std=30.0)
    return model


def unpacked(model, sample, route):
    """Logits and routes of one sample by `model.Routing`, on a copy with the unpacked attention function."""
    stock = attach(tiny_model(layers=3), FluxConfig(model.config.pattern, CONFIG.router, route=route))
    stock.load_state_dict(model.backbone.state_dict())
    routing = Routing(stock.flux, [sample.prompt_tokens])
    logits = stock(torch.from_numpy(sample.tokens).long()[None], routing=routing, use_cache=False).logits[0]
    return logits, routing


@pytest.mark.parametrize("model", PATTERNS, indirect=True)
@torch.no_grad()
def test_packed_samples_are_those_of_the_unpacked_model(model):
    samples = [Sample(s.tokens, s.prompt_tokens, s.task) for s in made([150, 333, 90, 260])]
    packed = pack(samples, TASKS, 10, 9 * TILE)
    logits, flux = model(packed)
    seen = set()
    for index, sample in enumerate(samples):
        stock, routing = unpacked(model, sample, "auto")
        rows = slice(sample.prompt_tokens - 1, len(sample.tokens) - 1)
        assert torch.allclose(logits[packed.loss_sample == index], stock[rows], atol=2e-5)
        for layer, routes in routing.routes.items():
            assert torch.allclose(flux.logits[layer][index], routing.logits[layer][0], atol=1e-4)
            assert bool(flux.full_layers()[layer, 0, index]) == (routes[0] == Route.FULL)
            seen.add(routes[0])
        assert flux.omega()[index] == pytest.approx(np.mean([r[0] == Route.SPARSE for r in routing.routes.values()]))
    assert seen == {Route.FULL, Route.SPARSE}


@torch.no_grad()
def test_candidates_score_as_if_each_were_the_answer(model):
    (sample,) = made([200], candidates=3)
    packed = pack([sample], TASKS, 10, 2 * TILE, candidates=True)
    logits, _ = model(packed, forced=torch.tensor([[True], [False], [False]]))
    prompt = sample.tokens[: sample.prompt_tokens]
    for branch, answer in enumerate(sample.candidates):
        alone = Sample(np.concatenate([prompt, answer]), len(prompt), sample.task)
        stock, _ = unpacked(model, alone, (0,))
        mine = logits[packed.loss_branch == branch]
        assert torch.allclose(mine, stock[len(prompt) - 1 : -1], atol=2e-5)


@torch.no_grad()
def test_chunks_are_routed_one_by_one(model):
    """Against the unpacked model, to which each prefix is a prompt of its own, on the newest chunk's route."""
    samples = made([150, 2 * TILE + 9 + 5, 3 * TILE])  # the second's last chunk of 9 - 1 prompt tokens is too short
    packed = pack(samples, TASKS, 10, 9 * TILE, chunk_tokens=TILE)
    assert packed.groups == 2 + 2 + 3
    assert packed.final_group.tolist() == [1, 3, 6]
    _, flux = model(packed)
    _, exact = model(pack(samples, TASKS, 10, 9 * TILE))
    first = pack([Sample(s.tokens[: TILE + 2], TILE + 1, s.task) for s in samples], TASKS, 10, 6 * TILE)
    _, prefix = model(first)
    for layer in range(3):
        of_first = flux.logits[layer][[0, 2, 4]]
        assert torch.allclose(of_first, prefix.logits[layer], atol=1e-4)
    assert torch.allclose(flux.logits[0][packed.final_group[[0, 2]]], exact.logits[0][[0, 2]], atol=1e-4)
    assert not torch.allclose(flux.logits[0][3], exact.logits[0][1], atol=1e-4)
    assert torch.equal(flux.shares()[:, 0], flux.full_layers()[:, 0, 1].float())


def test_chunks_have_no_gradient(model):
    packed = pack(made([300]), TASKS, 10, 3 * TILE, chunk_tokens=TILE)
    with pytest.raises(ValueError, match="one for each chunk"):
        model(packed)
    with pytest.raises(ValueError, match="multiple of 128"):
        pack(made([300]), TASKS, 10, 3 * TILE, chunk_tokens=100)


def test_xattention_chooses_within_each_prompt(model):
    samples = made([200, 333])
    packed = pack(samples, TASKS, 10, 5 * TILE)
    attention = PackedAttention(packed, PATTERNS["xattention"])
    q, k, _ = qkv(5 * TILE, torch.float32)
    kept = attention.kept_blocks(q, k)
    start, tokens = 2 * TILE, samples[1].prompt_tokens - 1
    alone = select_blocks(*(x[:, :, start : start + tokens] for x in (q, k)), PATTERNS["xattention"])[0]
    assert torch.equal(kept[:, 4:10, 4:10], alone)
    assert 0.2 < float(alone.tril().float().sum() / (HQ * 21)) < 1.0
    assert not kept[:, 4:, :4].any()
    with pytest.raises(ValueError, match="must divide 128"):
        PackedAttention(packed, PatternConfig("xattention", block_size=48))


def test_only_routers_have_gradients(model):
    packed = pack(made([150, 333]), TASKS, 10, 5 * TILE)
    logits, flux = model(packed, noise=torch.zeros(3, 2))
    (logits.logsumexp(-1).mean() + flux.omega().sum()).backward()
    trained = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert trained == set(model.routers())
    assert all(p.grad.isfinite().all() for p in model.routers().values())
    model.zero_grad()


def test_heads_are_routed_one_by_one_as_a_baseline():
    torch.manual_seed(0)
    by_head = PackedModel(tiny_model(), CONFIG, by_head=True)
    packed = pack(made([150, 333]), TASKS, 10, 5 * TILE)
    noise = torch.randn(2, HQ * 2, generator=torch.Generator().manual_seed(0))
    logits, flux = by_head(packed, noise=noise)
    assert flux.full_layers().shape == (2, HQ, 2)
    shares = flux.full_layers().float().mean((0, 1))
    assert torch.allclose(flux.omega(), 1 - shares)
    assert 0 < float(shares.min()) < 1
    logits.logsumexp(-1).mean().backward()
    assert by_head.routers()["model.layers.0.self_attn.router.head.4.weight"].grad.abs().max() > 0
