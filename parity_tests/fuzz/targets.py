"""What is fuzzed: a valid file each, a function that reads it, and what counts as a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from flux_mlx import load
from flux_mlx.adapters import CONFIG_NAME, WEIGHTS_NAME, load_adapters
from flux_mlx.cache_files import load_prompt_cache, save_prompt_cache
from flux_mlx.cache_prompt import cache_prompt
from flux_mlx.gguf import GGUFFile
from flux_mlx.gguf_llama import check_tensors, llama_config
from flux_mlx.spec import RouterConfig
from flux_mlx.weights import read_routers
from parity_tests.tiny_adapters import adapted, adapter_directory
from parity_tests.tiny_directories import flux_directory, router_file
from parity_tests.tiny_gguf import TinyLlama
from parity_tests.tiny_models import flux_model, prompt

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}


@dataclass(frozen=True)
class Target:
    """One loader.

    Args:
        name: For the command line.
        file: A valid file, which mutants replace.
        read: Reads the file, or the directory that it lies in.
        stamped: Whether any changed byte must be an error.
    """

    name: str
    file: Path
    read: Callable[[], object]
    stamped: bool = False

    def failure(self, mutant: bytes, valid: bytes) -> str | None:
        """Read a mutant; what is wrong with how that went, or None."""
        self.file.write_bytes(mutant)
        try:
            self.read()
        except (ValueError, OSError) as error:
            named = self.file.name in str(error) or self.file.parent.name in str(error)
            return None if named else f"does not name the file: {type(error).__name__}: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "loaded silently" if self.stamped and mutant != valid else None


def _read_gguf(path: Path) -> None:
    file = GGUFFile(path)
    check_tensors(file, llama_config(file))


def _directory_part(model: Path, name: str, label: str) -> Target:
    copy = model.with_name(f"{model.name}-{label}")
    shutil.copytree(model, copy)
    return Target(label, copy / name, partial(load, copy))


def _router_bytes(model: Path) -> Target:
    """The bytes of one router tensor, in a file of their own that is put into the weights before they are read."""
    copy = model.with_name(f"{model.name}-router-bytes")
    shutil.copytree(model, copy)
    weights, part = copy / "model.safetensors", copy / "tensor.bin"
    valid = weights.read_bytes()
    data = 8 + int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8:data])
    start, stop = (data + offset for offset in header[RouterConfig.key(1, "head.4.weight")]["data_offsets"])
    part.write_bytes(valid[start:stop])

    def read() -> None:
        weights.write_bytes(valid[:start] + part.read_bytes() + valid[stop:])
        load(copy)

    return Target("router-bytes", part, read, stamped=True)


def _adapter_part(adapters: Path, name: str, label: str) -> Target:
    copy = adapters.with_name(f"{adapters.name}-{label}")
    shutil.copytree(adapters, copy)
    return Target(label, copy / name, lambda: load_adapters(flux_model(**SIZES), copy))


def make_targets(folder: Path) -> list[Target]:
    """All targets, their valid files in `folder`."""
    model = flux_directory(folder / "model", **SIZES)
    (model / "generation_config.json").write_text('{"eos_token_id": [256, 3], "temperature": 0.6, "top_p": 0.95}')
    small = flux_model(**SIZES)
    cache = folder / "cache.safetensors"
    save_prompt_cache(cache, cache_prompt(small, prompt(20)), small)
    routers = router_file(folder / "routers.safetensors", **SIZES)
    adapters = adapter_directory(folder / "adapters", adapted(flux_model(**SIZES)))
    gguf = TinyLlama().write(folder / "tiny.gguf")
    mx.clear_cache()
    return [
        _directory_part(model, "config.json", "config"),
        _directory_part(model, "model.safetensors", "weights"),
        _router_bytes(model),
        _directory_part(model, "tokenizer_config.json", "tokenizer"),
        _directory_part(model, "tokenizer.json", "vocabulary"),
        _directory_part(model, "generation_config.json", "generation"),
        Target("routers", routers, partial(read_routers, routers), stamped=True),
        Target("cache", cache, partial(load_prompt_cache, cache, small), stamped=True),
        _adapter_part(adapters, CONFIG_NAME, "adapter-config"),
        _adapter_part(adapters, WEIGHTS_NAME, "adapter-weights"),
        Target("gguf", gguf, partial(_read_gguf, gguf)),
    ]
