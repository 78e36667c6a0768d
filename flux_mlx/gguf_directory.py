"""A Llama GGUF as a plain model directory, which stock mlx-lm loads."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model

from flux_mlx.gguf import GGUFFile
from flux_mlx.gguf_llama import check_tensors, llama_config, llama_tensors
from flux_mlx.gguf_tokenizer import write_tokenizer
from flux_mlx.model_directory import CARD_NAME, Base, building


def gguf_base(file: GGUFFile) -> Base:
    """Name and licence that the metadata of `file` state."""
    stated = {key: file.metadata.get(f"general.{key}") for key in ("name", "license")}
    texts = {key: value for key, value in stated.items() if isinstance(value, str) and value.isprintable()}
    return Base(texts.get("name") or file.path.stem, license=texts.get("license"))


def _card(file: GGUFFile, base: Base, dtype: str) -> str:
    kinds = ", ".join(sorted({info.quant_type.name for info in file.tensors.values()}))
    front = f"---\nlicense: {json.dumps(base.license)}\n---\n\n" if base.license else ""
    text = f"Read from `{file.path.name}` ({kinds}) by flux-mlx, dequantised, written as {dtype}.\n"
    organization = file.metadata.get("general.organization")
    made_by = f"Made by {organization}.\n" if isinstance(organization, str) and organization.isprintable() else ""
    return f"{front}# {base.name}\n\n{made_by}{text}"


def _cast(x: np.ndarray, dtype: str) -> mx.array:
    """Cast at once: a cast left to be done later would keep the float32 tensor."""
    cast = mx.array(x).astype(getattr(mx, dtype))
    mx.eval(cast)
    return cast


def write_plain_directory(gguf_path: str | Path, out: str | Path, dtype: str = "float32") -> None:
    """Write the model, tokenizer and config of a Llama GGUF as a directory that stock mlx-lm loads.

    A licence text that lies beside the file as `<name of the file without .gguf>.LICENSE` goes along.

    Args:
        gguf_path: The GGUF.
        out: New directory.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        FileNotFoundError: There is no such GGUF.
        FileExistsError: `out` exists.
        GGUFError: The file is damaged, or not a Llama model with a BPE tokenizer that is read.
    """
    file = GGUFFile(gguf_path)
    config = llama_config(file)
    check_tensors(file, config)
    with building(Path(out)) as part:
        part.mkdir()
        write_tokenizer(file, config, part)
        model = llama.Model(llama.ModelArgs.from_dict(config))
        model.load_weights([(name, _cast(x, dtype)) for name, x in llama_tensors(file, config)])
        save_model(part, model, donate_model=True)
        save_config({**config, "torch_dtype": dtype}, part / "config.json")
        (part / CARD_NAME).write_text(_card(file, gguf_base(file), dtype), "utf-8")
        license_text = file.path.with_suffix(".LICENSE")
        if license_text.is_file():
            (part / "LICENSE").write_bytes(license_text.read_bytes())
