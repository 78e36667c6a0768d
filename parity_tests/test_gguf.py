"""GGUF import: what is read equals what was written, and damaged files end in one clear error."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from flux_mlx.gguf import GGUFError, GGUFFile
from flux_mlx.gguf_directory import write_plain_directory
from flux_mlx.gguf_llama import llama_config, unpermute
from parity_tests.tiny_gguf import TinyLlama, permute, tokens

MAX_IMPORT_BYTES = 100 << 20
QUANTIZED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyLlama().write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def import_error(tmp_path: Path, **wrong: object) -> str:
    """Message of the one error that importing a wrong file raises; nothing may be left behind."""
    path = TinyLlama(**wrong).write(tmp_path / "wrong.gguf")
    with pytest.raises(GGUFError) as caught:
        write_plain_directory(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.gguf"]
    assert str(path) in str(caught.value)
    return str(caught.value)


# Container


def test_file_is_what_the_gguf_package_reads(tiny: Path) -> None:
    ours, theirs = GGUFFile(tiny), gguf.GGUFReader(tiny)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert fields.keys() == ours.metadata.keys()
    for key, value in fields.items():
        got = ours.metadata[key]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value, key
    assert [info.name for info in theirs.tensors] == list(ours.tensors)
    for info in theirs.tensors:
        assert ours.tensors[info.name].shape == tuple(info.shape[::-1])
        np.testing.assert_array_equal(ours.tensor(info.name), gguf.dequantize(info.data, info.tensor_type))


@pytest.mark.parametrize("name", QUANTIZED)
def test_dequantized_tensor_is_near_the_written_one(name: str, tmp_path: Path) -> None:
    quant = gguf.GGMLQuantizationType[name]
    llama = TinyLlama(quant=quant)
    got = GGUFFile(llama.write(tmp_path / "a.gguf")).tensor("blk.2.ffn_down.weight")
    want = llama.weights()["model.layers.2.mlp.down_proj.weight"]
    assert got.dtype == np.float32
    bits = {"F32": 30, "BF16": 8, "F16": 10}.get(name) or int(name[1])
    assert np.abs(got - want).max() <= 2.0**-bits * 2 * np.abs(want).max()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_k_quants_are_read_row_by_row(name: str, tmp_path: Path) -> None:
    quant = gguf.GGMLQuantizationType[name]
    block_bytes = gguf.GGML_QUANT_SIZES[quant][1]
    stored = np.random.default_rng(0).integers(0, 60, (3, 2 * block_bytes), dtype=np.uint8)  # scales stay finite
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", arch=None)
    writer.add_tensor("x", stored, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = GGUFFile(tmp_path / "k.gguf").tensor("x")
    assert got.shape == (3, 512)
    np.testing.assert_array_equal(got[1], gguf.dequantize(stored[1:2], quant)[0])


@pytest.mark.parametrize("size", [0, 3, 23, 24, 200, 5000, -4097, -1])
def test_truncated_file(size: int, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:size])
    with pytest.raises(GGUFError, match=r"cut\.gguf"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("position", "data", "reason"),
    [
        (0, b"GGML", "starts with b'GGUF'"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "version 50331648"),
        (8, struct.pack("<Q", 2**40), "tensors claimed"),
        (16, struct.pack("<Q", 2**60), "metadata keys claimed"),
        (24, struct.pack("<Q", 2**63), "claims 9223372036854775808 bytes"),
        (24, struct.pack("<Q", 2**23), "bytes at byte 32, but"),
    ],
)
def test_header_claims_too_much(position: int, data: bytes, reason: str, tiny: Path, tmp_path: Path) -> None:
    content = bytearray(tiny.read_bytes())
    content[position : position + len(data)] = data
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(GGUFError, match=reason):
        GGUFFile(tmp_path / "bad.gguf")


def header(keys: bytes = b"", tensors: bytes = b"", n_keys: int = 0, n_tensors: int = 0) -> bytes:
    """A hand-made file with 4 KiB of data."""
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys) + keys + tensors + bytes(4096)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, start)


BAD_HEADERS = {
    "is not UTF-8": header(text(b"\xff") + struct.pack("<IB", 0, 1), n_keys=1),
    "occurs twice": header(2 * (text(b"a") + struct.pack("<IB", 0, 1)), n_keys=2),
    "value type 99": header(text(b"a") + struct.pack("<IB", 99, 1), n_keys=1),
    "array of value type 9": header(text(b"a") + struct.pack("<IIQ", 9, 9, 1), n_keys=1),
    "items of a claimed": header(text(b"a") + struct.pack("<IIQ", 9, 0, 2**40), n_keys=1),
    "power of two": header(text(b"general.alignment") + struct.pack("<II", 4, 0), n_keys=1),
    "has 0 axes": header(tensors=tensor(b"t", ()), n_tensors=1),
    "has 5 axes": header(tensors=tensor(b"t", (1,) * 5), n_tensors=1),
    "has type 12345": header(tensors=tensor(b"t", (4,), kind=12345), n_tensors=1),
    "no rows of whole blocks": header(tensors=tensor(b"t", (33, 2), kind=8), n_tensors=1),
    "has shape \\[0\\]": header(tensors=tensor(b"t", (0,)), n_tensors=1),
    "truncated": header(tensors=tensor(b"t", (2**33, 2**33)), n_tensors=1),
    "tensor 't' occurs twice": header(tensors=tensor(b"t", (8,)) + tensor(b"t", (8,), start=32), n_tensors=2),
    "inside another tensor": header(tensors=tensor(b"t", (64,)) + tensor(b"u", (8,), start=32), n_tensors=2),
    "unaligned": header(tensors=tensor(b"t", (8,), start=4), n_tensors=1),
    "type I32, which gguf cannot": header(tensors=tensor(b"t", (8,), kind=26), n_tensors=1),
}


@pytest.mark.parametrize("reason", BAD_HEADERS)
def test_bad_header(reason: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(BAD_HEADERS[reason])
    with pytest.raises(GGUFError, match=reason):
        GGUFFile(tmp_path / "bad.gguf")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        GGUFFile(tmp_path / "none.gguf")


# Model


@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(1, 4))
def test_unpermute_undoes_permute(heads: int, half: int, columns: int) -> None:
    rows = np.arange(heads * 2 * half * columns).reshape(-1, columns)
    np.testing.assert_array_equal(unpermute(permute(rows, heads), heads), rows)
    np.testing.assert_array_equal(unpermute(permute(rows[:, 0], heads), heads), rows[:, 0])


@pytest.mark.parametrize("llama", [TinyLlama(), TinyLlama(tied=False, bias=True)], ids=["tied", "untied with biases"])
def test_plain_directory_holds_the_written_weights(llama: TinyLlama, tmp_path: Path) -> None:
    write_plain_directory(llama.write(tmp_path / "tiny.gguf"), tmp_path / "plain")
    model, config = load_model(tmp_path / "plain")
    got, want = dict(tree_flatten(model.parameters())), llama.weights()
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(np.array(got[name]), value, err_msg=name)
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 50000.0
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)
    assert config["tie_word_embeddings"] is llama.tied


def test_plain_directory_in_another_dtype_with_licence(tmp_path: Path) -> None:
    path = TinyLlama().write(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.LICENSE").write_text("the licence")
    write_plain_directory(path, tmp_path / "plain", "bfloat16")
    model, config = load_model(tmp_path / "plain")
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.bfloat16}
    assert config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "plain" / "LICENSE").read_text() == "the licence"
    assert 'license: "apache-2.0"' in (tmp_path / "plain" / "README.md").read_text()


def rope_factors(factor: float, head_dim: int, theta: float) -> np.ndarray:
    """The frequency divisors of Llama 3.1, as a loop over wavelengths."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_rope_scaling_is_recovered(tmp_path: Path) -> None:
    table = {"rope_freqs.weight": rope_factors(32.0, 32, 50000.0)}
    llama3 = llama_config(GGUFFile(TinyLlama(tensors=table).write(tmp_path / "a.gguf")))
    assert llama3["rope_scaling"]["rope_type"] == "llama3"
    assert llama3["rope_scaling"]["factor"] == 32.0
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    linear = llama_config(GGUFFile(TinyLlama(changes=keys).write(tmp_path / "b.gguf")))
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert "rope_scaling" not in llama_config(GGUFFile(TinyLlama().write(tmp_path / "c.gguf")))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not read"),
        ({"general.architecture": None}, "general.architecture is missing"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.block_count": 2**31 - 1}, "block_count is 2147483647"),
        ({"llama.block_count": 4}, "block_count is 4, but there are only 29 tensors"),
        ({"llama.block_count": 2}, "Llama does not have: \\['blk.2"),
        ({"llama.block_count": "three"}, "must be one int, got str"),
        ({"llama.embedding_length": 0}, "must be from 1 to"),
        ({"llama.embedding_length": 65}, "must have shape"),
        ({"llama.attention.head_count_kv": 3}, "heads must divide"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, "must be one int, got ndarray"),
        ({"llama.attention.value_length": 16}, "expected the head size 32"),
        ({"llama.rope.dimension_count": 16}, "expected the head size 32"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be positive and finite"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model 'bert' is not read"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores must be a ndarray"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "scores has 1 items for 270 tokens"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [float("inf")] * 270}, "that are not finite"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model must be a str"),
        ({"tokenizer.ggml.pre": "viking"}, "pre-tokenizer 'viking' is not read"),
        ({"tokenizer.ggml.tokens": [*tokens()[:-1], "t"]}, "has a token twice"),
        ({"tokenizer.ggml.tokens": [*tokens(), "more"]}, "token_type has"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 items"),
        ({"tokenizer.ggml.merges": ["q q"]}, "merge 0 'q q'"),
        ({"tokenizer.ggml.merges": ["the"]}, "merge 0 'the'"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id must be below"),
    ],
)
def test_metadata_that_is_refused(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    message = import_error(tmp_path, changes=changes)
    assert regex.search(reason, message), message


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"blk.1.attn_q.weight": None}, "missing: \\['blk.1.attn_q.weight'\\]"),
        ({"blk.1.attn_sinks.weight": np.ones(4, np.float32)}, "Llama does not have: \\['blk.1.attn_sinks.weight'\\]"),
        ({"blk.1.attn_norm.weight": np.ones(65, np.float32)}, "must have shape \\[64\\], got \\[65\\]"),
        ({"token_embd.weight": np.ones((5, 64), np.float32)}, "270 tokens for 5 rows"),
        ({"token_embd.weight": None}, "no tensor 'token_embd.weight'"),
        ({"blk.0.ffn_norm.weight": np.full(64, np.nan, np.float32)}, "'blk.0.ffn_norm.weight' has values that are not"),
        ({"blk.0.ffn_norm.weight": np.ones(64, np.int32)}, "'blk.0.ffn_norm.weight' has type I32"),
        ({"rope_freqs.weight": np.arange(1, 17, dtype=np.float32)}, "not the table of Llama 3.1"),
    ],
)
def test_tensors_that_are_refused(tensors: dict[str, np.ndarray | None], reason: str, tmp_path: Path) -> None:
    message = import_error(tmp_path, tensors=tensors)
    assert regex.search(reason, message), message


def test_existing_output_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        write_plain_directory(tiny, tmp_path / "plain")


# Mutations

POSITIONS = st.one_of(st.integers(0, 200), st.integers(0, 20_000))
MUTATIONS = st.lists(
    st.tuples(
        POSITIONS,
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([b"\x00" * 8, b"\xff" * 8, b"\xff" * 4, struct.pack("<Q", 2**31), struct.pack("<Q", 1)]),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS, cut=st.none() | st.integers(0, 60_000))
def test_mutated_file_is_imported_or_refused(
    mutations: list[tuple[int, bytes]], cut: int | None, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mutant")
    content = bytearray(tiny.read_bytes())
    for position, data in mutations:
        content[position : position + len(data)] = data
    path = folder / "mutant.gguf"
    path.write_bytes(content[:cut])
    tracemalloc.start()
    try:
        write_plain_directory(path, folder / "plain")
        reason, left = str(path), {"mutant.gguf", "plain"}
    except GGUFError as error:
        reason, left = str(error), {"mutant.gguf"}
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < MAX_IMPORT_BYTES
    assert str(path) in reason
    assert {file.name for file in folder.iterdir()} == left
