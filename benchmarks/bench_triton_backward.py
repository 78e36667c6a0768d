"""Backward of dense and streaming attention, for training, beside FlashAttention-2, cuDNN and FlexAttention.

Run on a GPU from the repository root: python -m benchmarks.bench_triton_backward
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench_triton_common import (
    BASELINES,
    PATTERN,
    arguments,
    attention_flops,
    dense_baseline,
    milliseconds,
    random_qkv,
    write,
)
from benchmarks.bench_triton_prefill import flex_streaming
from cuda_reference.attention import full_attention, sparse_attention
from flux_mlx.spec import visible_pairs

BACKWARD_OVER_FORWARD = 2.5  # five products instead of two


def gradients(run: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """The backward pass alone of `run`, whose forward pass is done here."""
    out = run()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def rows_of(head_dim: int, tokens: int, repeat_ms: int, rounds: int) -> list[dict[str, Any]]:
    """Backward times at one size."""
    q, k, v = (x.requires_grad_() for x in random_qkv(tokens, tokens, head_dim))
    runs = {f"dense {name}": lambda b=backend: dense_baseline(b, q, k, v) for name, backend in BASELINES.items()}
    runs |= {
        "dense ours": lambda: full_attention(q, k, v, impl="triton"),
        "streaming ours": lambda: sparse_attention(q, k, v, PATTERN, impl="triton"),
        "streaming FlexAttention": flex_streaming(q, k, v),
    }
    times = milliseconds({name: gradients(run, (q, k, v)) for name, run in runs.items()}, repeat_ms, rounds)
    rows = []
    for name, ms in times.items():
        pairs = visible_pairs(PATTERN if name.startswith("streaming") else None, tokens, tokens)
        rate = BACKWARD_OVER_FORWARD * attention_flops(pairs, head_dim) / ms / 1e9
        row = {"head_dim": head_dim, "tokens": tokens, "kernel": name, "backward_ms": round(ms, 4)}
        rows.append(row | {"tflops": round(rate, 1)})
    return rows


def main() -> None:
    """Time every head dim and length."""
    options = arguments(__doc__, [32768])
    cases = [(head_dim, tokens) for head_dim in options.head_dims for tokens in options.lengths]
    rows = [row for case in cases for row in rows_of(*case, options.repeat_ms, options.rounds)]
    write(options.out / "bench_triton_backward.json", rows)


if __name__ == "__main__":
    main()
