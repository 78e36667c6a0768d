"""mlx-lm's own commands on Flux model directories: their main functions, and some of them as processes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import stream_generate

from flux_mlx import describe_routes, load, set_route
from parity_tests.server_process import running_server
from parity_tests.tiny_directories import flux_directory

TRUST = "--trust-remote-code"
TEXT = "The quick brown fox jumps over the lazy dog, again and again, until it is tired of it all and goes home."


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A Flux model directory; its stock one lies beside it, with the ending -stock."""
    return flux_directory(tmp_path_factory.mktemp("commands") / "flux")


def run_process(*command: object, route: str | None = None, code: int = 0) -> str:
    """Output and errors of `python -m mlx_lm ...`."""
    env = {**os.environ, "FLUX_MLX_SHOW_ROUTES": "1"} | ({} if route is None else {"FLUX_MLX_ROUTE": route})
    words = [sys.executable, "-m", "mlx_lm", *map(str, command)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def run(command: str, *flags: object, route: str | None = None, text: str = "") -> str:
    """Output and errors of the same, run in this process: what a command imports takes seconds."""
    env = {"FLUX_MLX_SHOW_ROUTES": "1"} | ({} if route is None else {"FLUX_MLX_ROUTE": route})
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, env),
        mock.patch.object(sys, "argv", [f"mlx_lm.{command}", *map(str, flags)]),
        mock.patch.object(sys, "stdin", io.StringIO(text)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        importlib.import_module(f"mlx_lm.{command}").main()
    return out.getvalue() + err.getvalue()


def answer(output: str) -> str:
    """The generated text between the lines of mlx_lm.generate."""
    return output.split("==========\n")[1]


def routes_shown(output: str) -> list[str]:
    return re.findall(r"^flux: (.*)$", output, re.MULTILINE)


GENERATE = ("--prompt", TEXT, "--max-tokens", "12", "--prefill-step-size", "32")


def test_generate_with_full_routes_is_stock(directory):
    ours = run_process("generate", "--model", directory, TRUST, *GENERATE, route="full")
    stock = run_process("generate", "--model", f"{directory}-stock", *GENERATE)
    assert answer(ours) == answer(stock)
    assert routes_shown(ours) == ["0 of 4 routed layers sparse; full: 0,1,2,3; sparse: none"]


def test_generate_says_what_flag_is_missing(directory):
    assert "Pass trust_remote_code=True" in run_process("generate", "--model", directory, *GENERATE, code=1)


def test_generate_with_quantised_keys(directory):
    flags = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
    output = run("generate", "--model", directory, TRUST, *GENERATE, *flags, route="1-2")
    assert routes_shown(output) == ["2 of 4 routed layers sparse; full: 1,2; sparse: 0,3"]


def test_generate_with_a_draft_model_is_greedy(directory):
    flags = ("--draft-model", f"{directory}-stock", "--num-draft-tokens", "3")
    output = run("generate", "--model", directory, TRUST, *GENERATE, *flags, route="1-2")
    assert routes_shown(output) == ["2 of 4 routed layers sparse; full: 1,2; sparse: 0,3"]
    model, tokenizer = load(directory)
    set_route(model, (1, 2))
    tokens = tokenizer.encode(f"<|user|>{TEXT}\n<|assistant|>")
    assert answer(output) == "".join(r.text for r in stream_generate(model, tokenizer, tokens, max_tokens=12)) + "\n"


def test_a_saved_prompt_cache_goes_on(directory, tmp_path):
    saved = tmp_path / "cache.safetensors"
    run("cache_prompt", "--model", directory, TRUST, "--prompt", TEXT, "--prompt-cache-file", saved, route="0,3")
    output = run("generate", "--prompt-cache-file", saved, TRUST, "-p", "And then?", "-m", "8", route="0,3")
    assert routes_shown(output) == []  # they are in the file
    model, tokenizer = load(directory)
    set_route(model, (0, 3))
    tokens = tokenizer.encode(f"<|user|>{TEXT}And then?\n<|assistant|>")
    assert answer(output) == "".join(r.text for r in stream_generate(model, tokenizer, tokens, max_tokens=8)) + "\n"


def test_chat_reroutes_its_turns(directory):
    said = (TEXT, " ".join(["No."] * 20))
    output = run("chat", "--model", directory, TRUST, "--max-tokens", "4", text="\n".join([*said, "q", ""]))
    model, tokenizer = load(directory)
    cache, expected = model.make_cache(), []
    for text in said:
        tokens = tokenizer.encode(f"<|user|>{text}\n<|assistant|>")
        assert list(stream_generate(model, tokenizer, tokens, max_tokens=4, prompt_cache=cache))
        expected.append(describe_routes(cache))
    assert routes_shown(output) == expected  # shown when they change
    assert expected[0] != expected[1]
    assert output.count("\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}") == 3


def test_chat_with_full_routes_is_stock(directory):
    said, flags = f"{TEXT}\nAnd then?\nq\n", ("--max-tokens", "6")
    ours = run("chat", "--model", directory, TRUST, *flags, text=said, route="full")
    stock = run("chat", "--model", f"{directory}-stock", *flags, text=said)
    prompt_sign = "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
    ours, stock = (re.sub(r"^flux: .*\n|^.* tok/s .*\n", "", text, flags=re.MULTILINE) for text in (ours, stock))
    assert ours.count(prompt_sign) == 3
    assert ours.split(prompt_sign)[1:] == stock.split(prompt_sign)[1:]


def test_server(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_MLX_ROUTE", "0,3")
    model, tokenizer = load(directory)
    with running_server(directory, tmp_path / "log", TRUST, module=("mlx_lm", "server")) as server:
        for text in (TEXT, TEXT[:60] + " And then?", TEXT):
            expected = stream_generate(model, tokenizer, tokenizer.encode(text), max_tokens=12)
            assert server.complete(text) == [response.token for response in expected]


def test_benchmark(directory):
    output = run("benchmark", "--model", directory, TRUST, "-p", "40", "-g", "4", "-n", "1")
    assert "Averages: " in output


def routers(model) -> dict[str, mx.array]:
    return {name: value for name, value in tree_flatten(model.parameters()) if ".router." in name}


def assert_same_routers(model, directory: Path) -> None:
    before, after = routers(load(directory)[0]), routers(model)
    assert after.keys() == before.keys()
    assert all(value.dtype == mx.float32 and mx.array_equal(value, before[name]) for name, value in after.items())


def test_convert_quantises_all_but_routers_and_back(directory, tmp_path):
    tokens, answers = list(range(60)), []
    for source, trust in ((directory, [TRUST]), (f"{directory}-stock", [])):
        out = tmp_path / Path(source).name
        quantise = ("-q", "--q-bits", "4", "--q-group-size", "32")
        run("convert", "--hf-path", source, *trust, "--mlx-path", out, *quantise)
        model, tokenizer = mlx_lm.load(str(out), trust_remote_code=True)
        if trust:
            set_route(model, "full")
        answers.append([r.token for r in stream_generate(model, tokenizer, tokens, max_tokens=8)])
    assert answers[0] == answers[1]
    model, _ = load(out := tmp_path / directory.name)
    assert_same_routers(model, directory)
    assert model.layers[0].self_attn.q_proj.bits == 4
    cache = model.make_cache()
    model(mx.array([tokens]), cache=cache)
    assert "routed layers" in describe_routes(cache)
    run("convert", "--hf-path", out, TRUST, "--mlx-path", tmp_path / "back", "--dequantize")
    model, _ = load(tmp_path / "back")
    assert_same_routers(model, directory)
    assert model.layers[0].self_attn.q_proj.weight.dtype == mx.float32


def test_lora_and_fuse_leave_routers_alone(directory, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps({"text": TEXT * 2 + str(i)}) + "\n" for i in range(4)))
    adapters, fused = tmp_path / "adapters", tmp_path / "fused"
    run_process(
        *("lora", "--model", directory, TRUST, "--train", "--data", data),
        *("--iters", "2", "--batch-size", "2", "--num-layers", "4", "--adapter-path", adapters),
        *("--learning-rate", "1e-2", "--val-batches", "1", "--steps-per-report", "1"),
    )
    trained = mx.load(str(adapters / "adapters.safetensors"))
    assert all(mx.any(value != 0) for name, value in trained.items() if name.endswith("lora_b"))
    assert not [name for name in trained if "router" in name]
    before = dict(tree_flatten(load(directory)[0].parameters()))
    run_process("fuse", "--model", directory, TRUST, "--adapter-path", adapters, "--save-path", fused)
    after = dict(tree_flatten(load(fused)[0].parameters()))
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not mx.array_equal(value, before[name])}
    assert changed
    assert not [name for name in changed if "router" in name]
    assert json.loads((fused / "config.json").read_text())["model_file"] == "flux_model.py"
