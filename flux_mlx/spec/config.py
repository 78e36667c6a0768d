"""Settings of a Flux model: frozen dataclasses, validated when made, stored as JSON in `config.json`.

Every size and default of the project is defined here; command lines and backends read it from here.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Route(IntEnum):
    """The decision for one layer and one prompt. The values are the codes stored in a cache.

    UNSET must be 0: stock caches fill the rows that they add with zeros. An unset route computes as FULL.
    """

    UNSET = 0
    FULL = 1
    SPARSE = 2


PATTERNS = ("streaming", "triangle", "xattention")


def _require_int(owner: str, name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"[{owner}] {name} must be an integer >= {minimum}, got {value!r}.")


def _require_real(owner: str, name: str, value: Any, above: float, at_most: float) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not above < value <= at_most:
        raise ValueError(f"[{owner}] {name} must be a number in ({above}, {at_most}], got {value!r}.")


def _from_dict(cls: type, data: Any) -> Any:
    """Build dataclass `cls` from a JSON object, refusing keys that it does not have."""
    if not isinstance(data, dict):
        raise ValueError(f"[{cls.__name__}] expected a JSON object, got {type(data).__name__}.")
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise ValueError(f"[{cls.__name__}] unknown keys {unknown}; known keys are {known}.")
    return cls(**data)


@dataclass(frozen=True)
class PatternConfig:
    """Which keys a query of a sparse layer sees (`spec.pattern.visible`).

    Args:
        name: "streaming", "triangle" or "xattention". All three decode as streaming.
        block_size: Tokens of a block; the sizes below are rounded up to whole blocks.
        sink_tokens: First tokens of the sequence, visible to every query. 0 or more.
        window_tokens: Most recent tokens, the query itself counted. 1 or more.
        last_tokens: triangle: last queries of the prompt, which see every earlier key.
        stride: xattention: side of the tiles whose antidiagonals are scored. Divides `block_size`.
        threshold: xattention: share of a block row's attention mass to keep, in (0, 1].
        top_k_blocks: xattention: keep this many blocks of a row (first and diagonal counted) instead of
            the threshold; None uses the threshold.

    Raises:
        ValueError: A value is out of range.
    """

    name: str = "streaming"
    block_size: int = 128
    sink_tokens: int = 128
    window_tokens: int = 2048
    last_tokens: int = 128
    stride: int = 16
    threshold: float = 0.9
    top_k_blocks: int | None = None

    def __post_init__(self) -> None:
        who = "PatternConfig"
        if self.name not in PATTERNS:
            raise ValueError(f"[{who}] name must be one of {list(PATTERNS)}, got {self.name!r}.")
        _require_int(who, "block_size", self.block_size, 1)
        _require_int(who, "sink_tokens", self.sink_tokens, 0)
        _require_int(who, "window_tokens", self.window_tokens, 1)
        _require_int(who, "last_tokens", self.last_tokens, 0)
        _require_int(who, "stride", self.stride, 1)
        _require_real(who, "threshold", self.threshold, 0.0, 1.0)
        if self.top_k_blocks is not None:
            _require_int(who, "top_k_blocks", self.top_k_blocks, 1)
        if self.name == "xattention" and self.block_size % self.stride:
            raise ValueError(
                f"[{who}] stride must divide block_size, got stride {self.stride} and block_size {self.block_size}."
            )

    @property
    def sink_blocks(self) -> int:
        """ns: blocks of the sink."""
        return -(-self.sink_tokens // self.block_size)

    @property
    def window_blocks(self) -> int:
        """nl: blocks of the window, the query's own block counted."""
        return -(-self.window_tokens // self.block_size)

    @property
    def sink_span(self) -> int:
        """Tokens of the sink after rounding up to blocks."""
        return self.sink_blocks * self.block_size

    @property
    def window_span(self) -> int:
        """Tokens of the window after rounding up to blocks."""
        return self.window_blocks * self.block_size

    def window_start(self, q_pos: int) -> int:
        """First position of the local blocks of the query at `q_pos`, never below 0."""
        return max(0, (q_pos // self.block_size - self.window_blocks + 1) * self.block_size)

    @functools.cached_property
    def dense_tokens(self) -> int:
        """The longest sequence whose keys all lie in sink and window, whatever its query."""
        return self.sink_span + self.window_span

    def is_dense(self, kv_tokens: int) -> bool:
        """Whether streaming shows every one of the first `kv_tokens` keys to every later query among them."""
        return kv_tokens <= self.dense_tokens

    @classmethod
    def from_dict(cls, data: Any) -> PatternConfig:
        """Inverse of `dataclasses.asdict`. Raises ValueError on unknown keys and on bad values."""
        return _from_dict(cls, data)


ROUTER_INFIX = ".self_attn.router."
"""What every router parameter of a model has in its name, and no other parameter."""

SETTINGS_KEY = "flux"
"""Where settings stand: in config.json of a model directory, and in the metadata of a router file."""


@dataclass(frozen=True)
class RouterConfig:
    """Sizes of the layer router.

    Args:
        pool_tokens: P: tokens pooled at each end of the prompt.
        init_bias: b: bias of the FULL logit in a fresh router; positive starts training with every layer full.
        min_prefill_tokens: A stock call of fewer tokens never routes (decode, speculative verification).
    """

    pool_tokens: int = 100
    init_bias: float = 4.5
    min_prefill_tokens: int = 16

    def __post_init__(self) -> None:
        _require_int("RouterConfig", "pool_tokens", self.pool_tokens, 1)
        _require_int("RouterConfig", "min_prefill_tokens", self.min_prefill_tokens, 2)
        _require_real("RouterConfig", "init_bias", self.init_bias, -1e4, 1e4)

    @property
    def max_draft_tokens(self) -> int:
        """Drafts that one call, which holds one token more than them, verifies without being taken for a prompt."""
        return self.min_prefill_tokens - 2

    @staticmethod
    def key(layer: int, name: str) -> str:
        """Name in a model directory of the router parameter `name` (of `parameter_shapes`) of a layer."""
        return f"model.layers.{layer}{ROUTER_INFIX}{name}"

    @staticmethod
    def parameter_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes of one layer's router; every backend uses these names.

        `encoder`: Linear(D, 8D), SiLU, Linear(8D, 2D). `head`: Linear(2D, 4D), SiLU, Linear(4D, D), SiLU, Linear(D, 2).
        """
        d = head_dim
        sizes = {"encoder.0": (8 * d, d), "encoder.2": (2 * d, 8 * d)}
        sizes |= {"head.0": (4 * d, 2 * d), "head.2": (d, 4 * d), "head.4": (2, d)}
        weights = {f"{name}.weight": shape for name, shape in sizes.items()}
        return weights | {f"{name}.bias": shape[:1] for name, shape in sizes.items()}

    @classmethod
    def from_dict(cls, data: Any) -> RouterConfig:
        """Inverse of `dataclasses.asdict`. Raises ValueError on unknown keys and on bad values."""
        return _from_dict(cls, data)


RoutePolicy = str | tuple[int, ...]
MAX_LAYERS = 10_000  # bounds what a mistyped range of layers can ask for


def parse_route(text: str, name: str = "route") -> RoutePolicy:
    """Read a `--route` or `FLUX_MLX_ROUTE` value: auto, full, sparse, or the full layers as "0,2,6" or "0,6-8".

    Args:
        text: The value.
        name: What an error calls it.

    Returns:
        "auto", "full", "sparse", or the sorted tuple of full layers (every other routed layer is sparse).

    Raises:
        ValueError: Anything else.
    """
    word = text.strip()
    if word in ("auto", "full", "sparse"):
        return word
    layers: set[int] = set()
    for part in word.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            low, high = 0, -1
        if not low <= high < MAX_LAYERS:
            raise ValueError(
                f"[{name}] expected auto, full, sparse or a list of full layers like 0,2,6-8; got {text!r}."
            )
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


@dataclass(frozen=True)
class FluxConfig:
    """The `flux` section of a model's config.json.

    Args:
        pattern: What sparse layers see.
        router: Sizes of the routers.
        route: "auto" (the routers decide), "full", "sparse", or the list of full layers.
        version: Format of this section.
    """

    pattern: PatternConfig = field(default_factory=PatternConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    route: RoutePolicy = "auto"
    version: int = 1

    def __post_init__(self) -> None:
        if self.version != 1:
            raise ValueError(f"[FluxConfig] this flux_mlx reads version 1 of the flux section, got {self.version!r}.")
        if isinstance(self.route, str):
            object.__setattr__(self, "route", parse_route(self.route))
        elif isinstance(self.route, (list, tuple)):
            for layer in self.route:
                _require_int("FluxConfig", "route layer", layer, 0)
            object.__setattr__(self, "route", tuple(sorted(set(self.route))))
        else:
            raise ValueError(f"[FluxConfig] route must be a word or a list of layers, got {self.route!r}.")

    def check_layers(self, n_layers: int) -> None:
        """Raise ValueError if `route` names a layer that a model of `n_layers` layers does not have."""
        wrong = [] if isinstance(self.route, str) else [layer for layer in self.route if layer >= n_layers]
        if wrong:
            raise ValueError(f"[FluxConfig] route names layers {wrong}, but the model has layers 0 to {n_layers - 1}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        data = dataclasses.asdict(self)
        data["route"] = self.route if isinstance(self.route, str) else list(self.route)
        return data

    @classmethod
    def from_dict(cls, data: Any) -> FluxConfig:
        """Inverse of `to_dict`. Raises ValueError on unknown keys and on bad values."""
        if not isinstance(data, dict):
            raise ValueError(f"[FluxConfig] expected a JSON object, got {type(data).__name__}.")
        parts = dict(data)
        for name, part in (("pattern", PatternConfig), ("router", RouterConfig)):
            if name in parts:
                parts[name] = part.from_dict(parts[name])
        return _from_dict(cls, parts)
