"""Small structured cases for the property suite. Tensors come from a seed; axes have different sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

from flux_mlx.spec import PatternConfig, visible_mask
from parity_tests.tolerances import round_to

if TYPE_CHECKING:
    from parity_tests.backends import Backend

VALUES = ("normal", "huge scores", "equal keys", "uneven keys")


@dataclass(frozen=True)
class Case:
    """One attention call.

    Args:
        batch, kv_heads, group, q_tokens, kv_tokens, head_dim: B, HKV, HQ / HKV, L, S, D.
        pattern: What a query sees; None is full attention.
        prompt_tokens: As in `sparse_attention`.
        scale: None is D**-0.5.
        dtype: "float32", "float16" or "bfloat16": the inputs are rounded to it.
        values: One of `VALUES`.
        seed: Seed of the tensors.
    """

    batch: int = 2
    kv_heads: int = 1
    group: int = 3
    q_tokens: int = 37
    kv_tokens: int = 37
    head_dim: int = 64
    pattern: PatternConfig | None = field(default_factory=lambda: SMALL)
    prompt_tokens: int | None = None
    scale: float | None = None
    dtype: str = "float32"
    values: str = "normal"
    seed: int = 0

    @property
    def q_heads(self) -> int:
        """HQ."""
        return self.kv_heads * self.group

    @property
    def score_scale(self) -> float:
        """The multiplier in effect."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def tensors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q `[B, HQ, L, D]`, k and v `[B, HKV, S, D]`: float32 arrays of values that `dtype` has."""
        rng = np.random.default_rng(self.seed)
        q = rng.standard_normal((self.batch, self.q_heads, self.q_tokens, self.head_dim))
        k, v = rng.standard_normal((2, self.batch, self.kv_heads, self.kv_tokens, self.head_dim))
        if self.values == "huge scores":
            q, k = 12 * q, 6 * k
        elif self.values == "equal keys":
            k = np.broadcast_to(k[:, :, :1], k.shape)
        elif self.values == "uneven keys":  # some runs of eight keys are wanted by every query
            wanted = rng.standard_normal((self.batch, self.kv_heads, -(-self.kv_tokens // 8), 1))
            k = k + 2 * wanted.repeat(8, axis=2)[:, :, : self.kv_tokens]
            q = q + 0.5
        return tuple(round_to(x, self.dtype) for x in (q, k, v))

    def mask(self) -> np.ndarray:
        """What the queries see, bool `[L, S]` (not for xattention's prefill)."""
        if self.pattern is None:
            return np.tri(self.q_tokens, self.kv_tokens, self.kv_tokens - self.q_tokens, dtype=bool)
        return visible_mask(self.pattern, self.q_tokens, self.kv_tokens, self.prompt_tokens)


SMALL = PatternConfig(block_size=8, sink_tokens=8, window_tokens=16)
TRIANGLE = PatternConfig(name="triangle", block_size=8, sink_tokens=8, window_tokens=8, last_tokens=5)
XATTENTION = PatternConfig(name="xattention", block_size=8, stride=4, sink_tokens=8, window_tokens=16, threshold=0.7)

EDGES = {
    "one query, one key": Case(q_tokens=1, kv_tokens=1),
    "one query": Case(q_tokens=1, kv_tokens=41),
    "block - 1 tokens": Case(q_tokens=7, kv_tokens=7),
    "one block": Case(q_tokens=8, kv_tokens=8),
    "block + 1 tokens": Case(q_tokens=9, kv_tokens=9),
    "block - 1 queries after a prefix": Case(q_tokens=7, kv_tokens=43),
    "block queries after a prefix": Case(q_tokens=8, kv_tokens=40),
    "block + 1 queries after a prefix": Case(q_tokens=9, kv_tokens=42),
    "keys end on a block": Case(q_tokens=24, kv_tokens=48),
    "keys end inside a block": Case(q_tokens=24, kv_tokens=51),
    "window over everything": Case(pattern=replace(SMALL, window_tokens=400)),
    "window of one token, rounded up": Case(pattern=replace(SMALL, window_tokens=1)),
    "no sink": Case(pattern=replace(SMALL, sink_tokens=0)),
    "no sink, one block": Case(pattern=replace(SMALL, sink_tokens=0, window_tokens=8)),
    "sink over everything": Case(pattern=replace(SMALL, sink_tokens=400, window_tokens=8)),
    "sink rounded up": Case(pattern=replace(SMALL, sink_tokens=9, window_tokens=8)),
    "unrounded": Case(pattern=PatternConfig(block_size=1, sink_tokens=3, window_tokens=10)),
    "unrounded, only itself": Case(pattern=PatternConfig(block_size=1, sink_tokens=0, window_tokens=1)),
    "unrounded after a prefix": Case(q_tokens=5, pattern=PatternConfig(block_size=1, sink_tokens=2, window_tokens=9)),
    "block of 64": Case(
        batch=1, q_tokens=70, kv_tokens=203, pattern=PatternConfig(block_size=64, sink_tokens=64, window_tokens=64)
    ),
    "block of 128": Case(
        batch=1, q_tokens=131, kv_tokens=390, pattern=PatternConfig(block_size=128, sink_tokens=1, window_tokens=128)
    ),
    "every head its own keys": Case(kv_heads=5, group=1),
    "eight heads share keys": Case(kv_heads=1, group=8),
    "two groups of eight": Case(kv_heads=2, group=8, batch=1),
    "head dim 80": Case(head_dim=80),
    "head dim 96": Case(head_dim=96),
    "head dim 128": Case(head_dim=128),
    "head dim 256": Case(head_dim=256),
    "huge scores": Case(values="huge scores"),
    "equal keys": Case(values="equal keys"),
    "a scale of its own": Case(scale=0.31),
    "full": Case(pattern=None),
    "full after a prefix": Case(pattern=None, q_tokens=9, kv_tokens=42),
    "full, one query": Case(pattern=None, q_tokens=1, kv_tokens=131, group=8),
    "full, huge scores": Case(pattern=None, values="huge scores"),
    "full, over several tiles": Case(pattern=None, batch=1, q_tokens=135, kv_tokens=201),
    "triangle": Case(pattern=TRIANGLE, prompt_tokens=37),
    "triangle before its last key": Case(pattern=TRIANGLE, prompt_tokens=38),
    "triangle after the prompt": Case(pattern=TRIANGLE, prompt_tokens=30),
    "triangle long after the prompt": Case(pattern=TRIANGLE, q_tokens=6, kv_tokens=40, prompt_tokens=21),
    "triangle in a chunk": Case(pattern=TRIANGLE, q_tokens=13, kv_tokens=40),
    "triangle, nothing last": Case(pattern=replace(TRIANGLE, last_tokens=0), prompt_tokens=37),
    "triangle, all last": Case(pattern=replace(TRIANGLE, last_tokens=99), prompt_tokens=37),
    "xattention decodes as streaming": Case(pattern=XATTENTION, q_tokens=1, kv_tokens=41),
}


@st.composite
def patterns(draw: st.DrawFn, block_sizes: tuple[int, ...]) -> PatternConfig | None:
    """Full attention, streaming or triangle, with sizes around the block's."""
    name = draw(st.sampled_from(["streaming", "streaming", "triangle", "full"]))
    if name == "full":
        return None
    block = draw(st.sampled_from(block_sizes))
    return PatternConfig(
        name=name,
        block_size=block,
        sink_tokens=draw(st.integers(0, 2 * block + 3)),
        window_tokens=draw(st.integers(1, 3 * block + 9)),
        last_tokens=draw(st.integers(0, 11)),
    )


@st.composite
def cases(draw: st.DrawFn, backend: Backend) -> Case:
    """Attention calls of up to 150 keys within what a backend supports; B, HQ, L, S and D differ where they can."""
    pattern = draw(patterns(backend.block_sizes))
    block = 16 if pattern is None else pattern.block_size
    kv_tokens = draw(st.integers(1, min(150, 5 * block + 30)))
    named = [n for n in (1, block - 1, block, block + 1, kv_tokens) if 1 <= n <= kv_tokens]
    q_tokens = draw(st.sampled_from(named) | st.integers(1, kv_tokens))
    prompts = st.integers(kv_tokens - q_tokens, kv_tokens + 1).filter(lambda n: n > 0)
    kv_heads = draw(st.integers(1, 2 if backend.is_slow else 3))
    group = draw(st.sampled_from([1, 2] if backend.is_slow else [1, 2, 3, 4, 8]))
    taken = {q_tokens, kv_tokens, kv_heads * group}
    return Case(
        batch=draw(
            st.sampled_from([n for n in ((1, 2) if backend.is_slow else (1, 2, 3, 5)) if n not in taken] or [1])
        ),
        kv_heads=kv_heads,
        group=group,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        head_dim=draw(st.sampled_from([d for d in backend.head_dims if d not in taken] or backend.head_dims)),
        pattern=pattern,
        prompt_tokens=draw(st.none() | prompts) if pattern is not None else None,
        scale=draw(st.sampled_from([None, None, 0.3])),
        dtype=draw(st.sampled_from(backend.dtypes)),
        values=draw(st.sampled_from([VALUES[0], *VALUES])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
