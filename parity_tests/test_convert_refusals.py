"""flux_mlx.convert refuses bad input: status 2, one clear message, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

import flux_mlx
from flux_mlx.convert import convert, main
from flux_mlx.model_directory import building
from flux_mlx.spec import FluxConfig, RouterConfig
from flux_mlx.weights import fresh_routers, write_routers
from parity_tests.tiny_gguf import TinyLlama, write_tiny_directory

LLAMA = TinyLlama()
HEAD_DIMS = dict.fromkeys(range(LLAMA.layers), LLAMA.head_dim)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_directory(tmp_path_factory.mktemp("source"))


def spoil(directory: Path, case: str) -> None:
    """Make a copy of a good source bad."""
    weights = directory / "model.safetensors"
    config = json.loads((directory / "config.json").read_text())
    if case == "no config":
        (directory / "config.json").unlink()
    elif case == "config is not JSON":
        (directory / "config.json").write_text("{")
    elif case == "no weights":
        weights.unlink()
    elif case == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif case == "weights of another model":
        mx.save_safetensors(str(weights), {"model.norm.weight": mx.ones(64)})
    elif case == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    else:
        changes = {
            "unknown architecture": {"model_type": "perceptron"},
            "no architecture": {"model_type": None},
            "foreign model code": {"model_file": "evil.py"},
            "sizes missing": {"num_hidden_layers": None},
        }[case]
        config = {key: value for key, value in (config | changes).items() if value is not None}
        (directory / "config.json").write_text(json.dumps(config))


BAD_SOURCES = {
    "no config": "it has no config.json",
    "config is not JSON": "config.json is not JSON",
    "no weights": "has no weights: expected model*.safetensors",
    "truncated weights": "model.safetensors is no whole safetensors file",
    "weights of another model": "Missing",
    "no tokenizer": "has no tokenizer: expected one of",
    "unknown architecture": "perceptron",
    "no architecture": "with a model_type",
    "foreign model code": "brings its own model code, 'evil.py'",
    "sizes missing": "num_hidden_layers",
}


def assert_refused(arguments: list[str], folder: Path, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 2 and a message with `reason`, and leaves `folder` as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(["--mlx-path", str(folder / "out"), *arguments])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert reason in message, message
    assert "Traceback" not in message
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source(case: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(plain, tmp_path / "source")
    spoil(tmp_path / "source", case)
    assert_refused(["--model", str(tmp_path / "source")], tmp_path, BAD_SOURCES[case], capsys)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--window-tokens 0", "window_tokens must be an integer >= 1, got 0"),
        ("--block-size -4", "block_size must be an integer >= 1, got -4"),
        ("--route 0,7", "route names layers [7], but the model has layers 0 to 2"),
        ("--route sometimes", "got 'sometimes'"),
        ("--pattern spiral", "name must be one of"),
        ("--pattern xattention --block-size 24", "stride must divide block_size"),
        ("--pool-tokens many", "invalid int value: 'many'"),
        ("--routers /nowhere/routers.safetensors", "one of smollm2-135m-instruct, got /nowhere/routers.safetensors"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("-q --q-group-size 7", "no weight can be quantised in groups of 7"),
        ("-q --q-mode mxfp4 --quant-predicate mixed_3_6", "goes with --q-mode affine"),
    ],
)
def test_bad_flags(flags: str, reason: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["--model", str(plain), *flags.split()], tmp_path, reason, capsys)


@pytest.mark.parametrize("source", ["./not/here", "not-here", "/not/here", "a/b/c", "missing.gguf"])
def test_missing_source(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["--model", source], tmp_path, source.removeprefix("./"), capsys)


def test_file_that_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("These are notes, not a model at all.")
    assert_refused(["--model", str(tmp_path / "notes.txt")], tmp_path, "starts with b'GGUF'", capsys)


@pytest.mark.parametrize(
    ("head_dims", "reason"),
    [
        ({0: 32, 1: 32}, "lacks [2]"),
        ({0: 32, 1: 32, 2: 16}, "layer 2 must have shape [256, 32] for the model's head size 32, got [128, 16]"),
    ],
)
def test_routers_that_do_not_fit(
    head_dims: dict[int, int], reason: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_routers(tmp_path / "r.safetensors", fresh_routers(head_dims, RouterConfig()), FluxConfig())
    assert_refused(["--model", str(plain), "--routers", str(tmp_path / "r.safetensors")], tmp_path, reason, capsys)


def test_nan_in_a_router(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routers = fresh_routers(HEAD_DIMS, RouterConfig())
    routers[1]["head.2.bias"][0] = float("nan")
    write_routers(tmp_path / "r.safetensors", routers, FluxConfig())
    reason = "model.layers.1.self_attn.router.head.2.bias of layer 1 has 1 values that are not finite"
    assert_refused(["--model", str(plain), "--routers", str(tmp_path / "r.safetensors")], tmp_path, reason, capsys)


def test_nan_in_a_router_of_a_model_directory(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux")
    weights = mx.load(str(tmp_path / "flux" / "model.safetensors"))
    key = RouterConfig.key(1, "head.2.bias")
    mx.eval(weights)
    weights[key][0] = float("nan")
    mx.save_safetensors(str(tmp_path / "flux" / "model.safetensors"), weights, metadata={"format": "mlx"})
    with pytest.raises(ValueError, match=f"{key} has 1 values that are not finite"):
        flux_mlx.load(tmp_path / "flux")


def test_existing_output_is_left_alone(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert_refused(["--model", str(plain)], tmp_path, "exists already", capsys)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        convert(plain, tmp_path / "a" / "b")


def test_interrupted_building_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[None]:
        with building(tmp_path / "out") as part:
            part.mkdir()
            (part / "half").write_text("x")
            raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        next(interrupted())
    assert list(tmp_path.iterdir()) == []
