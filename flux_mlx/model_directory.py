"""What makes a directory a Flux model directory, and how directories are written: whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import string
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from flux_mlx import __version__
from flux_mlx.spec import FluxConfig

SHIM_NAME = "flux_model.py"
"""`model_file` of a Flux model directory."""

CARD_NAME = "README.md"
BASE_CARD_NAME = "BASE_README.md"
CARRIED_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "*.tiktoken", "*.jinja", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
    BASE_CARD_NAME,
)  # fmt: skip
"""Files of the source, by glob, that a Flux model directory gets unchanged."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A new file or directory that appears whole: yields a path beside `out` to write to, renamed to `out` at the end.

    What was written is removed if the block raises. The yielded path does not exist yet and has the suffix of `out`.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: The directory to put it in does not exist.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"[building] {out} exists already; remove it or choose another name.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"[building] there is no directory {out.parent} to put {out.name} in.")
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        part = scratch / f"part{out.suffix}"
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(scratch)


def shim_text() -> str:
    """Text of the `model_file` that every Flux model directory has, the same in each."""
    return resources.files("flux_mlx").joinpath("data", SHIM_NAME).read_text("utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: It is not JSON, or nested too deeply; the message names it.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[read_json] {path} is not JSON: {error}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no JSON object, or has no `model_type`.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"[read_config] {directory} is no model directory: it has no config.json.")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"[read_config] {path} must be a JSON object with a model_type.")
    return config


def is_flux_config(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a Flux model directory."""
    return config.get("model_file") == SHIM_NAME and "flux" in config


def flux_config(config: dict[str, Any], flux: FluxConfig) -> dict[str, Any]:
    """config.json of the Flux model of base `config`. `model_type` stays the base's: the shim builds on it."""
    return {**config, "flux": flux.to_dict(), "model_file": SHIM_NAME}


def carry_files(source: Path, out: Path) -> None:
    """Copy tokenizer, generation settings, licence and base card of `source` into `out`.

    Raises:
        FileNotFoundError: `source` has no tokenizer.
    """
    if not any((source / name).is_file() for name in _TOKENIZER_FILES) and not any(source.glob("*.tiktoken")):
        raise FileNotFoundError(f"[carry_files] {source} has no tokenizer: expected one of {list(_TOKENIZER_FILES)}.")
    for pattern in CARRIED_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
    if (source / CARD_NAME).is_file() and not is_flux_config(read_config(source)):
        shutil.copyfile(source / CARD_NAME, out / BASE_CARD_NAME)


def card_field(directory: Path, field: str) -> str | None:
    """A one-line field, as "license", of the front matter of a model directory's card; None if it has none."""
    card = directory / CARD_NAME
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---[ \t]*\n(.*?)\n---", text, re.DOTALL)
    found = front and re.search(rf"^{re.escape(field)}:[ \t]*(\S.*?)[ \t]*$", front[1], re.MULTILINE)
    return found[1].strip("'\"") if found else None


@dataclass(frozen=True)
class Base:
    """The model that a Flux model was made of, for the card.

    Args:
        name: What to call it: hub id, directory or GGUF name.
        hub_id: Its id on the model hub, if known.
        license: Its licence as its card calls it, if known.
    """

    name: str
    hub_id: str | None = None
    license: str | None = None


def front_matter(base: Base) -> str:
    """The lines between the dashes of a card; values are JSON, which is YAML."""
    fields = {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx", "flux-attention"]}
    if base.license:
        fields["license"] = base.license
    if base.hub_id:
        fields["base_model"] = base.hub_id
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in fields.items())


def model_card(base: Base, flux: FluxConfig, changes: Sequence[str]) -> str:
    """README.md of a Flux model directory: base, licence, changes, how to run it."""
    template = resources.files("flux_mlx").joinpath("data", "model_card.md").read_text("utf-8")
    route = flux.route if isinstance(flux.route, str) else ",".join(map(str, flux.route))
    return string.Template(template).substitute(
        front_matter=front_matter(base),
        name=f"{base.name.rstrip('/').rpartition('/')[2]}-flux",
        base=base.name,
        version=__version__,
        changes="\n".join(f"- {line}" for line in changes),
        license=base.license or "not stated by its files",
        shim=SHIM_NAME,
        route=route,
    )
