"""Several processes without a shared disk: they train one model, go on from the first one's files, share a start."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_reference.calibration import calibrate_model
from cuda_reference.data import MadeUpRows, stream, training_rows
from cuda_reference.train import LOG_NAME, ROUTERS_NAME, load_model
from parity_tests.tiny_training import byte_tokenizer, write_corpus, write_model
from parity_tests.training_worker import ROWS, start_recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    write_model(root / "model")
    write_corpus(root / "corpus")
    return root


@pytest.fixture(scope="module")
def ranks(home):
    """What each of two processes found. One launch serves all: it is what takes the time."""
    worker = Path(__file__).with_name("training_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    path = {"PYTHONPATH": str(worker.parents[1]), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, str(home), str(home)],
        env=os.environ | path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(home / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def equal(ours, theirs, atol=0.0):
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[k], theirs[k], rtol=0, atol=atol) for k in ours)


def test_both_ways_to_spread_a_run_agree(home, ranks):
    """Compared by loss and gradient: Adam makes whole steps of the rounding of tiny gradients."""
    whole, sharded = ranks[0]["whole"], ranks[0]["sharded"]
    assert {name: p.shape for name, p in whole.items()} == {name: p.shape for name, p in sharded.items()}
    logs = []
    for run in ("whole", "sharded"):
        with open(home / "disk0" / run / LOG_NAME, newline="") as file:
            logs.append(list(csv.DictReader(file)))
    for ours, theirs in zip(*logs, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-3)
    assert float(logs[0][0]["grad_norm"]) == pytest.approx(float(logs[1][0]["grad_norm"]), rel=1e-3)


def test_a_run_goes_on_from_the_files_of_the_first_process(ranks):
    first, second = ranks
    assert f"parts/{ROUTERS_NAME}" in first["files"]
    assert second["files"] == []
    assert not equal(first["stopped"], first["whole"])
    assert equal(first["resumed"], first["whole"])
    assert equal(second["resumed"], first["resumed"])


def test_an_error_of_the_first_process_is_raised_by_all(ranks):
    assert [rank["refusal"] for rank in ranks] == ["process 0 cannot"] * 2


def test_the_log_is_of_all_processes(ranks):
    assert [float(rank["loss"]) for rank in ranks] == [1.5, 1.5]
    assert all(torch.equal(rank["by_task"], torch.full((3, 2), 2.0)) for rank in ranks)


def test_a_start_is_that_of_one_process_with_the_same_rows(home, ranks, monkeypatch):
    monkeypatch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": home / "corpus"})
    recipe = start_recipe()
    model = load_model(str(home / "model"), recipe, torch.device("cpu"))
    rows = MadeUpRows(training_rows(recipe, byte_tokenizer()).maker, recipe.for_calibration())
    first = 2 * recipe.optimiser.steps
    calibrate_model(model, stream(rows, range(first, first + ROWS)), recipe)
    one = {name: p.detach() for name, p in model.routers().items()}
    assert equal(ranks[0]["calibrated"], one, atol=1e-3)
    assert equal(ranks[0]["calibrated"], ranks[1]["calibrated"])
