"""Block-sparse prefill at 90 % sparsity, and what xattention's choice of blocks costs beside it.

Run on a GPU from the repository root: python -m benchmarks.bench_triton_blocks
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.bench_triton_common import (
    BASELINES,
    HQ,
    arguments,
    attention_flops,
    dense_baseline,
    milliseconds,
    random_qkv,
    write,
)
from cuda_reference import triton_attention, triton_hopper, triton_prefill, triton_xattention
from cuda_reference.attention import full_attention
from cuda_reference.pattern import block_table
from flux_mlx.spec import PatternConfig, visible_pairs

PATTERN = PatternConfig(name="xattention")
SPARSITY = 0.9


def random_blocks(tokens: int) -> torch.Tensor:
    """bool `[1, HQ, M, M]`: the first and the diagonal block of each row, and random others up to 1 - SPARSITY."""
    n = -(-tokens // PATTERN.block_size)
    row, column = torch.arange(n, device="cuda")[:, None], torch.arange(n, device="cuda")[None, :]
    kept = torch.rand(1, HQ, n, n, device="cuda") < 1.0 - SPARSITY
    return (kept | (column == 0) | (column == row)) & (column <= row)


def kept_pairs(kept: torch.Tensor, tokens: int) -> float:
    """Visible pairs a head, averaged over the heads; the diagonal block counts its lower triangle."""
    block = PATTERN.block_size
    blocks = kept.sum().item() / HQ
    rows = tokens // block
    return (blocks - rows) * block * block + rows * block * (block + 1) / 2


def rows_of(head_dim: int, tokens: int, repeat_ms: int, rounds: int) -> list[dict[str, Any]]:
    """Dense, block-sparse and selection times at one size."""
    q, k, v = random_qkv(tokens, tokens, head_dim)
    scale = head_dim**-0.5
    kept = random_blocks(tokens)
    table = block_table(PATTERN.block_size, kept, tokens, tokens)
    mass = triton_xattention.block_mass(q, k, PATTERN.block_size, PATTERN.stride)
    runs = {f"dense {name}": lambda b=backend: dense_baseline(b, q, k, v) for name, backend in BASELINES.items()}
    runs |= {
        "dense ours": lambda: full_attention(q, k, v, impl="triton"),
        "block-sparse ours": lambda: triton_attention.block_attention(
            q, k, v, kept, PATTERN.block_size, scale, diagonal_kept=True
        ),
        "block-sparse ours, table given": lambda: triton_hopper.block_sparse(q, k, v, scale, table),
        "block-sparse ours, portable kernel": lambda: triton_prefill.block_sparse(q, k, v, scale, table),
        "selection": lambda: triton_xattention.select_blocks(q, k, PATTERN),
        "selection: scores": lambda: triton_xattention.block_mass(q, k, PATTERN.block_size, PATTERN.stride),
        "selection: choice": lambda: triton_xattention.choose_blocks(mass, 0, PATTERN.threshold, None),
    }
    times = milliseconds(runs, repeat_ms, rounds)
    dense_pairs, sparse_pairs = visible_pairs(None, tokens, tokens), kept_pairs(kept, tokens)
    best = min(ms for name, ms in times.items() if name.startswith("dense"))
    saved = times["dense ours"] - times["block-sparse ours"]
    rows = []
    for name, ms in times.items():
        row = {"head_dim": head_dim, "tokens": tokens, "kernel": name, "ms": round(ms, 4)}
        if name.startswith("selection"):
            row["fraction_of_attention_saved"] = round(ms / saved, 4)
        else:
            pairs = dense_pairs if name.startswith("dense") else sparse_pairs
            row["tflops"] = round(attention_flops(pairs, head_dim) / ms / 1e9, 1)
        if name.startswith("block"):
            ideal = dense_pairs / sparse_pairs
            row |= {"ideal_speedup": round(ideal, 2)}
            row |= {"fraction_of_ideal_own_dense": round(times["dense ours"] / ms / ideal, 3)}
            row |= {"fraction_of_ideal_best_dense": round(best / ms / ideal, 3)}
        rows.append(row)
    return rows


def main() -> None:
    """Time every head dim and length."""
    options = arguments(__doc__, [16384, 65536])
    cases = [(head_dim, tokens) for head_dim in options.head_dims for tokens in options.lengths]
    rows = [row for case in cases for row in rows_of(*case, options.repeat_ms, options.rounds)]
    write(options.out / "bench_triton_blocks.json", rows, sparsity=SPARSITY)


if __name__ == "__main__":
    main()
