"""Prefill attention: dense and streaming kernels against cuDNN, FlashAttention-2 and FlexAttention, in one run.

Run on a GPU from the repository root: python -m benchmarks.bench_triton_prefill
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.bench_triton_common import (
    BASELINES,
    PATTERN,
    arguments,
    attention_flops,
    dense_baseline,
    ideal_speedup,
    milliseconds,
    random_qkv,
    write,
)
from cuda_reference import triton_prefill
from cuda_reference.attention import full_attention, sparse_attention
from cuda_reference.pattern import visible
from flux_mlx.spec import visible_pairs

compiled_flex = torch.compile(flex_attention, dynamic=False)


def flex_streaming(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    """FlexAttention with the streaming pattern as its mask; the block mask is made once, outside the timing."""
    tokens = q.shape[2]
    mask = create_block_mask(
        lambda b, h, q_pos, k_pos: visible(PATTERN, q_pos, k_pos),
        None,
        None,
        tokens,
        tokens,
        device="cuda",
        _compile=True,
    )
    return lambda: compiled_flex(q, k, v, block_mask=mask, enable_gqa=True)


def figures(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The calls to time; names that begin with "streaming" are sparse."""
    scale = q.shape[-1] ** -0.5
    tokens = k.shape[2]
    runs = {f"dense {name}": lambda b=backend: dense_baseline(b, q, k, v) for name, backend in BASELINES.items()}
    runs["dense ours"] = lambda: full_attention(q, k, v, impl="triton")
    runs["dense ours, portable kernel"] = lambda: triton_prefill.streaming(q, k, v, scale, 128, tokens, 0)
    runs["streaming ours"] = lambda: sparse_attention(q, k, v, PATTERN, impl="triton")
    sizes = (PATTERN.block_size, PATTERN.window_blocks, PATTERN.sink_span)
    runs["streaming ours, portable kernel"] = lambda: triton_prefill.streaming(q, k, v, scale, *sizes)
    runs["streaming FlexAttention"] = flex_streaming(q, k, v)
    return runs


def rows_of(head_dim: int, tokens: int, repeat_ms: int, rounds: int) -> list[dict[str, Any]]:
    """One row a kernel: time, rate over visible pairs, and for sparse kernels the fraction of the ideal speed-up."""
    times = milliseconds(figures(*random_qkv(tokens, tokens, head_dim)), repeat_ms, rounds)
    best = min(ms for name, ms in times.items() if name.startswith("dense"))
    ideal = ideal_speedup(tokens, tokens)
    rows = []
    for name, ms in times.items():
        sparse = name.startswith("streaming")
        flops = attention_flops(visible_pairs(PATTERN if sparse else None, tokens, tokens), head_dim)
        row = {"head_dim": head_dim, "tokens": tokens, "kernel": name, "ms": round(ms, 4)}
        row["tflops"] = round(flops / ms / 1e9, 1)
        if sparse:
            own = times["dense ours, portable kernel" if "portable" in name else "dense ours"]
            row |= {"ideal_speedup": round(ideal, 2), "speedup_over_cudnn": round(times["dense cuDNN"] / ms, 2)}
            row |= {"fraction_of_ideal_cudnn": round(times["dense cuDNN"] / ms / ideal, 3)}
            row |= {"fraction_of_ideal_best_dense": round(best / ms / ideal, 3)}
            row |= {"fraction_of_ideal_own_dense": round(own / ms / ideal, 3)}
        else:
            row["rate_over_cudnn"] = round(times["dense cuDNN"] / ms, 3)
        rows.append(row)
    return rows


def main() -> None:
    """Time every head dim and length."""
    options = arguments(__doc__, [8192, 32768, 131072])
    cases = [(head_dim, tokens) for head_dim in options.head_dims for tokens in options.lengths]
    rows = [row for case in cases for row in rows_of(*case, options.repeat_ms, options.rounds)]
    write(options.out / "bench_triton_prefill.json", rows)


if __name__ == "__main__":
    main()
