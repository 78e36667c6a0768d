"""Saved prompt caches: a changed byte, another model or other routers are errors; stock commands read them too."""

from __future__ import annotations

import json
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache as stock_load
from mlx_lm.models.cache import save_prompt_cache as stock_save
from mlx_lm.tuner.utils import linear_to_lora_layers

from flux_mlx import routes
from flux_mlx.cache_files import has_fingerprint, load_prompt_cache, model_digest, read_metadata, save_prompt_cache
from flux_mlx.cache_prompt import cache_prompt
from flux_mlx.cache_prompt import main as main_cache_prompt
from flux_mlx.fingerprint import digest_tensors
from flux_mlx.generate import main as main_generate
from flux_mlx.models import set_route
from parity_tests.tiny_directories import flux_directory
from parity_tests.tiny_models import flux_model, prompt, randomise_routers

MODEL = flux_model()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "cache.safetensors"
    save_prompt_cache(path, cache_prompt(MODEL, prompt(61)), MODEL, {"model": "tiny"})
    return path


def answer(model, cache) -> list[int]:
    return [token for token, _ in generate_step(mx.array(prompt(30, 4)), model, prompt_cache=cache, max_tokens=12)]


def test_saved_is_live(file):
    live = cache_prompt(MODEL, prompt(61))
    loaded, metadata = load_prompt_cache(file, MODEL)
    assert metadata["model"] == "tiny"
    assert routes(loaded) == routes(live)
    expected = answer(MODEL, live)
    assert answer(MODEL, loaded) == expected
    assert answer(MODEL, stock_load(str(file))) == expected
    assert list(file.parent.iterdir()) == [file]


def test_quantised_caches_too(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache = [entry.to_quantized(group_size=32, bits=8) for entry in cache_prompt(MODEL, prompt(61))]
    save_prompt_cache(path, cache, MODEL)
    loaded, _ = load_prompt_cache(path, MODEL)
    assert routes(loaded) == routes(cache)
    assert answer(MODEL, loaded) == answer(MODEL, cache)


@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_is_an_error(file, at, flip):
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= flip
    damaged = file.with_name("damaged.safetensors")
    damaged.write_bytes(data)
    assert has_fingerprint(damaged)
    with pytest.raises(
        ValueError, match=r"damaged\.safetensors (was changed|is no whole|has no fingerprint|has format)"
    ):
        load_prompt_cache(damaged, MODEL)
    damaged.unlink()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_cut_file_is_an_error(file, tmp_path, keep):
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.safetensors (was changed|is no whole)"):
        load_prompt_cache(damaged, MODEL)


def test_other_models_and_other_routers_are_refused(file):
    for other in (flux_model(seed=1), flux_model("qwen3"), flux_model(num_hidden_layers=3)):
        with pytest.raises(ValueError, match=r"holds 4 layers, the model 3|was made by another model or other routers"):
            load_prompt_cache(file, other)
    other = flux_model()
    randomise_routers(other, 9)
    with pytest.raises(ValueError, match="other routers"):
        load_prompt_cache(file, other)
    set_route(other := flux_model(), "sparse")  # a route of today is no other model
    load_prompt_cache(file, other)


def test_stock_caches_have_no_fingerprint(tmp_path):
    path = tmp_path / "stock.safetensors"
    stock_save(str(path), cache_prompt(MODEL, prompt(20)))
    assert not has_fingerprint(path)
    assert not has_fingerprint(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="has no fingerprint: expected a file saved by flux_mlx"):
        load_prompt_cache(path, MODEL)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_metadata(tmp_path / "missing.safetensors")


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_prompt_cache(tmp_path / "cache.bin", MODEL.make_cache(), MODEL)
    with pytest.raises(ValueError, match="3 entries for a model of 4 layers"):
        save_prompt_cache(tmp_path / "cache.safetensors", MODEL.make_cache()[:3], MODEL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 1e6}, {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rms_norm_eps": 1e-2}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_another_model(file, changes):
    with pytest.raises(ValueError, match="was made by another model"):
        load_prompt_cache(file, flux_model(**changes))


def test_another_row_of_the_embedding_is_another_model(file):
    model = flux_model()
    model.model.embed_tokens.weight[77] = 0.5
    with pytest.raises(ValueError, match="was made by another model"):
        load_prompt_cache(file, model)


def test_another_scale_of_an_adapter_is_another_model(tmp_path):
    path, config = tmp_path / "cache.safetensors", {"rank": 2, "scale": 4.0, "dropout": 0.0}
    models = []
    for scale in (4.0, 4.0, 8.0):
        mx.random.seed(3)
        models.append(flux_model())
        linear_to_lora_layers(models[-1], 2, {**config, "scale": scale})
    save_prompt_cache(path, cache_prompt(models[0], prompt(30)), models[0])
    load_prompt_cache(path, models[1])
    with pytest.raises(ValueError, match="was made by another model"):
        load_prompt_cache(path, models[2])


@given(data=st.data())
def test_the_digest_sees_every_bit(data):
    dtype = data.draw(st.sampled_from([mx.float32, mx.bfloat16, mx.uint8]))
    shape = data.draw(st.sampled_from([(), (1,), (3, 5), (2, 3, 4)]))
    value = mx.random.uniform(0, 99, shape).astype(dtype)
    bits = np.array(value.reshape(-1).view(mx.uint8))
    bits[data.draw(st.integers(0, bits.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = mx.array(bits).view(dtype).reshape(shape)
    assert digest_tensors({"w": value}) == digest_tensors({"w": mx.array(value)})
    assert digest_tensors({"w": value}) != digest_tensors({"w": changed})


def test_the_digest_sees_layout_and_names():
    value = mx.arange(12).reshape(3, 4)
    turned = mx.contiguous(value.T).T  # the same values, otherwise in memory
    assert digest_tensors({"a": value, "b": turned}) == digest_tensors({"b": value, "a": value})
    for other in ({"w": value.T}, {"w": value.reshape(4, 3)}, {"v": value}, {"w": value.astype(mx.uint32)}, {}):
        assert digest_tensors(other) != digest_tensors({"w": value})


def test_the_digest_is_the_same_in_use():
    model, before = flux_model(), model_digest(MODEL)
    answer(model, cache_prompt(model, prompt(30)))
    model.train()
    assert model_digest(model) == before


def test_the_metadata_is_plain_json(file):
    header = file.read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"]["0.flux_layers"] == "4"


def test_the_commands_save_check_and_go_on(tmp_path, monkeypatch, capsys):
    directory, other = flux_directory(tmp_path / "flux"), flux_directory(tmp_path / "other", seed=4)
    saved = tmp_path / "saved.safetensors"
    text = "The quick brown fox jumps over the lazy dog."
    main_cache_prompt(["--model", str(directory), "--prompt", text, "--prompt-cache-file", str(saved), "--show-routes"])
    printed = capsys.readouterr().out
    assert f"tokens saved in {saved}" in printed
    assert "routed layers sparse" in printed

    def generate(*flags: str) -> str:
        command = ["flux_mlx.generate", "--prompt-cache-file", str(saved), "-p", "And?", "-m", "4", *flags]
        monkeypatch.setattr(sys, "argv", command)
        main_generate()
        return capsys.readouterr().out

    assert "Generation: 4 tokens" in generate()
    with pytest.raises(SystemExit) as refused:
        generate("--model", str(other))
    assert refused.value.code == 2
    assert "was made with" in capsys.readouterr().err
    shutil.copytree(other, directory, dirs_exist_ok=True)  # another model under the same name
    with pytest.raises(SystemExit):
        generate()
    assert "was made by another model or other routers" in capsys.readouterr().err
    data = bytearray(saved.read_bytes())
    data[-9] ^= 1
    saved.write_bytes(data)
    with pytest.raises(SystemExit):
        generate()
    assert "was changed: expected SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("cache.bin", "the name must end in .safetensors, got "), ("none/cache.safetensors", "there is no folder ")],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, capsys, name, message):
    with pytest.raises(SystemExit) as refused:
        main_cache_prompt(["--model", "/nowhere", "--prompt", "x", "--prompt-cache-file", str(tmp_path / name)])
    assert refused.value.code == 2
    assert f"flux_mlx.cache_prompt: [save_prompt_cache] {message}" in capsys.readouterr().err
