"""`flux_mlx.evaluate` with either backend: the same samples, routes and scores."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.training_agreement import compare
from cuda_reference.checkpoints import save_routers
from cuda_reference.evaluate import main
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import load_recipe
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig
from parity_tests.tiny_training import tiny_model, write_corpus, write_model

SETTINGS = ["data.text_chars=200000", "pattern.window_tokens=256"]
KINDS = ("single", "document")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of both backends, with routers that take both routes."""
    root = tmp_path_factory.mktemp("backends")
    write_corpus(root / "corpus")
    write_model(root / "model", layers=3)
    recipe = load_recipe("smollm2", SETTINGS)
    torch.manual_seed(1)
    routers = PackedModel(tiny_model(3), FluxConfig(recipe.pattern, RouterConfig(init_bias=0.0))).routers()
    for name, parameter in routers.items():
        if name.endswith("head.4.weight"):
            torch.nn.init.normal_(parameter, std=30.0)
    save_routers(root / "r.safetensors", routers, recipe, torch.float32)
    common = ["--model", str(root / "model"), "--routers", f"mine={root / 'r.safetensors'}", "--chunks", "512"]
    common += ["--policies", "first:1", "--lengths", "1700", "--samples", "1", "--kinds", *KINDS, "--keep-scores"]
    common += ["--text-cache", str(root / "text.npz"), "--generate", "1", "--set", *SETTINGS]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": root / "corpus"})
        for backend in ("torch", "mlx"):
            out = root / f"{backend}.json"
            main(["--backend", backend, "--device", "cpu", "--row-tokens", "2048", "--out", str(out), *common])
            found[backend] = json.loads(out.read_text())
    return found


def test_routes_are_equal(results):
    found = compare(results["mlx"], results["torch"])
    assert found["decisions"] == (len(KINDS) + 1) * 2 * 3  # one kind out of domain too; exact and by chunks
    assert found["differing"] == []
    assert found["largest_gap_difference"] < 1e-3
    full = [f for cell in results["mlx"]["scores"].values() for by in cell.values() for s in by for f in s["full"]]
    assert set(full) == {0.0, 1.0}


def test_scores_are_equal(results):
    for cell, by in results["torch"]["cells"].items():
        assert by.keys() == results["mlx"]["cells"][cell].keys() == {"full", "mine", "mine@512", "first:1"}
        for name, torch_found in by.items():
            mlx_found = results["mlx"]["cells"][cell][name]
            for value in ("nll", "omega", "exact", "accuracy"):
                ours, theirs = (part.get(value, -1.0) for part in (mlx_found, torch_found))
                assert ours == pytest.approx(theirs, rel=1e-4), (cell, name, value)
    assert results["torch"]["generation"] == results["mlx"]["generation"]


def test_heads_are_refused_by_mlx(tmp_path):
    from cuda_reference.contenders import Contender
    from cuda_reference.engines import MlxEngine

    engine = MlxEngine.__new__(MlxEngine)
    with pytest.raises(ValueError, match="decide for heads"):
        engine.use(Contender("x", "auto", FluxConfig(PatternConfig()), tmp_path / "r", by_head=True))
