"""Router checkpoints: both namings, settings that travel along, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig, init_weights
from flux_mlx.weights import (
    Routers,
    check_routers,
    flatten_routers,
    fresh_routers,
    has_routers,
    read_routers,
    without_routers,
    write_routers,
)

HEAD_DIMS = {1: 8, 3: 6}  # a hybrid model: layers 0 and 2 have no router
FLUX = FluxConfig(PatternConfig(block_size=32, window_tokens=96), RouterConfig(pool_tokens=17), route=(1,))
PUBLISHED = {"encoder.": "cls_feat_extractor.", "head.": "cls_router_head_agnostic."}


def published_key(key: str) -> str:
    """Our name of a router tensor in the words of the published checkpoints."""
    key = key.replace(".router.", ".mask_allocator.")
    for ours, theirs in PUBLISHED.items():
        key = key.replace(f".mask_allocator.{ours}", f".mask_allocator.{theirs}")
    return key


def assert_same(got: Routers, want: Routers) -> None:
    flat_got, flat_want = flatten_routers(got), flatten_routers(want)
    assert flat_got.keys() == flat_want.keys()
    for name, value in flat_want.items():
        assert flat_got[name].dtype == mx.float32
        np.testing.assert_array_equal(np.array(flat_got[name]), np.array(value), err_msg=name)


@pytest.fixture
def routers() -> Routers:
    return fresh_routers(HEAD_DIMS, FLUX.router, seed=5)


@pytest.fixture
def write(tmp_path: Path, routers: Routers) -> Callable[..., Path]:
    """Write the routers' file with some tensors changed (None: left out)."""

    def save(**changes: mx.array | None) -> Path:
        tensors = flatten_routers(routers) | {key.replace("__", "."): value for key, value in changes.items()}
        path = tmp_path / "routers.safetensors"
        mx.save_safetensors(str(path), {key: value for key, value in tensors.items() if value is not None})
        return path

    return save


def test_fresh_routers_are_those_of_the_specification(routers: Routers) -> None:
    for layer, head_dim in HEAD_DIMS.items():
        want = init_weights(head_dim, FLUX.router, np.random.default_rng([5, layer]))
        assert_same({layer: routers[layer]}, {layer: {name: mx.array(value) for name, value in want.items()}})
    other = fresh_routers({1: 8}, FLUX.router, seed=6)
    assert not np.array_equal(np.array(other[1]["encoder.0.weight"]), np.array(routers[1]["encoder.0.weight"]))
    assert_same({1: routers[1]}, fresh_routers({1: 8}, FLUX.router, seed=5))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_routers_and_settings_survive_a_file(dtype: mx.Dtype, routers: Routers, tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    write_routers(path, routers, FLUX, dtype)
    got = read_routers(path)
    rounded = {i: {k: v.astype(dtype).astype(mx.float32) for k, v in part.items()} for i, part in routers.items()}
    assert_same(got.routers, rounded)
    assert got.flux == FLUX
    assert [file.name for file in tmp_path.iterdir()] == ["routers.safetensors"]
    with pytest.raises(FileExistsError, match="exists already"):
        write_routers(path, routers, FLUX)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_published_checkpoint(dtype: mx.Dtype, routers: Routers, tmp_path: Path) -> None:
    base = {f"model.layers.{i}.self_attn.{x}_proj.weight": mx.ones((4, 3), dtype) * i for i in (1, 3) for x in "qkv"}
    rest = {"model.layers.1.self_attn.o_proj.weight": mx.ones((3, 4)), "model.norm.weight": mx.ones(3)}
    state = {"model.layers.1.self_attn.attn_mask_log_alphas": mx.ones(2), "model.sparsity_lambda1_task": mx.ones(5)}
    tensors = {published_key(key): value.astype(dtype) for key, value in flatten_routers(routers).items()}
    first = {key: value for i, (key, value) in enumerate(tensors.items()) if i % 2}
    second = {key: value for key, value in tensors.items() if key not in first}
    mx.save_safetensors(str(tmp_path / "model-1.safetensors"), first | base | rest)
    mx.save_safetensors(str(tmp_path / "model-2.safetensors"), second | state)
    settings = {"pool_size": 150.0, "sink_size": 256, "local_window_size": 1024, "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    got = read_routers(tmp_path)
    rounded = {i: {k: v.astype(dtype).astype(mx.float32) for k, v in part.items()} for i, part in routers.items()}
    assert_same(got.routers, rounded)
    assert got.projections.keys() == base.keys()
    assert {value.dtype for value in got.projections.values()} == {dtype}
    assert got.flux == FluxConfig(PatternConfig(sink_tokens=256, window_tokens=1024), RouterConfig(pool_tokens=150))
    assert has_routers(tmp_path)
    assert without_routers(first | second | base | rest | state).keys() == (base | rest).keys()


def test_projections_beside_our_routers_are_not_imported(write: Callable[..., Path]) -> None:
    got = read_routers(write(model__layers__1__self_attn__q_proj__weight=mx.ones((4, 3))))
    assert got.projections == {}
    assert got.flux is None


def test_check_accepts_what_fits(routers: Routers) -> None:
    check_routers(routers, HEAD_DIMS)


@pytest.mark.parametrize(
    ("head_dims", "reason"),
    [
        ({1: 8}, r"has \[3\], which the model lacks"),
        ({1: 8, 3: 6, 4: 8}, r"lacks \[4\]"),
        ({1: 8, 3: 16}, r"encoder.0.weight of layer 3 must have shape \[128, 16\] for .* 16, got \[48, 6\]"),
    ],
)
def test_routers_of_another_model(head_dims: dict[int, int], reason: str, routers: Routers) -> None:
    with pytest.raises(ValueError, match=reason):
        check_routers(routers, head_dims)


def test_router_parameters_that_are_missing_or_unknown(routers: Routers) -> None:
    routers[3]["task_embedding.weight"] = routers[3].pop("head.0.bias")
    reason = r"layer 3: the file lacks \['head.0.bias'\] and has \['task_embedding.weight'\]"
    with pytest.raises(ValueError, match=reason):
        check_routers(routers, HEAD_DIMS)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("head.4.bias", mx.array([0.0, float("nan")]), r"head.4.bias of layer 3 has 1 values that are not finite"),
        ("head.4.bias", mx.array([float("inf")] * 2), r"head.4.bias of layer 3 has 2 values that are not finite"),
        ("head.4.bias", mx.array([0, 1]), r"head.4.bias of layer 3 must be floating point, got mlx.core.int32"),
    ],
)
def test_router_values_that_are_refused(name: str, value: mx.array, reason: str, write: Callable[..., Path]) -> None:
    path = write(**{RouterConfig.key(3, name).replace(".", "__"): value})
    with pytest.raises(ValueError, match=reason) as caught:
        read_routers(path)
    assert str(path) in str(caught.value)


def test_a_parameter_in_both_namings(write: Callable[..., Path]) -> None:
    path = write(**{published_key(RouterConfig.key(1, "head.4.bias")).replace(".", "__"): mx.zeros(2)})
    with pytest.raises(ValueError, match=r"a second head.4.bias of layer 1"):
        read_routers(path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_file(size: int, write: Callable[..., Path]) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"routers.safetensors is no whole safetensors file"):
        read_routers(path)


def test_files_without_routers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_routers(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors in"):
        read_routers(tmp_path)
    mx.save_safetensors(str(tmp_path / "base.safetensors"), {"model.norm.weight": mx.ones(3)})
    assert not has_routers(tmp_path)
    with pytest.raises(ValueError, match="has no routers"):
        read_routers(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"pattern": {"window_tokens": 0}}', '{"colour": 1}'])
def test_wrong_settings_in_a_router_file(text: str, routers: Routers, tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    mx.save_safetensors(str(path), flatten_routers(routers), metadata={"flux": text})
    with pytest.raises(ValueError, match=r"routers.safetensors: its settings are wrong"):
        read_routers(path)


def test_wrong_settings_of_a_published_checkpoint(write: Callable[..., Path], tmp_path: Path) -> None:
    write()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "pool_size": [100]}))
    with pytest.raises(ValueError, match=r"config.json: its settings are wrong"):
        read_routers(tmp_path)
