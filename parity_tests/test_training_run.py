"""Whole runs on a tiny model: resume after a kill, several processes, files."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from cuda_reference.checkpoints import checkpoints, load_checkpoint, load_routers, save_checkpoint
from cuda_reference.data_prompts import TASKS
from cuda_reference.train import LOG_NAME, ROUTERS_NAME, main
from flux_mlx.spec import RouterConfig
from parity_tests.tiny_training import write_corpus, write_model

STEPS, LR = 3, 1e-2
SETTINGS = [
    f"optimiser.steps={STEPS}",
    f"optimiser.lr={LR}",
    "data.row_tokens=2048",
    "data.shortest_tokens=1700",
    "data.longest_tokens=2000",
    "calibration_rows=2",
    "calibration_tokens=[600, 1000]",
    "start={}",
    "data.text_chars=200000",
    "pattern.window_tokens=256",
    'loss="kl"',
]
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


def arguments(home, out, *more):
    return ["--model", str(home / "model"), "--out", str(out), "--device", "cpu", "--set", *SETTINGS, *more]


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
    assert float(rows[-1]["lambda1_single"]) > float(rows[0]["lambda1_single"])


def test_checkpoints_hold_no_frozen_weights(whole):
    _, state = load_checkpoint(whole)
    assert all(".router." in name or name.startswith("penalty.") for name in state["model"])


def test_a_stopped_run_goes_on_to_the_same_routers(home, local_text, whole):
    out = home / "stopped"
    main(arguments(home, out, "--stop-after", "0"))
    assert [step for step, _ in checkpoints(out)] == [1]
    main(arguments(home, out))
    ours, theirs = load_file(out / ROUTERS_NAME), load_file(whole / ROUTERS_NAME)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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


def run_processes(home, out, spread):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(home / "launch.py"), str(home / "corpus"), *arguments(home, out, "--save-every", "2")]
    return subprocess.run(
        [*command[:-2], "--spread", spread, *command[-2:]], env=environment(), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def spread_runs(home):
    """Routers and log of two processes, by DDP and by FSDP."""
    found = {}
    for spread in ("ddp", "fsdp"):
        result = run_processes(home, home / spread, spread)
        assert result.returncode == 0, result.stderr[-2000:]
        found[spread] = load_file(home / spread / ROUTERS_NAME), read_log(home / spread)
    return found


def test_two_processes_train_and_both_ways_agree(spread_runs):
    """Compared by loss and gradient: Adam makes whole steps of the rounding of tiny gradients."""
    (ddp, ddp_log), (fsdp, fsdp_log) = spread_runs["ddp"], spread_runs["fsdp"]
    assert {name: v.shape for name, v in ddp.items()} == {name: v.shape for name, v in fsdp.items()}
    for ours, theirs in zip(ddp_log, fsdp_log, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-3)
    assert float(ddp_log[0]["grad_norm"]) == pytest.approx(float(fsdp_log[0]["grad_norm"]), rel=1e-3)


def test_two_processes_see_other_data_than_one(spread_runs, whole):
    one = load_file(whole / ROUTERS_NAME)
    assert any(not torch.equal(one[name], spread_runs["ddp"][0][name]) for name in one)


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
    import json

    lines = [{"prompt": f"Number {i} is " * 40, "answer": str(i), "task": "mine"} for i in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'[targets]\nmine = 0.5\n[data]\njsonl = "{tmp_path}/mine.jsonl"\nrow_tokens = 2048\n[optimiser]\nsteps = 2\n'
    )
    main(["--model", str(home / "model"), "--out", str(tmp_path / "out"), "--device", "cpu", "--recipe", str(recipe)])
    assert (tmp_path / "out" / ROUTERS_NAME).is_file()
