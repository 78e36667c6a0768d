"""The study of pool sizes: it reads what the routers read, and says how often they decide as their masks say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import training_pools
from benchmarks.training_pools import Pools
from cuda_reference.calibration import pooled_queries
from cuda_reference.data_packing import pack
from cuda_reference.data_prompts import RETRIEVAL, TASKS, Sample
from cuda_reference.recipe import load_recipe
from cuda_reference.train import load_model
from parity_tests.tiny_training import write_corpus, write_model


def test_it_pools_what_the_routers_pool(tmp_path):
    write_model(tmp_path / "model", layers=3)
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(1, 90, n, dtype=np.int32), n - 4, "single") for n in (150, 260)]
    recipe = load_recipe("smollm2", ["start={}", "router.pool_tokens=20"])
    model = load_model(str(tmp_path / "model"), recipe, torch.device("cpu"))
    packed = pack(samples, ["single"], 20, 768)
    expected, _ = pooled_queries(model, packed)
    pools = Pools(str(tmp_path / "model"), [0, 2], [20, 50])
    for i, sample in enumerate(samples):
        found = pools.of(sample)
        assert found.shape == (2, 2, expected[0].shape[1])
        for row, layer in enumerate((0, 2)):
            torch.testing.assert_close(found[0, row], expected[layer][i], rtol=1e-4, atol=1e-5)


def test_the_command_writes_a_row_for_each_size(tmp_path, monkeypatch):
    monkeypatch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": tmp_path / "corpus"})
    write_corpus(tmp_path / "corpus")
    write_model(tmp_path / "model", layers=3)
    masks = [f"start.{task}={[0, 1] if task in RETRIEVAL else [1]}" for task in TASKS]
    arguments = ["--model", str(tmp_path / "model"), "--json", str(tmp_path / "p.json"), "--sizes", "8", "40"]
    arguments += ["--samples", "12", "--others", "4", "--lengths", "1700", "1800"]
    training_pools.main([*arguments, "--set", "start_layers=3", "data.text_chars=200000", *masks])
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["layers"] == [0]
    assert [row["pool_tokens"] for row in found["rows"]] == [8, 40]
    for row in found["rows"]:
        assert row["train"] == pytest.approx(1.0, abs=0.3)
        assert 0.0 <= min(row["test"], row["ood"]) <= max(row["test"], row["ood"]) <= 1.0
