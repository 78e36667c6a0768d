"""Who routes in an evaluation: routers from files, routed exactly or by chunks, and static policies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cuda_reference import baselines
from cuda_reference.scoring import Policy
from flux_mlx.spec import FluxConfig, PatternConfig, parse_route
from flux_mlx.spec.config import PATTERNS

PLACED = ("interleaved", "first", "last")


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Args:
        name: Its name in the results.
        policy: As `scoring.score` takes it; "auto" needs `routers`.
        config: Pattern and router sizes.
        routers: File of the routers.
        by_head: Routers that decide for heads.
        chunk_tokens: Route chunks of this many tokens anew; 0 routes exactly.
    """

    name: str
    policy: Policy
    config: FluxConfig
    routers: Path | None = None
    by_head: bool = False
    chunk_tokens: int = 0


def policy_of(text: str, layers: int) -> Policy:
    """A command-line policy: auto, full, sparse, a list of full layers, or interleaved:N, first:N, last:N.

    Raises:
        ValueError: Anything else.
    """
    kind, colon, number = text.partition(":")
    if colon and kind in PLACED and number.isdigit() and 0 < int(number) <= layers:
        return getattr(baselines, kind)(layers, int(number))
    route = parse_route(text.strip("[]"))
    return route if isinstance(route, str) else baselines.mask_of(list(route), layers)


def static_contender(text: str, layers: int, config: FluxConfig) -> Contender:
    """From "[NAME=]POLICY[@PATTERN]": a static policy, under another pattern if one is named.

    PATTERN is settings of the pattern as "window_tokens:512,sink_tokens:0", or the name of one, as "triangle".

    Raises:
        ValueError: Not of that form, or the policy auto.
    """
    head, equals, rest = text.rpartition("=")
    body, _, changes = rest.partition("@")
    policy = policy_of(body, layers)
    if isinstance(policy, str) and policy == "auto":
        raise ValueError("[evaluate] routers are named by --routers, not by the policy auto.")
    return Contender(head if equals else text, policy, _with_pattern(config, changes))


def _with_pattern(config: FluxConfig, changes: str) -> FluxConfig:
    """The config under the PATTERN of `static_contender`; "" changes nothing."""
    return replace(config, pattern=_changed(config.pattern, changes)) if changes else config


def _changed(pattern: PatternConfig, changes: str) -> PatternConfig:
    """The pattern with settings of `static_contender` changed. Raises ValueError if there is no such setting."""
    known, values = asdict(pattern), {}
    for change in changes.split(","):
        name, colon, value = change.partition(":")
        if not colon and change in PATTERNS:
            values["name"] = change
        elif isinstance(known.get(name), int) and value.isdigit():
            values[name] = int(value)
        else:
            raise ValueError(f"[evaluate] expected a pattern, or settings like window_tokens:512, got {change!r}.")
    return replace(pattern, **values)


def router_contenders(text: str, config: FluxConfig, chunks: Sequence[int] = ()) -> list[Contender]:
    """From "[NAME=]FILE[@PATTERN]": the routers of a file, exact and for each of `chunks` chunked ("NAME@512").

    Settings come from the file's metadata; `config` serves a file without any. PATTERN as `static_contender` has it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No safetensors file, or settings that are wrong.
    """
    name, path, changes = _named_file(text)
    found, by_head = file_settings(path)
    base = Contender(name, "auto", _with_pattern(found or config, changes), path, by_head)
    streaming = _with_pattern(base.config, "streaming")  # no chunk knows the prompt's end
    return [base, *(replace(base, name=f"{base.name}@{n}", config=streaming, chunk_tokens=n) for n in chunks)]


def _named_file(text: str) -> tuple[str, Path, str]:
    """(name, file, PATTERN) of "[NAME=]FILE[@PATTERN]", whose file may have = and @ in its path."""
    name, equals, rest = text.partition("=")
    if not equals or Path(text).is_file() or Path(text.rpartition("@")[0]).is_file():
        name, rest = "auto", text
    file, _, changes = (rest, "", "") if "@" not in rest or Path(rest).is_file() else rest.rpartition("@")
    return name, Path(file), changes


def file_settings(path: Path) -> tuple[FluxConfig | None, bool]:
    """(settings, whether they decide for heads) in the metadata of a routers file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No safetensors file, or settings that are wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"[evaluate] no such file: {path}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"[evaluate] {path} is no whole safetensors file: {error}") from None
    flux = FluxConfig.from_dict(json.loads(metadata["flux"])) if "flux" in metadata else None
    return flux, bool(json.loads(metadata.get("recipe", "{}")).get("by_head", False))
