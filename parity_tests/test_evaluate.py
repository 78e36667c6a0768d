"""Evaluation: paired summaries, policies, static masks, and a whole run on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cuda_reference import baselines
from cuda_reference.data_prompts import Sample
from cuda_reference.evaluate import main, policy_of, route_statistics, summary
from cuda_reference.packed_model import PackedModel
from cuda_reference.scoring import Score, rows_of, score
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig
from parity_tests.test_data_packing import made
from parity_tests.tiny_training import tiny_model, write_corpus, write_model

CONFIG = FluxConfig(PatternConfig(block_size=16, sink_tokens=16, window_tokens=48), RouterConfig(pool_tokens=10))


def scores(nlls, chosen, omega=0.5):
    return [Score(n, c, omega, (1.0, 0.0), 1.0) for n, c in zip(nlls, chosen, strict=True)]


def test_summary_pairs_the_samples():
    samples = [Sample(np.arange(5), 3, "single", (np.array([3, 4]), np.array([1, 2]))) for _ in range(4)]
    ours, base = scores([1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1]), scores([1.0, 1.0, 3.0, 3.0], [0, 0, 0, 1], 0.0)
    found = summary(samples, ours, base)
    assert (found["samples"], found["nll"], found["nll_ratio"]) == (4, 2.5, 2.5 / 2)
    assert (found["accuracy"], found["accuracy_diff"], found["omega"]) == (0.5, -0.25, 0.5)
    half = 1.96 * np.std([0, -1, 0, 0]) / 2
    assert found["accuracy_diff_low"] == pytest.approx(-0.25 - half)
    assert found["accuracy_diff_high"] == pytest.approx(-0.25 + half)


def test_route_entropy_is_zero_for_equal_routes_and_one_for_even_ones():
    alike, even = scores([1.0] * 4, [0] * 4), [Score(1.0, 0, 0.5, (float(i % 2),), 1.0) for i in range(4)]
    assert route_statistics(alike)["entropy_bits"] == pytest.approx(0.0, abs=1e-6)
    assert route_statistics(even) == {"full_by_layer": [0.5], "entropy_bits": pytest.approx(1.0)}


def test_static_masks_have_their_number_of_full_layers():
    for name in ("interleaved", "first", "last"):
        for full in (1, 8, 29):
            assert int(policy_of(f"{name}:{full}", 30).sum()) == full
    assert policy_of("first:2", 4).tolist() == [True, True, False, False]
    assert policy_of("last:1", 4).tolist() == [False, False, False, True]
    assert policy_of("0,2-3", 5).tolist() == [True, False, True, True, False]
    assert policy_of("sparse", 5) == "sparse"


@pytest.mark.parametrize("text", ["first:0", "first:31", "middle:3", "30", "x"])
def test_bad_policies_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        policy_of(text, 30)


def test_greedy_search_finds_the_layers_that_matter():
    worth = torch.tensor([5.0, 1.0, 0.0, 7.0, 0.5, 3.0])
    mask = baselines.greedy(6, 3, lambda mask: float(worth[~mask].sum()))
    assert mask.nonzero().flatten().tolist() == [0, 3, 5]


def test_swaps_leave_a_trap_of_the_greedy_search():
    def loss(mask):  # layers 0 and 1 matter together; alone each looks worthless
        return 10.0 * (not mask[0]) * 0.1 - 5.0 * bool(mask[2] and mask[3]) + 0.5 * (not mask[1])

    plain, swapped = (baselines.greedy(4, 2, loss, swaps) for swaps in (0, 4))
    assert loss(swapped) <= loss(plain)
    assert swapped.nonzero().flatten().tolist() == [2, 3]


def test_rows_take_whole_samples():
    samples = made([100, 200, 300, 120, 500])
    rows = list(rows_of(samples, 512))
    assert [i for row in rows for i in row] == [0, 1, 2, 3, 4]
    assert len(rows) == 3
    with pytest.raises(ValueError, match="sample 4 needs 512"):
        list(rows_of(samples, 384))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PackedModel(tiny_model(layers=3), CONFIG)


def test_scores_do_not_depend_on_the_rows(model):
    samples = made([150, 260, 90, 200], candidates=4)
    wide, narrow = (score(model, samples, "auto", row_tokens) for row_tokens in (1024, 384))
    assert [s.chosen for s in wide] == [s.chosen for s in narrow]
    assert [s.nll for s in wide] == pytest.approx([s.nll for s in narrow], rel=1e-4)


def test_policies_route(model):
    samples = made([150, 260], candidates=3)
    assert [s.omega for s in score(model, samples, "full", 1024)] == [0.0, 0.0]
    assert [s.omega for s in score(model, samples, "sparse", 1024)] == [1.0, 1.0]
    mask = torch.tensor([True, False, True])
    assert [s.full for s in score(model, samples, mask, 1024)] == [(1.0, 0.0, 1.0)] * 2
    fresh = score(model, samples, "auto", 1024)
    assert [s.omega for s in fresh] == [0.0, 0.0]
    assert [s.margin for s in fresh] == pytest.approx([4.5, 4.5])
    with pytest.raises(ValueError, match="policy must be"):
        score(model, samples, "most", 1024)


def test_the_command_writes_every_cell(tmp_path, monkeypatch):
    monkeypatch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": tmp_path / "corpus"})
    write_corpus(tmp_path / "corpus")
    write_model(tmp_path / "model")
    out = tmp_path / "results.json"
    arguments = ["--model", str(tmp_path / "model"), "--out", str(out), "--device", "cpu", "--samples", "1"]
    arguments += ["--lengths", "1700", "--row-tokens", "2048", "--policies", "first:1", "full"]
    main([*arguments, "--set", "data.text_chars=200000", "pattern.window_tokens=256"])
    cells = json.loads(out.read_text())["cells"]
    assert {
        "test/single-magic/1700",
        "test/multi-hops/1700",
        "test/document/1700",
        "ood/multi-keys/1700",
    } <= cells.keys()
    assert all(set(cell) == {"full", "first:1"} for cell in cells.values())
    assert cells["test/single/1700"]["first:1"]["omega"] == 0.5
    with pytest.raises(SystemExit, match="needs --routers"):
        main([*arguments[:-2], "auto"])
