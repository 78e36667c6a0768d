"""flux_mlx.convert: what a Flux model directory holds, that stock mlx-lm runs it, and input that is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from mlx_lm.convert import convert as stock_convert
from mlx_lm.utils import load_model

from flux_mlx import base_model, model_source
from flux_mlx import load as flux_load
from flux_mlx.base_model import Quantization, default_dtype
from flux_mlx.convert import build_parser, convert, main, override
from flux_mlx.model_directory import CARD_NAME, SHIM_NAME, card_field, shim_text
from flux_mlx.packaged_routers import find_routers, packaged_names
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig
from flux_mlx.weights import INDEX_NAME, fresh_routers, read_routers, write_routers
from parity_tests.tiny_gguf import TinyLlama, write_tiny_directory

LLAMA = TinyLlama()
HEAD_DIMS = dict.fromkeys(range(LLAMA.layers), LLAMA.head_dim)
TRUST = {"trust_remote_code": True}
PROMPT = "the there were in 12 the"


@pytest.fixture(autouse=True)
def _no_route_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUX_MLX_ROUTE", raising=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_directory(tmp_path_factory.mktemp("source"))


@pytest.fixture
def routers_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routers") / "routers.safetensors"
    flux = FluxConfig(PatternConfig(sink_tokens=7), RouterConfig(pool_tokens=11))
    write_routers(path, fresh_routers(HEAD_DIMS, flux.router, seed=9), flux, mx.float16)
    return path


def parameters(directory: Path) -> dict[str, mx.array]:
    """All tensors as stored."""
    return {k: v for file in directory.glob("model*.safetensors") for k, v in mx.load(str(file)).items()}


def read_config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def router_tensors(directory: Path) -> dict[str, mx.array]:
    return {name: value for name, value in parameters(directory).items() if ".router." in name}


def assert_equal_tensors(got: dict[str, mx.array], want: dict[str, mx.array]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert mx.array_equal(got[name], value), name


# What is written


def test_directory_holds_what_a_flux_model_needs(plain: Path, tmp_path: Path) -> None:
    convert(
        plain, tmp_path / "flux", settings={"route": "0,2", "block_size": 16, "window_tokens": 40, "pool_tokens": 9}
    )
    out = tmp_path / "flux"
    config = read_config(out)
    want = FluxConfig(PatternConfig(block_size=16, window_tokens=40), RouterConfig(pool_tokens=9), route=(0, 2))
    assert FluxConfig.from_dict(config["flux"]) == want
    assert (config["model_file"], config["model_type"], config["my_key"]) == (SHIM_NAME, "llama", 1)
    assert (out / SHIM_NAME).read_text() == shim_text()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()
    assert (out / "BASE_README.md").read_bytes() == (plain / CARD_NAME).read_bytes()
    routers = router_tensors(out)
    assert_equal_tensors({k: v for k, v in parameters(out).items() if k not in routers}, parameters(plain))
    assert {int(name.split(".")[2]) for name in routers} == set(HEAD_DIMS)
    assert {value.dtype for value in routers.values()} == {mx.float32}
    assert [file.name for file in tmp_path.iterdir()] == ["flux"]


def test_card_states_base_licence_changes_and_how_to_run(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux", settings={"route": "sparse"})
    card = (tmp_path / "flux" / CARD_NAME).read_text()
    assert card_field(tmp_path / "flux", "license") == "apache-2.0"
    assert card_field(tmp_path / "flux", "library_name") == "mlx"
    for words in ("plain made into", "3 of 3 layers, fresh", "Licence of the base model: apache-2.0", "`sparse`"):
        assert words in card
    assert "mlx_lm.generate --model . --trust-remote-code" in card
    assert "$" not in card


def test_stock_mlx_lm_loads_and_runs_it(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux", settings={"route": "full"})
    stock, tokenizer = load(str(plain))
    routed, routed_tokenizer = load(str(tmp_path / "flux"), **TRUST)
    tokens = mx.array([tokenizer.encode(PROMPT)])
    assert routed_tokenizer.encode(PROMPT) == tokenizer.encode(PROMPT)
    assert mx.array_equal(routed(tokens), stock(tokens))
    answers = [generate(model, tokenizer, PROMPT, max_tokens=12) for model in (stock, routed)]
    assert answers[0] == answers[1]


def test_loading_without_the_trust_flag_names_it(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(str(tmp_path / "flux"))


def test_gguf_source(plain: Path, tmp_path: Path) -> None:
    convert(plain.with_name("tiny.gguf"), tmp_path / "flux")
    weights = {name: value for name, value in parameters(tmp_path / "flux").items() if ".router." not in name}
    assert_equal_tensors(weights, parameters(plain))
    assert "dequantised, written as float32" in (tmp_path / "flux" / "BASE_README.md").read_text()
    assert card_field(tmp_path / "flux", "license") == "apache-2.0"
    assert [file.name for file in tmp_path.iterdir()] == ["flux"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_that_of_the_weights_and_never_of_the_routers(dtype: str, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux", dtype=dtype)
    kinds = {(".router." in name, value.dtype) for name, value in parameters(tmp_path / "flux").items()}
    assert kinds == {(True, mx.float32), (False, getattr(mx, dtype))}
    assert read_config(tmp_path / "flux")["torch_dtype"] == dtype


def test_default_dtype_is_float32_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model.mx, "default_device", lambda: mx.Device(mx.cpu))
    assert default_dtype({"torch_dtype": "bfloat16"}) == "float32"
    monkeypatch.setattr(base_model.mx, "default_device", lambda: mx.Device(mx.gpu))
    assert default_dtype({"torch_dtype": "bfloat16"}) == "bfloat16"
    assert default_dtype({"text_config": {"dtype": "float16"}}) == "float16"
    assert default_dtype({}) is None


@pytest.mark.parametrize("recipe", [None, "mixed_3_6"])
def test_quantised_weights_and_whole_routers(recipe: str | None, plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux", quantization=Quantization(32, 8, recipe=recipe), seed=3)
    config, weights = read_config(tmp_path / "flux"), parameters(tmp_path / "flux")
    assert config["quantization"]["group_size"] == 32
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == mx.uint32
    assert not any(name.endswith(".scales") for name in router_tensors(tmp_path / "flux"))
    want = fresh_routers(HEAD_DIMS, RouterConfig(), seed=3)
    assert mx.array_equal(weights["model.layers.1.self_attn.router.head.0.weight"], want[1]["head.0.weight"])
    model, _ = load_model(tmp_path / "flux", **TRUST)
    assert np.isfinite(np.array(model(mx.array([[3, 4, 5]])))).all()


def test_quantised_source(plain: Path, tmp_path: Path) -> None:
    stock_convert(str(plain), str(tmp_path / "q8"), quantize=True, q_bits=8, q_group_size=32)
    convert(tmp_path / "q8", tmp_path / "flux", settings={"route": "full"})
    stock, _ = load_model(tmp_path / "q8")
    routed, _ = load_model(tmp_path / "flux", **TRUST)
    tokens = mx.array([[3, 4, 5, 6]])
    assert mx.array_equal(routed(tokens), stock(tokens))
    convert(tmp_path / "q8", tmp_path / "whole", dequantize=True)
    assert "quantization" not in read_config(tmp_path / "whole")
    assert not any(name.endswith(".scales") for name in parameters(tmp_path / "whole"))
    with pytest.raises(ValueError, match="quantised already"):
        convert(tmp_path / "q8", tmp_path / "twice", quantization=Quantization())


# Routers and settings


def test_routers_from_a_file_bring_their_settings(plain: Path, routers_file: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux", routers=routers_file, settings={"sink_tokens": 30})
    flux = FluxConfig.from_dict(read_config(tmp_path / "flux")["flux"])
    assert (flux.pattern.sink_tokens, flux.router.pool_tokens) == (30, 11)
    got, want = read_routers(tmp_path / "flux").routers, read_routers(routers_file).routers
    for layer, part in want.items():
        assert_equal_tensors(got[layer], part)


def test_flux_source_keeps_its_routers_and_settings(plain: Path, routers_file: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "first", routers=routers_file, settings={"route": "0"})
    convert(tmp_path / "first", tmp_path / "second", settings={"window_tokens": 99})
    first, second = read_config(tmp_path / "first")["flux"], read_config(tmp_path / "second")["flux"]
    assert second == first | {"pattern": first["pattern"] | {"window_tokens": 99}}
    assert_equal_tensors(parameters(tmp_path / "second"), parameters(tmp_path / "first"))
    card = (tmp_path / "second" / "BASE_README.md").read_bytes()
    assert card == (plain / CARD_NAME).read_bytes()


def change_router(directory: Path) -> None:
    """Flip one bit of a router."""
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header[RouterConfig.key(1, "head.4.weight")]["data_offsets"][0]] ^= 1
    file.write_bytes(data)


def test_a_changed_bit_of_a_router_is_an_error(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux")
    flux_load(tmp_path / "flux")
    change_router(tmp_path / "flux")
    for read in (flux_load, read_routers, lambda directory: convert(directory, tmp_path / "again")):
        with pytest.raises(ValueError, match=r"routers in .*flux were changed: expected SHA-256"):
            read(tmp_path / "flux")
    (tmp_path / "flux" / INDEX_NAME).write_text("{")
    with pytest.raises(ValueError, match=rf"{INDEX_NAME} is not JSON"):
        flux_load(tmp_path / "flux")


def test_what_stock_commands_save_makes_no_claim_about_routers(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux")
    stock_convert(str(tmp_path / "flux"), str(tmp_path / "q8"), quantize=True, q_group_size=32, **TRUST)
    flux_load(tmp_path / "q8")
    change_router(tmp_path / "q8")
    flux_load(tmp_path / "q8")
    convert(tmp_path / "flux", tmp_path / "again")
    assert (tmp_path / "again" / INDEX_NAME).read_text() == (tmp_path / "flux" / INDEX_NAME).read_text()


@pytest.fixture
def published(plain: Path, tmp_path: Path) -> Path:
    """A checkpoint as the published ones are: routers under their names, other projections, training state."""
    out = tmp_path / "published"
    shutil.copytree(plain, out)
    routers = {}
    for layer, part in fresh_routers(HEAD_DIMS, RouterConfig(), seed=4).items():
        for name, value in part.items():
            theirs = name.replace("encoder.", "cls_feat_extractor.").replace("head.", "cls_router_head_agnostic.")
            routers[f"model.layers.{layer}.self_attn.mask_allocator.{theirs}"] = value
        routers[f"model.layers.{layer}.self_attn.attn_mask_log_alphas"] = mx.ones(LLAMA.kv_heads)
    routers["model.sparsity_lambda1_task"] = mx.ones(5)
    changed = {k: v + 1 for k, v in parameters(plain).items() if k.split(".")[-2] in ("q_proj", "k_proj", "v_proj")}
    mx.save_safetensors(str(out / "model.safetensors"), parameters(plain) | routers | changed)
    (out / "config.json").write_text(json.dumps(read_config(out) | {"pool_size": 150}))
    return out


@pytest.mark.parametrize("as_source", [True, False])
def test_published_checkpoint(as_source: bool, published: Path, plain: Path, tmp_path: Path) -> None:
    if as_source:
        convert(published, tmp_path / "flux")
    else:
        convert(plain, tmp_path / "flux", routers=published)
    got = parameters(tmp_path / "flux")
    want = fresh_routers(HEAD_DIMS, RouterConfig(), seed=4)
    assert_equal_tensors(read_routers(tmp_path / "flux").routers[2], want[2])
    for name, value in parameters(published).items():
        if ".mask_allocator." not in name and "attn_mask" not in name and "sparsity" not in name:
            assert mx.array_equal(got[name], value), name
    assert read_config(tmp_path / "flux")["flux"]["router"]["pool_tokens"] == 150
    load_model(tmp_path / "flux", **TRUST)


def test_override_changes_only_what_is_given() -> None:
    base = FluxConfig(PatternConfig("triangle", last_tokens=5), RouterConfig(pool_tokens=3), route="sparse")
    assert override(base, {"block_size": None}) == base
    got = override(base, {"pattern": "xattention", "pool_tokens": 8, "route": "1,2"})
    assert got == FluxConfig(PatternConfig("xattention", last_tokens=5), RouterConfig(pool_tokens=8), route=(1, 2))


def test_projections_need_an_unquantised_base(published: Path, plain: Path, tmp_path: Path) -> None:
    stock_convert(str(plain), str(tmp_path / "q8"), quantize=True, q_bits=8, q_group_size=32)
    with pytest.raises(ValueError, match=r"the base must have it unquantised in that shape"):
        convert(tmp_path / "q8", tmp_path / "flux", routers=published)


# The command line


def test_defaults_in_the_help_are_those_of_the_dataclasses() -> None:
    text = " ".join(build_parser().format_help().split())
    assert f"--window-tokens WINDOW_TOKENS latest tokens that a query sees, itself counted (default: {2048})" in text
    assert PatternConfig().window_tokens == 2048
    assert "--top-k-blocks" in text


def test_command_line(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = shutil.copy(plain.with_name("tiny.gguf"), tmp_path / "weights.bin")
    out = tmp_path / "flux"
    flags = "--block-size 16 --pattern triangle --threshold 0.5 --route 1 --seed 2 -q --q-bits 8 --q-group-size 32"
    main(["--gguf", str(renamed), "--mlx-path", str(out), *flags.split()])
    flux = FluxConfig.from_dict(read_config(out)["flux"])
    assert flux == FluxConfig(PatternConfig("triangle", block_size=16, threshold=0.5), route=(1,))
    assert read_config(out)["quantization"]["bits"] == 8
    said = capsys.readouterr().out
    assert "route: full layers 1; 2 of 3 sparse." in said
    assert f"flux_mlx.generate --model {out} " in said


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "auto, but routers are fresh and untrained: every layer stays full and nothing is saved; give --routers"),
        ({"init_bias": -1.0}, "auto, but routers are fresh and untrained: give --routers or --route."),
        ({"route": "full"}, "full layers 0, 1, 2; 0 of 3 sparse."),
        ({"route": "sparse"}, "no full layer; 3 of 3 sparse."),
        ({"route": "0,2"}, "full layers 0, 2; 1 of 3 sparse."),
    ],
)
def test_what_is_said_of_the_route(settings: dict, line: str, plain: Path, tmp_path: Path) -> None:
    changes = convert(plain, tmp_path / "flux", settings=settings)
    assert [change for change in changes if change.startswith(f"route: {line}")]


def test_what_is_said_of_routers_that_decide(plain: Path, routers_file: Path, tmp_path: Path) -> None:
    changes = convert(plain, tmp_path / "flux", routers=routers_file)
    assert "route: auto, the routers decide by each prompt." in changes


def test_packaged_routers_are_found_by_name(plain: Path, tmp_path: Path) -> None:
    assert packaged_names() == ["smollm2-135m-instruct"]
    assert len(read_routers(find_routers("smollm2-135m-instruct")).routers) == 30
    with pytest.raises(ValueError, match="router"):  # of another model, but found
        convert(plain, tmp_path / "flux", routers="smollm2-135m-instruct")
    with pytest.raises(FileNotFoundError, match=r"a directory or one of smollm2-135m-instruct, got nobody's\."):
        convert(plain, tmp_path / "flux", routers="nobody's")


# The hub and the shim


def test_hub_source(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision))
        assert "LICENSE*" in allow_patterns
        return str(plain)

    monkeypatch.setattr(model_source, "_download", download)
    convert("maker/tiny", tmp_path / "flux", revision="v1")
    assert asked == [("maker/tiny", "v1")]
    assert card_field(tmp_path / "flux", "base_model") == "maker/tiny"
    assert "# tiny-flux" in (tmp_path / "flux" / CARD_NAME).read_text()


def test_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(model_source, "_download", fail)
    with pytest.raises(FileNotFoundError, match=r"nor could the hub give it: no network$"):
        convert("maker/tiny", tmp_path / "flux")


def test_shim_is_short_and_says_what_to_install() -> None:
    assert len(shim_text().splitlines()) <= 20
    bare = [sys.executable, "-I", "-S", "-c", shim_text()]  # without installed packages
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: " in done.stderr.splitlines()[-1]
    assert "pip install flux-mlx" in done.stderr.splitlines()[-1]


def test_tensor_names_in_memory_and_on_disk_agree(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "flux")
    model, _ = load_model(tmp_path / "flux", **TRUST)
    assert_equal_tensors(dict(tree_flatten(model.parameters())), parameters(tmp_path / "flux"))
