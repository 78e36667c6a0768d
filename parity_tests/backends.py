"""The backend table: one record per implementation. Tests are written once and run for each.

A record speaks numpy: float32 arrays in (already rounded to the dtype), float32 arrays out.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux_mlx import spec
from flux_mlx.spec import PatternConfig, Route
from parity_tests.strategies import Case
from parity_tests.tolerances import DTYPES, baseline_attention

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Attend = Callable[[Arrays, Case], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Router:
    """The router's steps on numpy arrays; queries `[B, L, HQ, D]` of a dtype, weights float32 by name."""

    pool_queries: Callable[[np.ndarray, str, int], np.ndarray]
    route_logits: Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]
    decide: Callable[[np.ndarray], list[Route]]
    pool_rows: Callable[[np.ndarray, str, int, list[int]], np.ndarray] | None = None  # right-padded, with row lengths


@dataclass(frozen=True)
class BlockChoice:
    """XAttention's steps: mass from (q, k, dtype, pattern), kept blocks from (mass, first block, pattern)."""

    block_mass: Callable[[np.ndarray, np.ndarray, str, PatternConfig], np.ndarray]
    choose_blocks: Callable[[np.ndarray, int, PatternConfig], np.ndarray]
    select_blocks: Callable[[np.ndarray, np.ndarray, str, PatternConfig], np.ndarray]


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Args:
        name: Its name in test ids and in `--require-backends`.
        attend: (q, k, v) and a `Case` (its pattern, prompt_tokens, scale and dtype count; sizes are the arrays') to
            (out `[B, HQ, L, D]`, lse `[B, HQ, L]` or None where the backend does not return it).
        missing: Why it cannot run here; "" if it can.
        router: The router's steps, if this backend has one of its own.
        blocks: XAttention's steps, likewise.
        dtypes: What its attention takes.
        head_dims: Head dims drawn by hypothesis.
        block_sizes: Block sizes drawn by hypothesis.
        strides: XAttention's strides drawn by hypothesis.
        supports: Whether it takes a case at all.
        rounds_scores: Its scores are rounded to the dtype before the softmax.
        same_bits: Equal calls give equal bits. Not so where a BLAS orders its sums by where arrays lie in memory; there
            "the same" means within the error budget.
        share: Share of the profile's examples: below 1 for slow backends, which also get smaller ones.
        nan_fill: Context in which fresh outputs are filled with NaN; None where memory cannot be seen.
    """

    name: str
    attend: Attend
    missing: Callable[[], str] = lambda: ""
    router: Router | None = None
    blocks: BlockChoice | None = None
    dtypes: tuple[str, ...] = DTYPES
    head_dims: tuple[int, ...] = (8, 16, 24, 64)
    block_sizes: tuple[int, ...] = (1, 4, 16, 32)
    strides: tuple[int, ...] = (1, 2, 4)
    supports: Callable[[Case], bool] = lambda case: True
    rounds_scores: bool = False
    same_bits: bool = True
    share: float = 1.0
    nan_fill: Callable[[], contextlib.AbstractContextManager] | None = None

    @property
    def is_slow(self) -> bool:
        """Whether it gets fewer and smaller examples."""
        return self.share < 1


def needs(*modules: str) -> Callable[[], str]:
    """A `missing` that looks for importable modules."""

    def missing() -> str:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"cannot import {', '.join(absent)}" if absent else ""

    return missing


def masked_backend(
    name: str,
    mask_of: Callable[[Case, np.ndarray, np.ndarray], np.ndarray],
    attention: Callable = baseline_attention,
    **fields: Any,
) -> Backend:
    """A numpy backend from a mask: `mask_of(case, q, k)`. Mutants are made this way too."""

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = qkv
        return attention(q, k, v, mask_of(case, q, k), case.score_scale, case.dtype)

    return Backend(name, attend, **fields)


def spec_mask(case: Case, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """What the queries of a call see, by the specification: bool, broadcasts to `[B, HQ, L, S]`."""
    pattern, q_tokens, kv_tokens = case.pattern, q.shape[2], k.shape[2]
    if pattern is None:
        return np.tri(q_tokens, kv_tokens, kv_tokens - q_tokens, dtype=bool)
    if pattern.name == "xattention" and case.prompt_tokens is not None:
        return spec.expand_blocks(spec.select_blocks(q, k, pattern), pattern.block_size, q_tokens, kv_tokens)
    return spec.visible_mask(pattern, q_tokens, kv_tokens, case.prompt_tokens)


def float32_pool(queries: np.ndarray, dtype: str, pool_tokens: int) -> np.ndarray:
    """The router's baseline: float32 sums of the same numbers."""
    ends = np.concatenate([queries[:, :pool_tokens], queries[:, -pool_tokens:]], axis=1)
    return ends.mean(axis=(1, 2), dtype=np.float32)


def float32_pool_rows(queries: np.ndarray, dtype: str, pool_tokens: int, lengths: list[int]) -> np.ndarray:
    """`float32_pool` of the first tokens of each row."""
    rows = [float32_pool(queries[b : b + 1, :n], dtype, pool_tokens) for b, n in enumerate(lengths)]
    return np.concatenate(rows)


def float32_logits(weights: dict[str, np.ndarray], pooled: np.ndarray) -> np.ndarray:
    """The router's baseline: the network in float32."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = linear("encoder.2", spec.router.silu(linear("encoder.0", pooled)))
    return linear("head.4", spec.router.silu(linear("head.2", spec.router.silu(linear("head.0", x)))))


def float32_mass(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
    """XAttention's baseline: one antidiagonal step t after the other, everything in float32."""
    s, first = pattern.stride, k.shape[2] - q.shape[2]
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    q, k = (np.pad(x, ((0, 0), (0, 0), (n, -(n + x.shape[2]) % s), (0, 0))) for x, n in ((q, first % s), (k, 0)))
    scores = sum(q[:, :, s - 1 - t :: s] @ k[:, :, t::s].swapaxes(-1, -2) for t in range(s))
    scores = scores / np.float32(q.shape[-1] ** 0.5 * s)
    rows, columns = first // s + np.arange(scores.shape[2]), np.arange(scores.shape[3])
    scores = np.where(columns <= rows[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    row_blocks, column_blocks = rows * s // pattern.block_size, columns * s // pattern.block_size
    in_row = np.float32(row_blocks == np.unique(row_blocks)[:, None])
    return in_row @ weights @ np.float32(column_blocks[:, None] == np.unique(column_blocks))


def _choose(mass: np.ndarray, first: int, pattern: PatternConfig) -> np.ndarray:
    return spec.choose_blocks(mass, first, pattern.threshold, pattern.top_k_blocks)


NUMPY = masked_backend(
    "numpy",
    spec_mask,
    router=Router(float32_pool, float32_logits, spec.decide, float32_pool_rows),
    blocks=BlockChoice(float32_mass, _choose, lambda q, k, dtype, pattern: spec.select_blocks(q, k, pattern)),
)
