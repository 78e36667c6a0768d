"""`flux_mlx.spec.pattern.visible` and block tables on Torch tensors; the truth tables of both are tested equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flux_mlx.spec import PatternConfig


def visible(
    pattern: PatternConfig, q_pos: torch.Tensor, k_pos: torch.Tensor, prompt_tokens: int | torch.Tensor | None = None
) -> torch.Tensor:
    """Whether the query at absolute position `q_pos` sees the key at `k_pos` (`flux_mlx.spec.visible`).

    Args:
        pattern: The pattern; xattention stands here for its decode, streaming.
        q_pos: int, any shape that broadcasts with `k_pos`.
        k_pos: int.
        prompt_tokens: Length of the whole prompt in exact prefill, also one for each query; None means streaming.

    Returns:
        bool, the broadcast shape.
    """
    block = pattern.block_size
    near = k_pos // block > q_pos // block - pattern.window_blocks
    seen = near | (k_pos // block < pattern.sink_blocks)
    if pattern.name == "triangle" and prompt_tokens is not None:
        seen = seen | ((q_pos >= prompt_tokens - pattern.last_tokens) & (q_pos < prompt_tokens))
    return (k_pos <= q_pos) & seen


@dataclass(frozen=True)
class BlockTable:
    """`flux_mlx.spec.BlockTable` with int32 tensors on the device of the attention call: the same fields."""

    block_size: int
    first_q_block: int
    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor


def _pack(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [..., M, N] to (counts [..., M], ascending indices [..., M, N] filled up with 0), int32."""
    counts = kept.sum(-1, dtype=torch.int32)
    slots = torch.where(kept, kept.cumsum(-1) - 1, kept.shape[-1])  # one spare column takes what is not kept
    columns = torch.arange(kept.shape[-1], device=kept.device, dtype=torch.int32).expand(kept.shape)
    packed = torch.zeros(*kept.shape[:-1], kept.shape[-1] + 1, dtype=torch.int32, device=kept.device)
    return counts, packed.scatter_(-1, slots, columns)[..., :-1].contiguous()


def block_table(block_size: int, kept: torch.Tensor, q_tokens: int, kv_tokens: int) -> BlockTable:
    """Pack kept blocks, bool `[..., M, N]`, into a `BlockTable`. Blocks above the diagonal are dropped.

    Raises:
        ValueError: M or N is not the number of query or key blocks that the lengths need.
    """
    first = (kv_tokens - q_tokens) // block_size
    n = -(-kv_tokens // block_size)
    if tuple(kept.shape[-2:]) != (n - first, n):
        raise ValueError(f"[block_table] kept must end in {(n - first, n)}, got {tuple(kept.shape)}.")
    rows = torch.arange(first, n, device=kept.device)[:, None]
    columns = torch.arange(n, device=kept.device)[None, :]
    partial = kept & (columns == rows)
    return BlockTable(block_size, first, *_pack(partial), *_pack(kept & (columns < rows)))
