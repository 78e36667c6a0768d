"""Published checkpoints: synthetic ones with their tensor names and shapes, their router in Torch beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux_mlx import load, routes
from flux_mlx.base_model import Quantization
from flux_mlx.convert import convert
from flux_mlx.exact_prefill import prefill
from flux_mlx.model_directory import read_config
from flux_mlx.models import routed_layers, set_route
from flux_mlx.official import base_config, is_official, official_settings, two_logits
from flux_mlx.spec import FluxConfig, PatternConfig, Route, RouterConfig
from parity_tests.tiny_directories import stock_directory
from parity_tests.tiny_models import prompt
from parity_tests.tolerances import NEAR_TIE

torch = pytest.importorskip("torch")

D, LAYERS, HEADS, KV_HEADS = 128, 2, 2, 1
FAMILY = {"PawQwen3ForCausalLM": "qwen3", "PawLlamaForCausalLM": "llama"}
ROUTER_SHAPES = {
    "cls_feat_extractor.0": (1024, 128),
    "cls_feat_extractor.2": (256, 1024),
    "cls_router_head_agnostic.0": (512, 256),
    "cls_router_head_agnostic.2": (128, 512),
    "cls_router_head_agnostic.4": (2, 128),
}
"""Of a head size of 128, which all three published models have."""
PUBLISHED = {
    "toggle_type": "streaming",
    "retrieval_mode": "full",
    "pooling_mode": "ctx_q",
    "use_softmax": True,
    "sink_size": 128,
    "local_window_size": 2048,
    "pool_size": 150,
    "enable_ada_sparsity": True,
    "use_task_emb_for_mask": False,
    "disable_linear_regularization_term": False,
    "suggested_sparsity": None,
}


def router_tensors(rng: np.random.Generator, layer: int, logits: int) -> dict[str, np.ndarray]:
    """One layer's router under the published names."""
    prefix, tensors = f"model.layers.{layer}.self_attn.mask_allocator", {}
    for name, (out, fan_in) in ROUTER_SHAPES.items():
        out = logits if name.endswith("agnostic.4") else out
        gain = 8.0 if name.endswith("agnostic.4") else 1.5
        tensors[f"{prefix}.{name}.weight"] = gain * fan_in**-0.5 * rng.standard_normal((out, fan_in))
        tensors[f"{prefix}.{name}.bias"] = 0.002 * rng.standard_normal(out)
    tensors[f"{prefix}.log_temp"] = np.array(0.0)
    tensors[f"model.layers.{layer}.self_attn.attn_mask_log_alphas"] = np.full(KV_HEADS, 4.5)
    return tensors


def published_checkpoint(path: Path, architecture: str, logits: int = 2, **settings) -> Path:
    """A model directory as the published ones are."""
    sizes = {"head_dim": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    stock_directory(path, FAMILY[architecture], **sizes)
    weights = mx.load(str(path / "model.safetensors"))
    rng = np.random.default_rng(3)
    extra = {name: x for layer in range(LAYERS) for name, x in router_tensors(rng, layer, logits).items()}
    extra |= {"model.sparsity_lambda1_task": np.ones(5), "model.sparsity_lambda2_task": np.ones(5)}
    weights |= {name: mx.array(x.astype(np.float32)) for name, x in extra.items()}
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").unlink()
    config = json.loads((path / "config.json").read_text())
    settings = {"architectures": [architecture], **PUBLISHED, **settings}
    (path / "config.json").write_text(json.dumps({**config, **settings}))
    return path


def published_forward(path: Path, layer: int, queries: np.ndarray, pool_size: int, logits: int) -> np.ndarray:
    """Logits of the published router, built as it builds itself, for queries `[1, T, H, D]` in Torch."""
    nn, weights = torch.nn, mx.load(str(path / "model.safetensors"))
    feat = nn.Sequential(nn.Linear(D, 8 * D), nn.SiLU(), nn.Linear(8 * D, 2 * D))
    steps = (nn.Linear(2 * D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D), nn.SiLU(), nn.Linear(D, logits))
    router = nn.ModuleDict({"cls_feat_extractor": feat, "cls_router_head_agnostic": nn.Sequential(*steps)})
    prefix = f"model.layers.{layer}.self_attn.mask_allocator."
    state = {k.removeprefix(prefix): torch.tensor(np.array(v)) for k, v in weights.items() if k.startswith(prefix)}
    state.pop("log_temp")
    router.load_state_dict(state)
    x = torch.tensor(queries)
    pooled = torch.cat([x[:, :pool_size], x[:, -pool_size:]], dim=1).mean(dim=1).mean(dim=1)
    with torch.no_grad():
        return router["cls_router_head_agnostic"](router["cls_feat_extractor"](pooled)).numpy()


def attention_inputs(model, tokens: mx.array) -> list[mx.array]:
    """What every layer's attention module gets of a prompt within the window, `[1, T, hidden]`."""
    x, inputs = model.model.embed_tokens(tokens[None]), []
    for layer, entry in zip(model.layers, model.make_cache(), strict=True):
        inputs.append(layer.input_layernorm(x))
        x = layer(x, "causal", entry)
    return inputs


def layer_queries(attn, x: mx.array) -> mx.array:
    """Queries before RoPE `[1, T, H, D]`."""
    queries = attn.q_proj(x).reshape(1, -1, HEADS, D)
    return attn.q_norm(queries) if "q_norm" in attn else queries


@pytest.mark.parametrize("architecture", FAMILY)
@pytest.mark.parametrize("logits", [2, 1])
def test_routes_are_those_of_the_published_router(architecture, logits, tmp_path):
    source = published_checkpoint(tmp_path / "published", architecture, logits, pool_size=20, local_window_size=128)
    convert(source, tmp_path / "flux", dtype="float32")
    model, _ = load(tmp_path / "flux")
    seen = [set() for _ in range(LAYERS)]
    for seed in range(16):
        tokens, cache = mx.array(prompt(70, seed)), model.make_cache()
        prefill(model, tokens, cache)
        for layer, x in enumerate(attention_inputs(model, tokens[:-1])):
            queries = layer_queries(model.layers[layer].self_attn, x)
            found = published_forward(source, layer, np.array(queries), 20, logits)[0]
            margin = found[0] if logits == 1 else found[1] - found[0]
            ours = model.layers[layer].self_attn.router(cache[layer].pooled())[0]
            assert float(ours[1] - ours[0]) == pytest.approx(float(margin), abs=1e-3)
            if abs(margin) > NEAR_TIE:
                assert routes(cache)[layer] == (Route.FULL if margin > 0 else Route.SPARSE)
            seen[layer].add(routes(cache)[layer])
    assert seen == [{Route.FULL, Route.SPARSE}] * LAYERS


@pytest.mark.parametrize("architecture", FAMILY)
@pytest.mark.parametrize("bits", [None, 4])
def test_conversion_keeps_projections_and_drops_training_state(architecture, bits, tmp_path):
    source = published_checkpoint(tmp_path / "published", architecture)
    how = Quantization(32, bits) if bits else None
    convert(source, tmp_path / "flux", quantization=how)
    config = read_config(tmp_path / "flux")
    assert config["architectures"] == [architecture.removeprefix("Paw")]
    assert not set(PUBLISHED) & set(config)
    flux = FluxConfig.from_dict(config["flux"])
    assert flux == FluxConfig(PatternConfig(window_tokens=2048), RouterConfig(pool_tokens=150))
    model, _ = load(tmp_path / "flux")
    theirs = mx.load(str(source / "model.safetensors"))
    weights = dict(tree_flatten(model.parameters()))
    assert not [name for name in weights if "log_" in name or "lambda" in name]
    for layer in routed_layers(model):
        prefix = f"model.layers.{layer}.self_attn"
        last = theirs[f"{prefix}.mask_allocator.cls_router_head_agnostic.4.weight"]
        assert mx.array_equal(weights[f"{prefix}.router.head.4.weight"], last)
        if bits is None:
            assert mx.array_equal(weights[f"{prefix}.q_proj.weight"], theirs[f"{prefix}.q_proj.weight"])
    quantised = {name for name, value in weights.items() if value.dtype == mx.uint32}
    assert bool(quantised) == bool(bits)
    assert all(value.dtype == mx.float32 for name, value in weights.items() if ".router." in name)


@pytest.mark.parametrize("architecture", FAMILY)
def test_published_xattention_runs_in_exact_prefill(architecture, tmp_path):
    source = published_checkpoint(tmp_path / "published", architecture, toggle_type="xattn", pool_size=20)
    convert(source, tmp_path / "flux", dtype="float32", settings={"threshold": 0.3})  # random keys share the mass
    model, _ = load(tmp_path / "flux")
    assert model.flux.pattern == PatternConfig("xattention", window_tokens=2048, threshold=0.3)
    outcomes = []
    for route in ("full", "sparse", "auto"):
        set_route(model, route)
        cache = model.make_cache()
        last = prefill(model, mx.array(prompt(600)), cache)
        outcomes.append(np.array(model(last[None], cache=cache)[0, -1]))
        assert Route.UNSET not in routes(cache)
    assert np.isfinite(outcomes).all()
    assert not np.allclose(outcomes[0], outcomes[1], atol=1e-3)


def config_of(**settings) -> dict:
    return {"architectures": ["PawQwen3ForCausalLM"], "model_type": "qwen3", **settings}


@pytest.mark.parametrize(
    ("said", "pattern"),
    [
        ({}, PatternConfig(window_tokens=1024)),
        ({"toggle_type": "xattn"}, PatternConfig("xattention", window_tokens=1024, threshold=0.9, stride=16)),
        ({"toggle_type": "triangle", "triangle_n_last": 64}, PatternConfig("triangle", 128, 128, 1024, 64)),
        ({"sink_size": 256, "local_window_size": 4096.0}, PatternConfig(sink_tokens=256, window_tokens=4096)),
    ],
)
def test_settings_and_their_published_defaults(said, pattern):
    assert official_settings(config_of(**said)) == FluxConfig(pattern, RouterConfig(pool_tokens=100))


@pytest.mark.parametrize(
    "said",
    [
        {"toggle_type": "topk"},
        {"toggle_type": "none"},
        {"toggle_type": ["streaming"]},
        {"retrieval_mode": "xattn"},
        {"pooling_mode": "first_token"},
        {"pool_size": "many"},
        {"sink_size": -1},
        {"local_window_size": None},
    ],
)
def test_settings_that_are_not_implemented_are_refused(said):
    with pytest.raises(ValueError, match=r"\[(official|PatternConfig|RouterConfig)\]"):
        official_settings(config_of(**said))


def test_other_configs_are_left_alone():
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sink_size": 3}
    assert not is_official(config)
    assert base_config(config) == config


def test_a_router_of_two_logits_is_left_alone():
    weights = {"head.4.weight": mx.ones((2, 3)), "head.4.bias": mx.ones(2)}
    assert two_logits(weights) == weights
    assert two_logits({}) == {}
