"""The Torch loader: MLX's quantised form against MLX's own dequantiser, and directories that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file

from cuda_reference.loading import dequantise, load
from cuda_reference.model import routers
from flux_mlx.models import Model, ModelArgs
from flux_mlx.spec import FluxConfig
from parity_tests.tiny_models import PATTERN, ROUTER, flux_model, tiny_config

BITS = (2, 3, 4, 5, 6, 8)


def write_directory(path: Path, model: nn.Module, config: dict) -> Path:
    """A Flux model directory of an MLX model."""
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (path / "config.json").write_text(json.dumps(config))
    return path


def flux_config(family: str = "llama", **changes) -> dict:
    """config.json of `tiny_models.flux_model(family)`."""
    section = FluxConfig(pattern=PATTERN, router=ROUTER).to_dict()
    return {**tiny_config(family), "model_file": "flux_model.py", "flux": section, **changes}


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path / "flux", flux_model(), flux_config())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dequantise_is_mlx_s(bits, group_size, dtype):
    weight = mx.array(np.random.default_rng(bits).standard_normal((5, 192)).astype(np.float32))
    packed, scales, biases = mx.quantize(weight.astype(getattr(mx, dtype)), group_size=group_size, bits=bits)
    expected = mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits).astype(mx.float32)
    tensors = [torch.from_numpy(np.array(x.astype(mx.float32))).to(getattr(torch, dtype)) for x in (scales, biases)]
    actual = dequantise(torch.from_numpy(np.array(packed)), *tensors, group_size, bits)
    assert str(actual.dtype) == f"torch.{dtype}"
    ulp = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]  # MLX rounds the product too
    np.testing.assert_allclose(actual.float().numpy(), np.array(expected), rtol=0, atol=2 * ulp * 4)


def test_dequantise_keeps_leading_axes_and_works_in_pieces(monkeypatch):
    monkeypatch.setattr("cuda_reference.loading.DEQUANTISE_ROWS", 4)
    weight = mx.array(np.random.default_rng(0).standard_normal((3, 7, 64)).astype(np.float32))
    parts = mx.quantize(weight, group_size=32, bits=4)
    packed, scales, biases = (torch.from_numpy(np.array(x)) for x in parts)
    expected = np.array(mx.dequantize(*parts, group_size=32, bits=4))
    np.testing.assert_allclose(dequantise(packed, scales, biases, 32, 4).numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "bits", "dtype"),
    [(9, 4, torch.uint32), (8, 3, torch.uint32), (8, 7, torch.uint32), (8, 4, torch.int32)],
)
def test_dequantise_refuses(columns, bits, dtype):
    scales = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"\[dequantise\] expected uint32"):
        dequantise(torch.zeros(2, columns, dtype=dtype), scales, scales, 32, bits)


def test_parameters_and_settings_arrive(directory):
    model, flux = load(directory)
    stored = load_file(directory / "model.safetensors")
    named = dict(model.named_parameters())
    assert stored.keys() == named.keys()
    assert all(torch.equal(stored[name], named[name]) for name in stored)
    assert model.flux == flux
    assert (flux.pattern, flux.router) == (PATTERN, ROUTER)
    assert sorted(routers(model)) == [0, 1, 2, 3]
    assert not model.training


def test_routers_are_float32_whatever_the_backbone(directory):
    model, _ = load(directory, dtype=torch.bfloat16)
    dtypes = {".router." in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_tied_embeddings_need_no_head(tmp_path):
    model = flux_model(tie_word_embeddings=True)
    directory = write_directory(tmp_path / "flux", model, flux_config(tie_word_embeddings=True))
    loaded, _ = load(directory)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def quantised_directory(path: Path, **changes) -> Path:
    model = Model(ModelArgs(flux_config()))
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda name, m: hasattr(m, "to_quantized"))
    settings = {"group_size": 32, "bits": 4, "mode": "affine", **changes}
    return write_directory(path, model, flux_config(quantization=settings, quantization_config=settings))


def test_a_module_may_have_settings_of_its_own(tmp_path):
    model = Model(ModelArgs(flux_config()))
    choose = {
        "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 8},
        "model.layers.1.mlp.up_proj": {"bits": 3, "group_size": 32},
    }
    nn.quantize(model, class_predicate=lambda name, module: choose.get(name, False))
    loaded, _ = load(
        write_directory(tmp_path / "flux", model, flux_config(quantization={"group_size": 32, "bits": 4, **choose}))
    )
    for name, settings in choose.items():
        layer = int(name.split(".")[2])
        stored = model.layers[layer].mlp.up_proj
        expected = mx.dequantize(stored.weight, stored.scales, stored.biases, **settings)
        actual = loaded.model.layers[layer].mlp.up_proj.weight.detach().numpy()
        np.testing.assert_allclose(actual, np.array(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "mxfp4"}, "expected MLX's affine quantisation, got 'mxfp4'"),
        ({"bits": 8}, r"\[dequantise\] expected uint32"),
        ({"bits": 7}, r"\[dequantise\] expected uint32"),
    ],
)
def test_quantisation_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(quantised_directory(tmp_path / "flux", **changes))


def test_quantised_weights_without_settings(tmp_path):
    directory = quantised_directory(tmp_path / "flux")
    (directory / "config.json").write_text(json.dumps(flux_config()))
    with pytest.raises(ValueError, match=r"is quantised, but config\.json does not say its 'group_size'"):
        load(directory)


def edit(directory: Path, change) -> Path:
    """Apply `change` to the dict of stored tensors."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file({name: value.contiguous() for name, value in weights.items()}, directory / "model.safetensors")
    return directory


KEY = "model.layers.2.self_attn.router.head.4.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "weights do not fit LlamaForCausalLM.*missing.*up_proj"),
        (lambda w: w.update(extra=torch.ones(2)), "weights do not fit LlamaForCausalLM.*unexpected.*extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            "weights do not fit LlamaForCausalLM.*mismatched.*norm",
        ),
        (lambda w: w.pop(KEY), r"1 router tensors do not fit.*head.4.weight of shape \(2, 32\), got none"),
        (lambda w: w.update({KEY: torch.ones(2, 3)}), r"head.4.weight of shape \(2, 32\), got \(2, 3\)"),
        (lambda w: w[KEY].fill_(float("nan")), "head.4.weight has values that are not finite"),
        (lambda w: w.update({KEY.replace("2", "9"): w[KEY].clone()}), "layers.9.*of shape none, got"),
    ],
)
def test_weights_refused(directory, change, message):
    with pytest.raises(ValueError, match=message):
        load(edit(directory, change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected an object with model_type and a flux section"),
        (json.dumps(tiny_config("llama")), "expected an object with model_type and a flux section"),
        (json.dumps(flux_config(model_type="no_such_model")), "transformers has no causal LM of this model_type"),
        (
            json.dumps(flux_config(flux={"pattern": {"window_tokens": 0}})),
            "window_tokens must be an integer >= 1, got 0",
        ),
    ],
)
def test_configs_refused(directory, text, message):
    (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_missing_and_truncated_files(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a Flux model directory"):
        load(tmp_path / "nowhere")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load(directory)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="there is no model"):
        load(directory)
