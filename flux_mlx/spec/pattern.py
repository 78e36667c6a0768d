"""The sparse patterns, by position: the one definition that every kernel is proved against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flux_mlx.spec.config import PatternConfig


def visible(
    pattern: PatternConfig, q_pos: np.ndarray, k_pos: np.ndarray, prompt_tokens: int | None = None
) -> np.ndarray:
    """Whether the query at absolute position `q_pos` sees the key at absolute position `k_pos`.

    streaming: k <= q and (k//b < ns or k//b > q//b - nl), with b the block size, ns and nl the sink's and the
    window's blocks. triangle: streaming, but the last `last_tokens` queries of the prompt see every k <= q.

    Args:
        pattern: The pattern. xattention, which chooses blocks from the data, stands here for its decode: streaming.
        q_pos: int, any shape that broadcasts with `k_pos`. Operators only: numpy, MLX and Torch arrays serve.
        k_pos: int.
        prompt_tokens: Length of the whole prompt in exact prefill; None (chunked calls, decode) means streaming.

    Returns:
        bool, the broadcast shape.
    """
    q, k, block = q_pos, k_pos, pattern.block_size
    near = k // block > q // block - pattern.window_blocks
    seen = (k // block < pattern.sink_blocks) | near
    if pattern.name == "triangle" and prompt_tokens is not None:
        seen = seen | ((q >= prompt_tokens - pattern.last_tokens) & (q < prompt_tokens))
    return (k <= q) & seen


def visible_mask(pattern: PatternConfig, q_tokens: int, kv_tokens: int, prompt_tokens: int | None = None) -> np.ndarray:
    """`visible` as a matrix, bool `[L, S]`: the queries are the last `q_tokens` of `kv_tokens` positions."""
    q_pos = np.arange(kv_tokens - q_tokens, kv_tokens)[:, None]
    return visible(pattern, q_pos, np.arange(kv_tokens)[None, :], prompt_tokens)


def visible_pairs(
    pattern: PatternConfig | None, q_tokens: int, kv_tokens: int, prompt_tokens: int | None = None
) -> int:
    """Number of (query, key) pairs that `visible` allows, or of dense causal attention if `pattern` is None.

    The ideal speed-up of a kernel is the dense count over the sparse count. Xattention, whose pairs depend on the data,
    counts as streaming.
    """
    q = np.arange(kv_tokens - q_tokens, kv_tokens, dtype=np.int64)
    if pattern is None:
        return int((q + 1).sum())
    start = np.maximum(0, (q // pattern.block_size - pattern.window_blocks + 1) * pattern.block_size)
    seen = q + 1 - start + np.minimum(start, pattern.sink_span)
    if pattern.name == "triangle" and prompt_tokens is not None:
        seen = np.where((q >= prompt_tokens - pattern.last_tokens) & (q < prompt_tokens), q + 1, seen)
    return int(seen.sum())


@dataclass(frozen=True)
class BlockTable:
    """The kept key blocks of each query block, in FlexAttention's form: full blocks apart from partial ones.

    Blocks are aligned to absolute positions. Query block row r is block `first_q_block + r`. A full block is visible
    to every query row of the call; a partial one needs the causal rule inside (and the end of the keys checked).

    Args:
        block_size: Tokens of a block.
        first_q_block: Absolute index of the first query block.
        kv_num_blocks: int32 `[..., M]`, partial blocks of each row.
        kv_indices: int32 `[..., M, N]`, their absolute indices ascending; entries past the count are 0.
        full_kv_num_blocks: int32 `[..., M]`, full blocks of each row.
        full_kv_indices: int32 `[..., M, N]`, likewise.
    """

    block_size: int
    first_q_block: int
    kv_num_blocks: np.ndarray
    kv_indices: np.ndarray
    full_kv_num_blocks: np.ndarray
    full_kv_indices: np.ndarray


def _pack(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [..., M, N] to (counts [..., M], ascending indices [..., M, N] filled up with 0)."""
    counts = kept.sum(-1).astype(np.int32)
    order = np.argsort(~kept, axis=-1, kind="stable").astype(np.int32)
    return counts, np.where(np.arange(kept.shape[-1]) < counts[..., None], order, 0)


def kept_blocks(pattern: PatternConfig, q_tokens: int, kv_tokens: int) -> np.ndarray:
    """Blocks that streaming keeps, bool `[M, N]`: rows are the query blocks touched, columns all key blocks."""
    block = pattern.block_size
    rows = np.arange((kv_tokens - q_tokens) // block, -(-kv_tokens // block))[:, None]
    columns = np.arange(-(-kv_tokens // block))[None, :]
    return visible(pattern, rows * block + block - 1, columns * block)


def block_table(block_size: int, kept: np.ndarray, q_tokens: int, kv_tokens: int) -> BlockTable:
    """Pack kept blocks, bool `[..., M, N]`, into a `BlockTable`. Blocks above the diagonal are dropped.

    Raises:
        ValueError: M or N is not the number of query or key blocks that the lengths need.
    """
    first = (kv_tokens - q_tokens) // block_size
    n = -(-kv_tokens // block_size)
    if kept.shape[-2:] != (n - first, n):
        raise ValueError(f"[block_table] kept must end in {(n - first, n)}, got {kept.shape}.")
    rows, columns = np.arange(first, n)[:, None], np.arange(n)[None, :]
    kept = kept & (columns <= rows)
    partial = kept & (columns == rows)
    return BlockTable(block_size, first, *_pack(partial), *_pack(kept & ~partial))
