"""Whole runs on a tiny model: resume after a kill, files."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from cuda_reference.checkpoints import checkpoints, load_checkpoint, load_routers, model_fingerprint, save_checkpoint
from cuda_reference.data_prompts import TASKS
from cuda_reference.train import LOG_NAME, ROUTERS_NAME, STOPPED, UNFINISHED_NAME, main
from flux_mlx.spec import RouterConfig
from parity_tests.tiny_training import STEPS, tiny_model, write_corpus, write_model
from parity_tests.tiny_training import training_arguments as arguments

LAUNCH = """
import sys
from pathlib import Path
from cuda_reference import data_text
root = Path(sys.argv.pop(1))
data_text.default_roots = lambda: {"site": root}
from cuda_reference.train import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    write_model(root / "model")
    write_corpus(root / "corpus")
    (root / "launch.py").write_text(LAUNCH)
    return root


@pytest.fixture
def local_text(home, monkeypatch):
    monkeypatch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": home / "corpus"})


def read_log(out):
    with open(out / LOG_NAME, newline="") as file:
        return list(csv.DictReader(file))


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def whole(home):
    """The routers of an uninterrupted run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": home / "corpus"})
        main(arguments(home, home / "whole", "--save-every", "2"))
    return home / "whole"


def test_a_run_leaves_routers_log_and_checkpoints(whole):
    routers = load_file(whole / ROUTERS_NAME)
    shapes = {name: tuple(v.shape) for name, v in routers.items() if name.startswith("model.layers.1.")}
    prefix = "model.layers.1.self_attn.router."
    assert shapes == {prefix + name: shape for name, shape in RouterConfig.parameter_shapes(8).items()}
    assert routers["model.layers.0.self_attn.router.head.4.weight"].abs().max() > 0
    assert [step for step, _ in checkpoints(whole)] == [STEPS, STEPS - 1]
    rows = read_log(whole)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(float(row["loss"]) > 0 for row in rows)
    assert any(float(rows[-1][f"lambda1_{task}"]) > float(rows[0][f"lambda1_{task}"]) for task in TASKS)


def test_checkpoints_hold_no_frozen_weights(whole):
    _, state = load_checkpoint(whole)
    assert all(".router." in name or name.startswith("penalty.") for name in state["model"])


def test_a_stopped_run_says_so_and_goes_on_to_the_same_routers(home, local_text, whole, capsys):
    out = home / "stopped"
    assert main(arguments(home, out, "--stop-after", "0")) == STOPPED
    assert f"stopped after step 1 of {STEPS}: the same command goes on" in capsys.readouterr().err
    assert [step for step, _ in checkpoints(out)] == [1]
    assert load_file(out / UNFINISHED_NAME).keys() == load_file(whole / ROUTERS_NAME).keys()
    assert not (out / ROUTERS_NAME).exists()
    assert main(arguments(home, out)) == 0
    assert not (out / UNFINISHED_NAME).exists()
    ours, theirs = load_file(out / ROUTERS_NAME), load_file(whole / ROUTERS_NAME)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_killed_after_its_last_checkpoint_still_writes_its_routers(home, local_text, whole):
    routers = load_file(whole / ROUTERS_NAME)
    (whole / ROUTERS_NAME).unlink()
    assert main(arguments(home, whole)) == 0
    again = load_file(whole / ROUTERS_NAME)
    assert all(torch.equal(again[name], routers[name]) for name in routers)


def test_finished_routers_without_their_checkpoint_are_left_alone(home, local_text, whole):
    out = home / "alone"
    out.mkdir()
    (out / ROUTERS_NAME).write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=f"expected a checkpoint of step {STEPS} beside the {ROUTERS_NAME}"):
        main(arguments(home, out))
    assert (out / ROUTERS_NAME).read_bytes() == b"somebody's"


def test_a_killed_run_goes_on_to_the_same_routers(home, whole):
    out = home / "killed"
    command = [
        sys.executable,
        str(home / "launch.py"),
        str(home / "corpus"),
        *arguments(home, out, "--save-every", "1"),
    ]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoints(out)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= checkpoints(out)[0][0] <= STEPS
    subprocess.run(command, env=environment(), check=True, stderr=subprocess.DEVNULL)
    ours, theirs = load_file(out / ROUTERS_NAME), load_file(whole / ROUTERS_NAME)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_another_recipe_does_not_take_over_a_run(home, local_text, whole):
    with pytest.raises(ValueError, match="another recipe"):
        main([*arguments(home, whole), "optimiser.clip=1.0"])


def test_other_circumstances_do_not_take_over_a_run(home, local_text, whole, tmp_path):
    """The order of the targets is that of the multipliers; what a checkpoint does not note, it may not have had."""
    step, state = load_checkpoint(whole)

    def goes_on(**changed):
        save_checkpoint(tmp_path, step, state | changed)
        return main(arguments(home, tmp_path))

    assert goes_on() == 0
    recipe, run, model = state["recipe"], state["run"], state["model"]
    with pytest.raises(ValueError, match="another order"):
        goes_on(recipe=recipe | {"targets": dict(reversed(recipe["targets"].items()))})
    for name, other in (("processes", 8), ("model", "0" * 16), ("data", ["0" * 16])):
        with pytest.raises(ValueError, match=rf"expected \{{'{name}': {re.escape(repr(other))}\}}"):
            goes_on(run=run | {name: other})
    with pytest.raises(ValueError, match="'processes': 'not noted'"):
        goes_on(run={})
    gone = next(name for name in model if ".router." in name)
    with pytest.raises(ValueError, match=f"lacks 1 parameters: .*{re.escape(gone)}"):
        goes_on(model={name: value for name, value in model.items() if name != gone})


def test_models_are_told_apart_by_any_weight():
    found = {model_fingerprint(tiny_model()), model_fingerprint(tiny_model().to(torch.bfloat16))}
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 3] += 1.0
    assert len(found) == 1
    assert model_fingerprint(changed) not in found


def test_a_start_of_another_model_is_refused(home, local_text):
    for masks, layers, message in (
        ("[1]", 30, r"a model of 30 layers.*got one of 2; .*--set start=\{\}"),
        ("[5]", 2, r"expected routed layers, got \[5\] in the start of task 'single'; .*--set start=\{\}"),
    ):
        start = "{" + ", ".join(f"{task} = {masks}" for task in TASKS) + "}"
        with pytest.raises(ValueError, match=message):
            main([*arguments(home, home / "other"), f"start={start}", f"start_layers={layers}"])


def test_damaged_checkpoints(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}})
    newer = save_checkpoint(tmp_path, 2, {"model": {"a": torch.zeros(2)}})
    newer.write_bytes(newer.read_bytes()[:100])
    step, state = load_checkpoint(tmp_path)
    assert (step, state["model"]["a"].tolist()) == (1, [1.0, 1.0])
    (tmp_path / "step_1.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "none") is None


def test_router_files_are_checked(whole, tmp_path):
    routers = {name: torch.zeros_like(v) for name, v in load_file(whole / ROUTERS_NAME).items()}
    load_routers(whole / ROUTERS_NAME, routers)
    assert max(v.abs().max() for v in routers.values()) > 0
    with pytest.raises(ValueError, match="missing"):
        load_routers(whole / ROUTERS_NAME, routers | {"model.layers.9.self_attn.router.head.0.bias": torch.zeros(1)})
    (tmp_path / "x.safetensors").write_bytes((whole / ROUTERS_NAME).read_bytes()[:500])
    with pytest.raises(ValueError, match="no whole safetensors"):
        load_routers(tmp_path / "x.safetensors", routers)


def test_a_run_may_start_from_masks_and_follow_the_backbone(home, local_text):
    """With a fitted start the first step's Omega is that of the masks; the loss is the divergence from all full.

    One mask for all tasks: a few prompts of a random model do not tell tasks apart.
    """
    masks = "{" + ", ".join(f"{task} = [1]" for task in TASKS) + "}"
    out = home / "fitted"
    settings = [f"start={masks}", "optimiser.lr=1e-5", "start_confidence=0.999", "optimiser.steps=1"]
    main(arguments(home, out, *settings, "calibration_rows=4"))
    (row,) = read_log(out)
    omegas = [float(row[f"omega_{task}"]) for task in TASKS if row[f"omega_{task}"]]
    assert sum(omegas) / len(omegas) == pytest.approx(0.5, abs=0.2)
    assert float(row["loss"]) < 2.0 < min(float(row[f"nll_{task}"]) for task in TASKS if row[f"nll_{task}"])


def test_users_own_samples(home, tmp_path):
    lines = [{"prompt": f"Number {i} is " * 40, "answer": str(i), "task": "mine"} for i in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'[targets]\nmine = 0.5\n[data]\njsonl = "{tmp_path}/mine.jsonl"\nrow_tokens = 2048\n[optimiser]\nsteps = 2\n'
    )
    command = [
        "--model",
        str(home / "model"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--recipe",
        str(recipe),
    ]
    assert main(command) == 0
    assert (tmp_path / "out" / ROUTERS_NAME).is_file()
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines[1:])))
    with pytest.raises(ValueError, match=r"expected \{'data': "):
        main(command)
