"""One training step: what its loss keeps for the gradient."""

from __future__ import annotations

import pytest
import torch

from cuda_reference import training
from cuda_reference.data_packing import TILE, pack
from cuda_reference.data_prompts import TASKS
from cuda_reference.objective import SparsityPenalty, logistic_noise, sample_nll
from cuda_reference.packed_model import PackedModel
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig
from parity_tests.test_data_packing import made
from parity_tests.tiny_training import tiny_model


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_the_nll_has_a_graph_only_where_it_is_minimised(kind, monkeypatch):
    found = []

    def watched(*args):
        found.append(sample_nll(*args))
        return found[-1]

    monkeypatch.setattr(training, "sample_nll", watched)
    config = FluxConfig(PatternConfig(block_size=16, sink_tokens=16, window_tokens=48), RouterConfig(pool_tokens=10))
    generator = torch.Generator().manual_seed(0)
    penalty = SparsityPenalty(dict.fromkeys(TASKS, 0.5), generator)
    model = PackedModel(tiny_model(), config)
    row = pack(made([100, 150]), TASKS, 10, 3 * TILE)
    loss, by_task = training.Loss(model, penalty, kind)(row, logistic_noise((2, 2), generator), 1.0, True)
    assert found[0].requires_grad == (kind == "nll")
    assert loss.requires_grad
    assert by_task[0].sum() == pytest.approx(float(found[0].detach().sum()), rel=1e-5)
