"""What the training and evaluation commands say of files that are missing or damaged: one line, and status 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_reference import evaluate, search, sweep, train
from parity_tests.tiny_training import write_model

REQUIRED = {
    train: ["--device", "cpu"],
    evaluate: ["--device", "cpu"],
    search: ["--device", "cpu", "--tasks", "single"],
    sweep: ["--gpus", "0", "--text-cache", "text.npz"],
}
OWN_SAMPLES = ["calibration_tokens=[]", "data.truncated_share=0.0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model; copies of it with a damaged file each; files of no use."""
    root = tmp_path_factory.mktemp("console")
    write_model(root / "model")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copytree(root / "model", root / f"bad-{name}")
        (root / f"bad-{name}" / name).write_bytes(b'{"\xff')
    (root / "bytes").write_bytes(b"\xff\xfe{")
    (root / "lines.jsonl").write_text('{"prompt": 1}\n')
    (root / "no.toml").write_text("[[job]\n")
    return root


def command(module, home: Path, *arguments: str) -> list[str]:
    """Arguments of a command on the model; `arguments` come last, with @NAME for a file in `home`."""
    placed = [text.replace("@", f"{home}/") for text in arguments]
    return ["--model", str(home / "model"), "--out", str(home / "out"), *REQUIRED[module], *placed]


def said(module, arguments: list[str], monkeypatch, capsys) -> str:
    """The last line on stderr of a command started from a console; what is before it shows progress."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert "Traceback" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize("module", [train, evaluate, search])
@pytest.mark.parametrize("name", ["missing", "bad-config.json", "bad-model.safetensors", "bad-tokenizer.json"])
def test_a_model_that_is_not_there_or_damaged(module, name, home, monkeypatch, capsys):
    monkeypatch.setattr("cuda_reference.data.collect", lambda *_, **__: [])  # no text is read before the weights are
    arguments = command(module, home, "--model", f"@{name}")
    with pytest.raises(ValueError, match="expected the directory or hub id of a transformers causal LM"):
        module.main(arguments)
    line = said(module, arguments, monkeypatch, capsys)
    assert line.startswith(f"{module.build_parser().prog}: [load_model] expected the directory or hub id")
    assert f"got {home}/{name}: " in line


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        (train, ["--recipe", "@none.toml"], "no file @none.toml and no recipe of that name"),
        (evaluate, ["--recipe", "@no.toml"], "@no.toml or an override is not TOML"),
        (search, ["--recipe", "none"], "no file none and no recipe of that name"),
        (train, ["--set", "data.jsonl='@none.jsonl'", *OWN_SAMPLES], "No such file or directory: '@none.jsonl'"),
        (train, ["--set", "data.jsonl='@lines.jsonl'", *OWN_SAMPLES], "@lines.jsonl line 1: expected an object with"),
        (train, ["--text-cache", "@bytes"], "expected a file of save_corpora, got @bytes"),
        (evaluate, ["--text-cache", "@bytes"], "expected a file of save_corpora, got @bytes"),
        (evaluate, ["--routers", "@none.safetensors"], "no such file: @none.safetensors"),
        (evaluate, ["--routers", "mine=@bytes"], "@bytes is no whole safetensors file"),
        (evaluate, ["--backend", "mlx", "--model", "@missing"], "@missing is no model directory"),
        (sweep, ["--jobs", "@none.toml"], "No such file or directory: '@none.toml'"),
        (sweep, ["--jobs", "@no.toml"], "@no.toml is no job list"),
        (sweep, ["--jobs", "@bytes"], "@bytes is no job list"),
    ],
)
def test_other_files_that_are_not_there_or_damaged(module, arguments, expected, home, monkeypatch, capsys):
    line = said(module, command(module, home, *arguments), monkeypatch, capsys)
    assert line.startswith(f"{module.build_parser().prog}: [")
    assert expected.replace("@", f"{home}/") in line
    assert not (home / "out").exists()


def test_a_damaged_state_of_an_earlier_sweep(tmp_path, home, monkeypatch, capsys):
    (tmp_path / "jobs.toml").write_text('[[job]]\nout = "a.json"\ncommand = ["-c", "pass"]\n')
    (tmp_path / sweep.STATE_NAME).write_bytes(b"{\xff")
    arguments = command(sweep, home, "--out", str(tmp_path), "--jobs", str(tmp_path / "jobs.toml"))
    line = said(sweep, arguments, monkeypatch, capsys)
    assert f"expected the state of an earlier sweep, got {tmp_path / sweep.STATE_NAME}" in line


def test_the_installed_command(home):
    train_command = Path(sys.executable).parent / "flux_mlx.train"
    done = subprocess.run(
        [train_command, *command(train, home, "--recipe", "none")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flux_mlx.train: [recipe] no file none and no recipe of that name")
    assert done.stderr.count("\n") == 1
