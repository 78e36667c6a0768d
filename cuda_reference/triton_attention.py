"""Attention through the Triton kernels: which kernel runs a call, and the gradients. The names are those of `eager`.

Calls of at most 16 tokens are decoded; longer ones run on Hopper's own kernel where it applies, else on the portable
one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from cuda_reference import triton_hopper as hopper
from cuda_reference.pattern import block_table
from cuda_reference.triton_backward import streaming_backward
from cuda_reference.triton_decode import MAX_TOKENS, decode
from cuda_reference.triton_prefill import block_sparse, streaming
from cuda_reference.triton_xattention import select_blocks
from flux_mlx.spec import PatternConfig

MAX_HEAD_DIM = 256


def refusal(q: torch.Tensor) -> str | None:
    """Why the kernels cannot run on `q`'s device, dtype and head dim; None if they can."""
    if q.dtype == torch.float64:
        return "expected float16, bfloat16 or float32, got torch.float64"
    if q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 8:
        return f"expected a head dim that is a multiple of 8 and at most {MAX_HEAD_DIM}, got {q.shape[3]}"
    if not (q.is_cuda or triton.knobs.runtime.interpret):
        return f"expected CUDA tensors, or TRITON_INTERPRET=1 on a CPU, got tensors on {q.device}"
    return None


def _ready(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that the kernels can read: last axis contiguous; the interpreter, lacking bfloat16, gets float32."""
    if triton.knobs.runtime.interpret:
        tensors = tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


class _Streaming(torch.autograd.Function):
    """Attention over sink and window, with gradients of out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sizes: tuple[int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = q.dtype
        q, k, v = _ready(q, k, v)
        if q.shape[2] <= MAX_TOKENS:
            out, lse = decode(q, k, v, scale, *sizes)
        elif hopper.supports(q, k, v, sizes[0]):
            out, lse = hopper.streaming(q, k, v, scale, *sizes)
        else:
            out, lse = streaming(q, k, v, scale, *sizes)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.sizes, ctx.dtype = scale, sizes, dtype
        return out.to(dtype), lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        (dout,) = _ready(dout)
        grads = streaming_backward(q, k, v, out, lse, dout, dlse.contiguous(), ctx.scale, *ctx.sizes)
        return *(grad.to(ctx.dtype) for grad in grads), None, None


def full_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention: a window that holds every key. (out, lse) as `eager.full_attention`, with gradients."""
    block = 128
    return _Streaming.apply(q, k, v, scale, (block, triton.cdiv(k.shape[2], block), 0))


def streaming_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: PatternConfig, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sink and window: (out, lse) as `eager.streaming_attention`, with gradients."""
    return _Streaming.apply(q, k, v, scale, (pattern.block_size, pattern.window_blocks, pattern.sink_span))


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    block_size: int,
    scale: float,
    *,
    diagonal_kept: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside the kept blocks, bool `[B, HQ, M, N]`: (out, lse) as `eager.block_attention`.

    Args:
        diagonal_kept: The caller vouches that every row keeps its own block; Hopper's kernel needs that.

    Raises:
        ValueError: A gradient is asked for; these kernels have none.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("[block_attention] impl='triton' has no gradient for chosen blocks; use impl='eager'.")
    table = block_table(block_size, kept, q.shape[2], k.shape[2])
    dtype = q.dtype
    q, k, v = _ready(q, k, v)
    fast = diagonal_kept and hopper.supports_table(q, k, v, table)
    out, lse = (hopper.block_sparse if fast else block_sparse)(q, k, v, scale, table)
    return out.to(dtype), lse


def xattention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: PatternConfig, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """XAttention's exact prefill: choose blocks, then attend inside them. (out, lse) as `eager.xattention`."""
    kept = select_blocks(*_ready(q.detach(), k.detach()), pattern)
    return block_attention(q, k, v, kept, pattern.block_size, scale, diagonal_kept=True)
