"""Evaluation: paired summaries, policies, static masks, and a whole run on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cuda_reference import baselines, objective, scoring, search
from cuda_reference.cells import default_cells, shard_of
from cuda_reference.checkpoints import save_routers
from cuda_reference.contenders import policy_of, router_contenders, static_contender
from cuda_reference.data_prompts import Sample
from cuda_reference.evaluate import build_parser, contenders_of, main
from cuda_reference.model import generate
from cuda_reference.packed_model import ATTENTION_NAME, PackedModel
from cuda_reference.recipe import load_recipe
from cuda_reference.scoring import Score, rows_of, score
from cuda_reference.summaries import difference_bounds, equal_routes, route_statistics, summary
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig
from parity_tests.test_data_packing import made
from parity_tests.tiny_training import tiny_model, write_corpus, write_model

CONFIG = FluxConfig(PatternConfig(block_size=16, sink_tokens=16, window_tokens=48), RouterConfig(pool_tokens=10))


def scores(nlls, chosen, omega=0.5):
    return [Score(n, c, c == 0, omega, (1.0, 0.0)) for n, c in zip(nlls, chosen, strict=True)]


def test_summary_pairs_the_samples():
    samples = [Sample(np.arange(5), 3, "single", (np.array([3, 4]), np.array([1, 2]))) for _ in range(4)]
    ours, base = scores([1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1]), scores([1.0, 1.0, 3.0, 3.0], [0, 0, 0, 1], 0.0)
    found = summary(samples, ours, base)
    assert (found["samples"], found["nll"], found["nll_ratio"]) == (4, 2.5, 2.5 / 2)
    assert (found["accuracy"], found["accuracy_diff"], found["omega"]) == (0.5, -0.25, 0.5)
    assert (found["exact"], found["exact_base"]) == (0.5, 0.75)
    assert found["accuracy_diff_low"] <= found["accuracy_diff_bound"] <= -0.25 <= found["accuracy_diff_high"] < 0.5
    assert found["nll_ratio_low"] < 1.25 < found["nll_ratio_high"]


def test_bounds_are_those_of_the_paired_difference():
    difference = np.repeat([-1.0, 0.0, 1.0], [40, 940, 20])
    found = difference_bounds(difference)
    spread = difference.std() / np.sqrt(1000)
    assert found["accuracy_diff"] == pytest.approx(-0.02)
    assert found["accuracy_diff_bound"] == pytest.approx(-0.02 - 1.645 * spread, abs=0.1 * spread + 0.0005)
    assert found["accuracy_diff_low"] == pytest.approx(-0.02 - 1.96 * spread, abs=0.1 * spread + 0.0005)
    for n in (50, 1000):  # no pair differs: z^2 / (n + z^2)
        alike = difference_bounds(np.zeros(n))
        assert alike["accuracy_diff_bound"] == pytest.approx(-(1.645**2) / (n + 1.645**2), rel=1e-3)
        assert alike["accuracy_diff_high"] == pytest.approx(1.96**2 / (n + 1.96**2), rel=1e-3)
        assert alike["accuracy_diff_low"] == pytest.approx(-alike["accuracy_diff_high"])
    turned = difference_bounds(-difference)
    assert turned["accuracy_diff_high"] == pytest.approx(-found["accuracy_diff_low"])
    all_lost = difference_bounds(-np.ones(10))
    assert all_lost["accuracy_diff_low"] == pytest.approx(-1.0)
    assert -1 < all_lost["accuracy_diff_high"] < -0.4


def test_the_bound_is_below_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    for lost, gained in ((0.02, 0.01), (0.05, 0.05), (0.004, 0.004)):
        draws = rng.choice([-1.0, 0.0, 1.0], p=[lost, 1 - lost - gained, gained], size=(400, 1000))
        right = np.mean([difference_bounds(draw)["accuracy_diff_bound"] <= gained - lost for draw in draws])
        assert 0.92 <= right <= 0.98


def test_summary_counts_pairs_and_depths():
    tokens = np.arange(4096)
    samples = [Sample(tokens, 4090, "single", (tokens[4090:], tokens[:4]), depth) for depth in (0.05, 0.1, 0.95)]
    ours, base = scores([1.0, 2.0, 3.0], [0, 1, 0], 0.75), scores([1.0, 1.0, 3.0], [0, 0, 1], 0.0)
    found = summary(samples, ours, base, PatternConfig(block_size=64, sink_tokens=64, window_tokens=512))
    dense = 4096 * 4097 / 2
    assert 0.25 + 0.75 * 512 * 4096 / dense * 0.9 < found["pairs"] < 0.25 + 0.75 * 640 * 4096 / dense
    triangle = PatternConfig("triangle", block_size=64, sink_tokens=64, window_tokens=512, last_tokens=128)
    more = summary(samples, ours, base, triangle)["pairs"] - found["pairs"]
    assert more == pytest.approx(0.75 * 128 * (4026 - 576) / dense, rel=0.02)
    first, last = found["by_depth"]
    assert (first["depth"], first["samples"], first["accuracy"], first["accuracy_base"]) == (0.1, 2, 0.5, 1.0)
    assert (last["samples"], last["accuracy"], last["accuracy_base"], last["nll_ratio"]) == (1, 1.0, 0.0, 1.0)


def test_route_entropy_is_zero_for_equal_routes_and_one_for_even_ones():
    alike, even = scores([1.0] * 4, [0] * 4), [Score(1.0, 0, True, 0.5, (float(i % 2),)) for i in range(4)]
    assert route_statistics(alike)["entropy_bits"] == pytest.approx(0.0, abs=1e-6)
    found = route_statistics(even, shown=2)
    assert found == {"full_by_layer": [0.5], "entropy_bits": pytest.approx(1.0), "routes": ["s", "F"]}
    assert equal_routes(even, even) == 1.0
    assert equal_routes(even, even[::-1]) == 0.0


def test_static_masks_have_their_number_of_full_layers():
    for name in ("interleaved", "first", "last"):
        for full in (1, 8, 29):
            assert int(policy_of(f"{name}:{full}", 30).sum()) == full
    assert policy_of("first:2", 4).tolist() == [True, True, False, False]
    assert policy_of("last:1", 4).tolist() == [False, False, False, True]
    assert policy_of("0,2-3", 5).tolist() == [True, False, True, True, False]
    assert policy_of("sparse", 5) == "sparse"
    assert policy_of("[0, 3]", 5).tolist() == [True, False, False, True, False]


def test_static_contenders_have_names_and_patterns():
    found = static_contender("greedy=[0, 2]@triangle", 3, CONFIG)
    assert (found.name, found.policy.tolist()) == ("greedy", [True, False, True])
    assert (found.config.pattern.name, found.config.pattern.window_tokens) == ("triangle", 48)
    assert static_contender("first:1", 3, CONFIG).name == "first:1"
    sized = static_contender("sparse@window_tokens:96,sink_tokens:0", 3, CONFIG).config.pattern
    assert (sized.name, sized.window_tokens, sized.sink_tokens, sized.block_size) == ("streaming", 96, 0, 16)
    for text, message in (("auto", "--routers"), ("sparse@ring", "a pattern"), ("sparse@window_tokens", "a pattern")):
        with pytest.raises(ValueError, match=message):
            static_contender(text, 3, CONFIG)


def test_router_files_bring_their_settings(tmp_path):
    recipe = replace(load_recipe("smollm2", ['pattern.name="triangle"']), by_head=True, start={})
    path = tmp_path / "x.safetensors"
    save_routers(path, {"a": torch.zeros(1)}, recipe, torch.float16)
    plain, chunked = router_contenders(f"mine={path}", CONFIG, [512])
    assert (plain.name, plain.by_head, plain.chunk_tokens) == ("mine", True, 0)
    assert plain.config.pattern == recipe.pattern
    assert (chunked.name, chunked.chunk_tokens) == ("mine@512", 512)
    assert (plain.config.pattern.name, chunked.config.pattern.name) == ("triangle", "streaming")
    (wider,) = router_contenders(f"wider={path}@window_tokens:4096", CONFIG)
    odd = tmp_path / "lr=1@2.safetensors"
    odd.write_bytes(path.read_bytes())
    for text, name in ((str(odd), "auto"), (f"{odd}@window_tokens:4096", "auto"), (f"mine={odd}", "mine")):
        (found,) = router_contenders(text, CONFIG)
        assert (found.name, found.routers) == (name, odd)
    with pytest.raises(ValueError, match=r"different names .* got \['auto'\]"):
        contenders_of(build_parser().parse_args(["--model", "", "--out", "x", "--routers", str(path), str(odd)]), 2)
    assert (wider.routers, wider.config.pattern) == (path, replace(plain.config.pattern, window_tokens=4096))
    for missing in (tmp_path / "y", tmp_path / "y@triangle"):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*y$"):
            router_contenders(str(missing), CONFIG)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="no whole safetensors"):
        router_contenders(str(path), CONFIG)


def test_cells_are_shared_out():
    cells = default_cells([2048, 8192], ["single", "multi-keys", "document"])
    assert len(cells) == 2 * (3 + 2)
    assert cells[0].name == "test/single/8192"
    assert {c.name for i in range(3) for c in shard_of(cells, f"{i}/3")} == {c.name for c in cells}
    assert [c.is_choice for c in cells[:3]] == [True, True, False]
    with pytest.raises(ValueError, match="shard like"):
        shard_of(cells, "4/4")


@pytest.mark.parametrize("text", ["first:0", "first:31", "middle:3", "30", "x"])
def test_bad_policies_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        policy_of(text, 30)


def test_greedy_search_finds_the_layers_that_matter():
    worth = torch.tensor([5.0, 1.0, 0.0, 7.0, 0.5, 3.0])
    mask = baselines.greedy(6, 3, lambda mask: float(worth[~mask].sum()))
    assert mask.nonzero().flatten().tolist() == [0, 3, 5]


def test_the_first_round_may_drop_many_layers():
    worth = torch.tensor([5.0, 1.0, 0.0, 7.0, 0.5, 3.0])
    masks = list(baselines.greedy_path(6, 2, lambda mask: float(worth[~mask].sum()), drop=3))
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[0, 3, 5], [0, 3]]


def test_the_search_finds_what_each_count_of_layers_costs(tmp_path, monkeypatch):
    monkeypatch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": tmp_path / "corpus"})
    write_corpus(tmp_path / "corpus")
    write_model(tmp_path / "model", layers=3)
    out = tmp_path / "masks.json"
    arguments = ["--model", str(tmp_path / "model"), "--out", str(out), "--device", "cpu", "--samples", "1"]
    arguments += ["--tasks", "single", "--fewest", "1", "--shortest", "1700", "--row-tokens", "2048"]
    sizes = ["data.text_chars=200000", "pattern.window_tokens=256", "data.longest_tokens=1800"]
    search.main([*arguments, "--set", *sizes])
    found = json.loads(out.read_text())
    assert [len(found["masks"][count]) for count in ("2", "1")] == [2, 1]
    assert set(found["masks"]["1"]) < set(found["masks"]["2"])
    assert len(found["alone"]) == 3
    assert min(found["alone"]) == pytest.approx(found["divergence"]["2"])
    assert found["nll_ratio"]["1"] == pytest.approx(1.0, abs=0.2)


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


def test_positions_are_scored_in_pieces_as_in_one(model, monkeypatch):
    samples, pieces = made([150, 260, 90, 200], candidates=4), []
    whole = score(model, samples, "auto", 1024)

    def noted(logits, *args, **options):
        pieces.append(len(logits))
        return cross_entropy(logits, *args, **options)

    cross_entropy = objective.functional.cross_entropy
    monkeypatch.setattr(objective.functional, "cross_entropy", noted)
    monkeypatch.setattr(scoring, "target_nll", partial(objective.target_nll, rows=7))
    assert score(model, samples, "auto", 1024) == whole
    assert set(pieces[:-1]) == {7}
    assert 0 < pieces[-1] < 7


def test_policies_route(model):
    samples = made([150, 260], candidates=3)
    assert [s.omega for s in score(model, samples, "full", 1024)] == [0.0, 0.0]
    assert [s.omega for s in score(model, samples, "sparse", 1024)] == [1.0, 1.0]
    mask = torch.tensor([True, False, True])
    assert [s.full for s in score(model, samples, mask, 1024)] == [(1.0, 0.0, 1.0)] * 2
    fresh = score(model, samples, "auto", 1024)
    assert [s.omega for s in fresh] == [0.0, 0.0]
    assert [s.gaps for s in fresh] == [pytest.approx((4.5, 4.5, 4.5))] * 2
    chunked = score(model, samples, "auto", 1024, chunk_tokens=128)
    assert [s.full for s in chunked] == [s.full for s in fresh]
    with pytest.raises(ValueError, match="policy must be"):
        score(model, samples, "most", 1024)


def test_exact_is_what_greedy_decoding_says(model):
    prompt = made([150])[0].tokens
    model.backbone.set_attn_implementation("flux")
    said = generate(model.backbone, prompt.tolist(), 4, route="full").tokens
    model.backbone.set_attn_implementation(ATTENTION_NAME)
    right = Sample(np.concatenate([prompt, said]), 150, "single", (np.array(said), np.array([1, 2])))
    wrong = Sample(np.concatenate([prompt, [*said[:3], said[3] ^ 1]]), 150, "single")
    assert [s.exact for s in score(model, [right, wrong], "full", 1024)] == [True, False]


def test_the_command_writes_every_cell(tmp_path, monkeypatch):
    monkeypatch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": tmp_path / "corpus"})
    write_corpus(tmp_path / "corpus")
    write_model(tmp_path / "model")
    out = tmp_path / "results.json"
    arguments = ["--model", str(tmp_path / "model"), "--out", str(out), "--device", "cpu", "--samples", "1"]
    arguments += ["--lengths", "1700", "--row-tokens", "2048", "--policies", "first:1", "full", "--generate", "1"]
    arguments += ["--kinds", "single", "multi-keys", "icl"]
    routers = PackedModel(tiny_model(), CONFIG).routers()
    save_routers(tmp_path / "r.safetensors", routers, load_recipe("smollm2"), torch.float32)
    arguments += ["--routers", f"mine={tmp_path / 'r.safetensors'}", "--chunks", "512", "--keep-scores"]
    settings = ["--set", "data.text_chars=200000", "pattern.window_tokens=256"]
    whole = [*arguments, "--text-cache", str(tmp_path / "text.npz"), *settings]
    with pytest.raises(SystemExit, match=r"before \['mine', 'mine@512', 'first:1'\]"):
        main([*whole, "--seconds", "0"])
    assert not out.exists()
    main(whole)
    results = json.loads(out.read_text())
    cells = results["cells"]
    kinds = {"test/single/1700", "test/multi-keys/1700", "test/icl/1700", "ood/single/1700", "ood/multi-keys/1700"}
    assert cells.keys() == kinds
    assert all(set(cell) == {"full", "first:1", "mine", "mine@512"} for cell in cells.values())
    assert cells["test/single/1700"]["first:1"]["omega"] == 0.5
    assert cells["test/single/1700"]["mine@512"]["routes_as_exact"] == 1.0
    assert set(results["forms"]["test/multi-keys/1700"]) <= {"keys", "keys4", "keys3", "keys2"}
    assert results["generation"]["test/single/1700"]["mine"]["as_teacher_forced"] == 1.0
    assert len(results["scores"]["test/icl/1700"]["mine"][0]["gaps"]) == 2
    kept = results["scores"]["test/single/1700"]
    assert set(kept) == {"first:1", "mine", "mine@512"}
    assert [s["nll"] for s in kept["first:1"]] == [cells["test/single/1700"]["first:1"]["nll"]]
    assert [s["chosen"] == 0 for s in kept["mine"]] == [cells["test/single/1700"]["mine"]["accuracy"] == 1.0]
    monkeypatch.setattr("cuda_reference.data_text.default_roots", dict)  # the second run reads the cache
    main([*arguments[:-5], "--text-cache", str(tmp_path / "text.npz"), "--shard", "2/5", "--no-base", *settings])
    assert json.loads(out.read_text())["cells"].keys() == {"test/icl/1700"}
    with pytest.raises(ValueError, match="needs --routers"):
        main([*arguments[:-5], "--policies", "auto"])
