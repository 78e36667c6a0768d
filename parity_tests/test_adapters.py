"""Adapters through the checked loader: a model takes them as stock does; what is wrong with them is said by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors.numpy import load_file, save_file

from flux_mlx.adapters import CONFIG_NAME, WEIGHTS_NAME, check_adapters, load_adapters
from parity_tests.server_process import running_server
from parity_tests.tiny_adapters import adapted, adapter_directory
from parity_tests.tiny_directories import VOCABULARY, flux_directory
from parity_tests.tiny_models import flux_model, prompt

TOKENS = mx.array([prompt(40)])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    return adapter_directory(tmp_path_factory.mktemp("adapters") / "lora", adapted(flux_model(vocab_size=VOCABULARY)))


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_model_takes_them(kind, tmp_path):
    trained = flux_model(seed=1) if kind == "full" else adapted(flux_model(), use_dora=kind == "dora")
    model = flux_model()
    before = model(TOKENS)
    directory = adapter_directory(tmp_path / kind, trained, kind)
    if kind == "full":  # the routers of a model are not in what full fine-tuning writes
        tensors = load_file(directory / WEIGHTS_NAME)
        kept = {name: value for name, value in tensors.items() if ".router." not in name}
        save_file(kept, directory / WEIGHTS_NAME)
    load_adapters(model, directory)
    assert not model.training
    assert not mx.array_equal(model(TOKENS), before)
    if kind != "full":
        assert mx.array_equal(model(TOKENS), trained(TOKENS))


def changed(adapters: Path, out: Path, **changes) -> Path:
    """A copy of adapters with other settings."""
    shutil.copytree(adapters, out)
    config = json.loads((out / CONFIG_NAME).read_text())
    for key, value in changes.items():
        place = config if key in config else config["lora_parameters"]
        place[key] = value
    (out / CONFIG_NAME).write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank must be an integer of 1 or more, got 0"),
        ({"rank": "4"}, "rank must be an integer of 1 or more, got '4'"),
        ({"rank": True}, "rank must be an integer of 1 or more, got True"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"scale": 10**400}, "scale must be a finite number, got 1000"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"keys": "self_attn.q_proj"}, "keys must be a list of module names, or absent, got 'self_attn.q_proj'"),
        ({"num_layers": None}, "num_layers must be an integer, got None"),
        ({"lora_parameters": [1]}, "rank must be an integer of 1 or more, got None"),
        ({"fine_tune_type": "qlora"}, "fine_tune_type must be one of .*, got 'qlora'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(adapters, tmp_path, setting, message):
    out = changed(adapters, tmp_path / "changed", **setting)
    with pytest.raises(ValueError, match=rf"\[load_adapters\] {re.escape(str(out / CONFIG_NAME))}: {message}"):
        check_adapters(out)


def with_tensors(adapters: Path, out: Path, change) -> Path:
    """A copy of adapters with other tensors: `change` gets them by name."""
    shutil.copytree(adapters, out)
    tensors = load_file(out / WEIGHTS_NAME)
    save_file(change(tensors), out / WEIGHTS_NAME)
    return out


A, B = "model.layers.1.self_attn.q_proj.lora_a", "model.layers.1.self_attn.q_proj.lora_b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {}, "adapters.safetensors has no tensors"),
        (lambda tensors: {**tensors, A: tensors[A].astype(int)}, rf"{A} must be one of .*, got mlx.core.int64"),
        (lambda tensors: {**tensors, A: tensors[A].astype(float)}, "unsupported dtype F64"),
        (lambda tensors: {**tensors, B: tensors[B] * float("nan")}, rf"{B} has 512 values that are not finite"),
        (lambda tensors: {**tensors, A: tensors[A][:-1].copy()}, rf"{A}: adapter shape \(127, 4\) does not match"),
        (lambda tensors: {**tensors, A.replace("q_", "z_"): tensors[A]}, "z_proj.lora_a: not an adapter parameter"),
        (lambda tensors: {**tensors, "lm_head.weight": tensors[A]}, "lm_head.weight: not an adapter parameter"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(adapters, tmp_path, change, message):
    out = with_tensors(adapters, tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapters(flux_model(vocab_size=VOCABULARY), out)
    assert str(out) in str(caught.value)


def test_files_that_are_damaged_or_absent_are_named(adapters, tmp_path):
    out = tmp_path / "adapters"
    with pytest.raises(FileNotFoundError, match=f"no such directory: {out}"):
        check_adapters(out)
    out.mkdir()
    for name, contents in ((CONFIG_NAME, (b"[1", b"[1]", b"\xff", b"[" * 100_000)), (WEIGHTS_NAME, (bytes(40),))):
        with pytest.raises(FileNotFoundError, match=f"no such file: {out / name}"):
            check_adapters(out)
        for damaged in contents:
            (out / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(str(out / name))):
                check_adapters(out)
        shutil.copyfile(adapters / name, out / name)
    check_adapters(out)


def test_the_command_refuses_in_one_line(adapters, tmp_path):
    directory = flux_directory(tmp_path / "flux")
    out = changed(adapters, tmp_path / "changed", rank=5)
    command = [sys.executable, "-m", "flux_mlx.generate", "--model", str(directory), "-p", "x", "--adapter-path"]
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    refusals = [line for line in done.stderr.splitlines() if "[load_adapters]" in line]
    assert len(refusals) == 1
    assert f"{out} contains incompatible tensors: model.layers." in refusals[0]
    assert refusals[0].endswith("(and 55 more)")
    assert "Traceback" not in done.stderr


def test_the_server_takes_them_from_a_request_and_goes_on_after_wrong_ones(adapters, tmp_path):
    directory = flux_directory(tmp_path / "flux")
    wrong = changed(adapters, tmp_path / "wrong", scale=None)
    with running_server(directory, tmp_path / "log") as server:
        plain = server.complete("x" * 61)
        status, answer = server.post({"prompt": "x" * 61, "adapters": str(wrong), "model": str(directory)})
        assert status == 404
        assert answer["error"] == f"[load_adapters] {wrong / CONFIG_NAME}: scale must be a finite number, got None."
        assert server.complete("x" * 61, adapters=str(adapters), model=str(directory)) != plain
        assert server.complete("x" * 61) == plain
