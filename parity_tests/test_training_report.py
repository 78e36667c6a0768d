"""The report over made-up results, and the comparison of two backends' routes."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import training_agreement, training_memory, training_report
from benchmarks.training_report import (
    chosen_forms,
    chunked,
    comparison,
    information,
    lost,
    lost_noise,
    merge,
    report,
    targets,
)

KINDS = ("single-magic", "single", "multi-keys", "code", "document")


def cell_summary(ratio=1.01, omega=0.75, **more):
    base = {"samples": 10, "nll": 2.0 * ratio, "nll_ratio": ratio, "nll_ratio_low": ratio - 0.01, "pairs": 0.5}
    base |= {"nll_ratio_high": ratio + 0.01, "omega": omega, "omega_std": 0.0, "exact": 0.5, "exact_base": 0.6}
    choice = {"accuracy": 0.89, "accuracy_base": 0.9, "accuracy_diff": -0.01, "accuracy_diff_bound": -0.009}
    return base | choice | more


def made(names=("seed0", "seed1"), lengths=(2048, 4096), text_omega=0.92, full=0.25):
    results = {"cells": {}, "routes": {}, "forms": {}, "generation": {}}
    cells = [("test", kind, n) for kind in KINDS for n in lengths] + [("ood", "single", n) for n in lengths]
    for split, kind, tokens in cells:
        is_text = kind in ("code", "document")
        cell = f"{split}/{kind}/{tokens}"
        omega = text_omega if is_text else 0.75
        results["cells"][cell] = {"full": cell_summary(1.0, 0.0)}
        results["routes"][cell] = {}
        for name in names:
            depth = [{"depth": 0.1, "samples": 2, "accuracy": 0.5, "accuracy_base": 1.0, "nll_ratio": 1.2}]
            results["cells"][cell][name] = cell_summary(omega=omega, by_depth=depth)
            shares = [1.0, full if is_text else 1.0, 0.0, 0.0]
            results["routes"][cell][name] = {"full_by_layer": shares, "entropy_bits": 0.0, "routes": []}
        results["cells"][cell]["seed0@512"] = cell_summary(1.03, routes_as_exact=0.8)
    results["generation"]["test/single/2048"] = {"seed0": {"samples": 4, "exact": 0.5, "as_teacher_forced": 1.0}}
    return results


def test_targets_hold_or_not():
    assert targets(made(), "seed0").count("**no**") == 0
    assert "0.170 | at least 0.150 | yes" in targets(made(), "seed0")
    worse = made(text_omega=0.8)
    worse["cells"]["test/single/4096"]["seed0"]["nll_ratio"] = 1.3
    text = targets(worse, "seed0")
    assert "worst cell | 1.300 | at most 1.020 | **no**" in text
    assert text.count("**no**") == 3


def test_what_is_lost_is_in_nats():
    assert lost(made(), "seed0") == pytest.approx(0.02)
    assert lost_noise(made(), "seed0") == pytest.approx(2.0 * 0.01 / 10**0.5)  # ten cells of 2 nats, 1 % either way
    line = next(line for line in comparison(made()).splitlines() if "seed0 " in line)
    assert line.split(" | ")[1:4] == ["0.750", "1.010", "-1.000"]


def test_collapsed_routing_says_nothing_about_the_task():
    assert information(made(full=1.0), "seed0") == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))
    within, about = information(made(full=0.0), "seed0")
    assert within == pytest.approx(0.0, abs=1e-9)
    assert about == pytest.approx(0.971 / 4, abs=1e-3)  # one layer of four differs, for two kinds of five


def test_the_number_of_facts_is_the_one_that_was_taken():
    shards = [
        {"forms": {"test/multi-keys/8192": {"keys": 0.23, "keys4": 0.45, "keys3": 0.7}}},
        {"forms": {"test/multi-keys/4096": {"keys": 0.9}}},
        {"forms": {"ood/multi-keys/4096": {"keys": 0.1, "keys4": 0.2, "keys3": 0.5, "keys2": 0.4}}},  # none is enough
    ]
    lines = chosen_forms(merge(shards)).splitlines()[2:]
    assert lines == [
        "| ood/multi-keys/4096 | 3 | 10: 0.10, 4: 0.20, 3: 0.50, 2: 0.40 |",
        "| test/multi-keys/4096 | 10 | 10: 0.90 |",
        "| test/multi-keys/8192 | 3 | 10: 0.23, 4: 0.45, 3: 0.70 |",
    ]


def test_shards_and_later_runs_are_put_together():
    first, second = made(("seed0",), (2048,)), made(("seed0",), (4096,))
    later = made(("other",), (2048,))
    for by in later["cells"].values():
        by.pop("seed0@512")
        by["full"]["nll"] = 7.0  # fewer samples
    whole = merge([first, second, later])
    assert set(whole["cells"]) == set(made()["cells"])
    assert set(whole["cells"]["test/single/2048"]) == {"full", "seed0", "seed0@512", "other"}
    assert whole["cells"]["test/single/2048"]["full"]["nll"] == 2.0
    first = copy.deepcopy(first)
    seed0 = first["cells"]["test/single/2048"]["seed0"]
    seed0["nll"] = 9.0
    with pytest.raises(ValueError, match=r"seed0 twice"):
        merge([whole, first])
    seed0["samples"] += 1
    assert merge([whole, first])["cells"]["test/single/2048"]["seed0"]["nll"] == 9.0
    assert merge([first, whole])["cells"]["test/single/2048"]["seed0"]["nll"] == 9.0


def test_contenders_are_compared_on_the_same_samples():
    few, many, alone = made(), made(("seed0",)), made(("seed0",), (512,))
    for by in many["cells"].values():
        by.pop("seed0@512")
        by["full"]["samples"] = by["seed0"]["samples"] = 1000
        by["seed0"]["nll_ratio"] = 1.5
    compared = ("full", "seed0", "seed1")
    for parts in ([few, many, alone], [alone, many, few]):
        same = merge(parts, same=compared)
        assert set(same["cells"]) == set(few["cells"])  # 512 tokens: seed0 alone
        assert all({s["samples"] for s in by.values()} == {10} for by in same["cells"].values())
        assert {s["nll_ratio"] for by in same["cells"].values() for name, s in by.items() if name == "seed0"} == {1.01}
        assert set(same["routes"]["test/code/2048"]) == {"seed0", "seed1"}
        both = merge(parts, same=("full", "seed0"))["cells"]["test/single/2048"]
        assert {name: s["samples"] for name, s in both.items()} == {"full": 1000, "seed0": 1000}
        assert merge(parts)["cells"]["test/single/2048"]["seed0"]["nll_ratio"] == 1.5
        assert "| test/code/2048 | 512 | 10 | 0.800 | 1.010 | 1.030 |" in chunked(parts, "seed0")
    assert merge([few, many], same=("seed0", "nobody"))["cells"] == {}


def test_the_command_writes_table_and_plots(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    (tmp_path / "a.json").write_text(json.dumps(made()))
    training_report.main(
        [str(tmp_path / "a.json"), "--ships", "seed0", "--seeds", "seed0", "seed1", "--out", str(tmp_path)]
    )
    text = (tmp_path / "training_table.md").read_text()
    assert text == report([made()], "seed0", ["seed0", "seed1"])
    assert "seed0, seed1: same decisions | 1.000" in text
    assert "| test/code/2048 | 512 | 10 | 0.800 | 1.010 | 1.030 |" in text
    for plot in ("training_omega.png", "training_quality.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def kept(gaps, nll=1.0):
    return {"nll": nll, "chosen": 0, "full": [float(g > 0) for g in gaps], "gaps": list(gaps)}


def test_agreement_lists_what_differs_and_what_nearly_ties(tmp_path):
    ours, theirs = ({"settings": {}, "scores": {"test/icl/9": {"x": []}}} for _ in range(2))
    ours["scores"]["test/icl/9"]["x"] = [kept([1.0, -0.01, 3.0]), kept([0.001, -1.0, -2.0])]
    theirs["scores"]["test/icl/9"]["x"] = [kept([1.0, 0.01, 3.0], 1.5), kept([0.002, -1.0, -2.1])]
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, result in zip(paths, (ours, theirs), strict=True):
        path.write_text(json.dumps(result))
    theirs["scores"]["test/code/9"] = ours["scores"]["test/icl/9"]  # what one side lacks is left out
    paths[1].write_text(json.dumps(theirs))
    sides = ["--ours", str(paths[0]), "--theirs", str(paths[1])]
    training_agreement.main([*sides, "--out", str(tmp_path / "c.json")])
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["decisions"], found["equal"]) == (6, 5 / 6)
    assert [(d["sample"], d["layer"]) for d in found["differing"]] == [(0, 1)]
    assert [(d["sample"], d["layer"]) for d in found["near_ties"]] == [(1, 0)]
    assert found["largest_gap_difference"] == pytest.approx(0.1)
    assert found["cells"]["test/icl/9"]["x"] == {"samples": 2, "equal": 5 / 6, "largest_nll_difference": 0.5}
    with pytest.raises(ValueError, match="the same kept scores"):
        training_agreement.compare(ours, {"scores": {}})


def test_memory_is_measured_beside_the_arithmetic(tmp_path):
    for loss in ("nll", "kl"):
        arguments = ["--shape", "tiny", "--tokens", "512", "--steps", "1", "--device", "cpu", "--loss", loss]
        training_memory.main([*arguments, "--out", str(tmp_path / f"{loss}.json")])
        found = json.loads((tmp_path / f"{loss}.json").read_text())
        assert (found["tokens"], found["ranks"], len(found["seconds"])) == (512, 1, 1)
        assert found["loss"] > 0


def test_arithmetic_of_an_8b_model_at_64k():
    shape = training_memory.SHAPES["llama-8b"]
    whole, sharded = (training_memory.arithmetic(shape, 65536, ranks) for ranks in (1, 8))
    assert whole["weights"] == pytest.approx(16.1, abs=0.1)  # 8.03 billion parameters
    assert whole["layer inputs"] == pytest.approx(32 * 65536 * 4096 * 2 / 1e9, abs=0.01)
    assert sharded["weights"] < 3.0
    assert sharded["sum"] < whole["sum"] < 80
