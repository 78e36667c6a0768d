"""mlx-lm's Python entry points that need data of their own: evaluate, perplexity, calibrated quantisation."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import perplexity
from mlx_lm.perplexity import eval_ppl
from mlx_lm.quant import awq, dynamic_quant, gptq

from flux_mlx import load, routes
from flux_mlx.models import set_route
from flux_mlx.spec import Route
from parity_tests.tiny_directories import flux_directory
from parity_tests.tiny_models import flux_model, prompt, stock_model

STOCK = stock_model()
MODEL = flux_model()


@pytest.fixture(autouse=True)
def _automatic_routes():
    yield
    set_route(MODEL, "auto")


@pytest.fixture
def harness(monkeypatch):
    """`mlx_lm.evaluate.MLXLM` over a stand-in for lm_eval, whose interface it implements."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    modules = {name: ModuleType(name) for name in names}
    modules["lm_eval.api.model"].LM = object
    modules["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    return importlib.import_module("mlx_lm.evaluate").MLXLM


def scorer(harness, model):
    """A harness model without files: tokens are numbers in a string."""
    lm = harness.__new__(harness)
    lm._model, lm._max_tokens, lm._batch_size, lm.use_chat_template, lm._sampler = model, 400, 2, False, None
    lm.tokenizer = SimpleNamespace(encode=lambda text, **_: [int(token) for token in text.split()])
    return lm


def words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


REQUESTS = [SimpleNamespace(args=(words(prompt(61)), " " + words(prompt(n, 7 + n)))) for n in (1, 5, 9)]


def test_evaluate_with_full_routes_is_stock(harness):
    set_route(MODEL, "full")
    assert scorer(harness, MODEL).loglikelihood(REQUESTS) == scorer(harness, STOCK).loglikelihood(REQUESTS)
    texts = [SimpleNamespace(args=(words(prompt(n, n)),)) for n in (40, 61, 33)]
    ours, stock = (scorer(harness, model).loglikelihood_rolling(texts) for model in (MODEL, STOCK))
    assert ours == stock


def test_evaluate_scores_continuations_with_the_prompts_route(harness):
    set_route(MODEL, (1,))
    for request, (score, _) in zip(REQUESTS, scorer(harness, MODEL).loglikelihood(REQUESTS), strict=True):
        tokens = [int(token) for text in request.args for token in text.split()]
        logits = MODEL(mx.array([tokens]), cache=MODEL.make_cache())[0, 60:-1]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        expected = sum(float(logprobs[i, token]) for i, token in enumerate(tokens[61:]))
        assert score == pytest.approx(expected, abs=1e-3)


def test_evaluate_rolls_batches_over_a_cache_made_for_one(harness):
    texts = [SimpleNamespace(args=(words(prompt(n, n)),)) for n in (61, 61)]
    assert len(scorer(harness, MODEL).loglikelihood_rolling(texts)) == 2


def test_perplexity_is_that_of_the_routed_model():
    data = mx.array([prompt(81, seed) for seed in range(4)])
    stock = eval_ppl(STOCK, data, batch_size=4)
    set_route(MODEL, "full")
    assert eval_ppl(MODEL, data, batch_size=4) == stock
    set_route(MODEL, "auto")
    losses = []
    for row in data:
        logits = MODEL(row[None, :-1], cache=MODEL.make_cache())[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        losses.append(-mx.take_along_axis(logprobs, row[1:, None], axis=-1))
    routed = float(mx.exp(mx.concatenate(losses).mean()))
    assert eval_ppl(MODEL, data, batch_size=4)[0] == pytest.approx(routed, rel=1e-4)
    assert abs(routed - stock[0]) > 1e-3 * stock[0]


def quantised(model) -> set[str]:
    return {name for name, value in tree_flatten(model.parameters()) if value.dtype == mx.uint32}


@pytest.mark.parametrize("route", ["full", "auto"])
def test_calibrated_quantisation_leaves_routers_alone(route):
    data = mx.array([prompt(40, seed) for seed in range(4)])
    for method in ("awq", "gptq"):
        model, stock = flux_model(route=route), stock_model()
        for each in (model, stock):
            if method == "awq":
                sizes = {"group_size": 32, "bits": 4, "embed_group_size": 32, "embed_bits": 4, "n_grid": 2}
                awq.awq_quantize(each, data, awq.AWQ_MODEL_CONFIGS["llama"], **sizes)
            else:
                gptq.gptq_quantize(each, data, 4, 32, fallback_bits=4, fallback_group_size=32)
        assert quantised(model) == quantised(stock)
        assert quantised(model)
        if route == "full":
            x = mx.array([prompt(61)])
            assert np.array_equal(model(x), stock(x)), method


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A Flux model directory; its stock one lies beside it, with the ending -stock."""
    return flux_directory(tmp_path_factory.mktemp("tools") / "flux")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the main function of a stock command, with calibration text where mlx-lm keeps the one that it downloads."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = tmp_path / ".cache" / "mlx-lm" / "calibration_v5.txt"
    text.parent.mkdir(parents=True)
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 20)

    def run(module: ModuleType, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        module.main()

    return run


CALIBRATED = {
    awq: ("--group-size", "32", "--n-grid", "2", "--num-samples", "2", "--sequence-length", "64"),
    gptq: ("--group-size", "32", "--fallback-group-size", "32", "--num-samples", "2", "--sequence-length", "64"),
    dynamic_quant: ("--low-group-size", "32", "--high-group-size", "32"),
}


@pytest.mark.parametrize("tool", CALIBRATED, ids=lambda tool: tool.__name__.rpartition(".")[2])
def test_calibrating_commands_write_models_that_load_and_route(directory, tmp_path, command, tool):
    out = tmp_path / "quantised"
    command(tool, "--model", directory, "--trust-remote-code", "--mlx-path", out, *CALIBRATED[tool])
    before, model = dict(tree_flatten(load(directory)[0].parameters())), load(out)[0]
    after = dict(tree_flatten(model.parameters()))
    assert model.layers[0].self_attn.q_proj.bits in (4, 5)
    routers = {name for name in after if ".router." in name}
    assert routers == {name for name in before if ".router." in name}
    assert all(mx.array_equal(after[name], before[name]) for name in routers)
    cache = model.make_cache()
    model(mx.array([prompt(60)]), cache=cache)
    assert Route.UNSET not in routes(cache)


def test_awq_refuses_other_families_before_it_writes(tmp_path, command):
    model = flux_directory(tmp_path / "olmo2", "olmo2")
    with pytest.raises(NotImplementedError, match="AWQ support for olmo2 models NYI"):
        command(awq, "--model", model, "--trust-remote-code", "--mlx-path", tmp_path / "out", *CALIBRATED[awq])
    assert not (tmp_path / "out").exists()


def test_the_perplexity_command_with_full_routes_is_stock(directory, command, monkeypatch, capsys):
    monkeypatch.setenv("FLUX_MLX_ROUTE", "full")
    data = mx.array([prompt(64, seed) for seed in range(8)])
    monkeypatch.setattr(perplexity, "load_data", lambda *args, **kwargs: data)  # else from a hub of data sets
    found = []
    for model in (directory, directory.with_name(f"{directory.name}-stock")):
        command(perplexity, "--model", model, "--trust-remote-code", "--batch-size", "4")
        found.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Perplexity: ")))
    assert found[0] == found[1]
