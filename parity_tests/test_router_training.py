"""Routers that mlx-lm's own trainers adapt, if FLUX_MLX_TRAIN_ROUTERS asks for it; an export that is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import fuse, lora
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from flux_mlx import load
from flux_mlx.models import Model, ModelArgs, routed_layers, set_route
from flux_mlx.router import LayerRouter, pool_queries
from flux_mlx.router_training import full_share, make_trainable, pool_samples
from flux_mlx.spec import FluxConfig
from parity_tests.tiny_directories import flux_directory
from parity_tests.tiny_models import PATTERN, ROUTER, flux_model, prompt, randomise, randomise_routers, tiny_config

LENGTHS = (61, 7, 33, 12)
ROWS = [[1 + token for token in prompt(n, seed)] for seed, n in enumerate(LENGTHS)]


def padded() -> mx.array:
    """The rows as mlx-lm's trainer pads them."""
    return mx.array([row + [0] * (64 - len(row)) for row in ROWS])


def trainable_model(**changes):
    model = flux_model(vocab_size=256, **changes)
    model.flux_samples = make_trainable(routed_layers(model).values())
    return model


def parameters(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("pool_tokens", [1, 12, 40, 100])
def test_padding_enters_no_pool(pool_tokens):
    queries = mx.random.normal((4, 64, 3, 5), key=mx.random.key(0))
    found = pool_samples(queries, mx.array(LENGTHS), pool_tokens)
    for row, n in enumerate(LENGTHS):
        expected = pool_queries(queries[row : row + 1, :n], pool_tokens)[0]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_a_training_step_computes_every_row_by_its_route():
    model = trainable_model()
    model.train()
    together = model(padded())
    assert model.flux_samples.lengths.tolist() == list(LENGTHS)
    model.eval()
    for row, tokens in zip(together, ROWS, strict=True):
        np.testing.assert_allclose(row[: len(tokens)], model(mx.array([tokens]))[0], atol=1e-4)
    set_route(model, "full")
    model.train()
    assert not np.allclose(model(padded())[0], together[0], atol=1e-3)


def test_the_share_is_hard_and_its_gradient_soft():
    router, pooled = LayerRouter(32, ROUTER), mx.random.normal((64, 32), key=mx.random.key(1))
    router.head[-1].weight = mx.random.normal((2, 32), key=mx.random.key(2))
    router.head[-1].bias = mx.zeros(2)

    def soft(x: mx.array) -> mx.array:
        logits = router(x)
        return mx.sigmoid(logits[:, 1] - logits[:, 0])

    share = full_share(router, pooled)
    assert share.tolist() == (soft(pooled) > 0.5).astype(mx.float32).tolist()
    assert set(share.tolist()) == {0.0, 1.0}
    found, expected = (mx.grad(lambda x, f=f: f(x).sum())(pooled) for f in (lambda x: full_share(router, x), soft))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert float(mx.abs(found).max()) > 1e-3


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("how", ["lora", "full"])
def test_compiled_steps_adapt_routers_only_if_asked(asked, how):
    model = trainable_model() if asked else flux_model(vocab_size=256)
    model.freeze()
    mx.random.seed(0)
    if how == "lora":
        linear_to_lora_layers(model, 4, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    else:
        for layer in model.layers:
            layer.unfreeze()
    model.train()
    before, may_change = parameters(model), dict(tree_flatten(model.trainable_parameters()))
    optimizer, grad = optim.Adam(1e-2), nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    def step(x: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradient = grad(model, x, lengths)
        optimizer.update(model, gradient)
        return loss

    compiled = mx.compile(step, inputs=state, outputs=state)
    losses = [compiled(padded(), mx.array([[0, n] for n in LENGTHS])).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    trained = {name for name, value in parameters(model).items() if not mx.array_equal(value, before[name])}
    assert trained <= set(may_change)
    assert [name for name in trained if "q_proj" in name]
    assert bool([name for name in may_change if ".router." in name]) == asked
    assert bool([name for name in trained if ".router." in name]) == asked


@pytest.mark.parametrize(("value", "asked"), [(None, False), ("0", False), ("1", True)])
def test_the_environment_asks(monkeypatch, value, asked):
    if value is not None:
        monkeypatch.setenv("FLUX_MLX_TRAIN_ROUTERS", value)
    flux = FluxConfig(pattern=PATTERN, router=ROUTER)
    model = randomise(Model(ModelArgs({**tiny_config("llama"), "flux": flux.to_dict()})))
    randomise_routers(model)
    assert (model.flux_samples is not None) == asked
    model.unfreeze()
    trainable = dict(tree_flatten(model.trainable_parameters()))
    assert bool([name for name in trainable if ".router." in name]) == asked


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return flux_directory(tmp_path_factory.mktemp("training") / "flux")


def command(monkeypatch, module, *words: object) -> None:
    """Run the main function of a stock command with these arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def test_the_stock_commands_adapt_and_fuse_routers_if_asked(directory, tmp_path, monkeypatch):
    for split in ("train", "valid"):
        lines = (json.dumps({"text": "a quick brown fox, a lazy dog. " * 3 + str(i)}) for i in range(4))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    adapters, fused = tmp_path / "adapters", tmp_path / "fused"
    model = ("--model", directory, "--trust-remote-code", "--adapter-path", adapters)
    monkeypatch.setenv("FLUX_MLX_TRAIN_ROUTERS", "1")
    command(
        *(monkeypatch, lora, *model, "--train", "--data", tmp_path, "--iters", "2", "--batch-size", "2"),
        *("--num-layers", "4", "--learning-rate", "1e-2", "--val-batches", "1", "--steps-per-report", "1"),
    )
    trained = mx.load(str(adapters / "adapters.safetensors"))
    adapted = [value for name, value in trained.items() if ".router." in name and name.endswith("lora_b")]
    assert adapted
    assert any(mx.any(value != 0) for value in adapted)
    command(monkeypatch, fuse, *model, "--save-path", fused)
    monkeypatch.delenv("FLUX_MLX_TRAIN_ROUTERS")
    before, after = parameters(load(directory)[0]), parameters(load(fused)[0])
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not mx.array_equal(value, before[name])}
    assert [name for name in changed if ".router." in name]
    with pytest.raises(ValueError, match=r"router\.\S+lora_a: not an adapter parameter in the model"):
        load_adapters(load(directory)[0], str(adapters))


def test_gguf_export_is_refused_before_anything_is_written(directory, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\[Model\] a Flux model cannot be exported to GGUF, which has no place for"):
        command(
            *(monkeypatch, fuse, "--model", directory, "--trust-remote-code"),
            *("--export-gguf", "--save-path", tmp_path / "fused"),
        )
    assert list(tmp_path.iterdir()) == []
