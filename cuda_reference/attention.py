"""Full and sparse attention for Torch: checks the arguments, then runs plain Torch or the Triton kernels.

Layout `[B, H, L, D]`. Keys are positions 0..S-1 and queries the last L of them. `flux_mlx.spec` holds the definition.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch

from cuda_reference import eager
from flux_mlx.spec import PatternConfig

IMPLS = ("eager", "triton")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Result:
    """Causal attention.

    Args:
        q: `[B, HQ, L, D]`, float16, bfloat16 or float32 (eager: float64 too); query head h reads KV head
            h // (HQ / HKV).
        k: `[B, HKV, S, D]`, S >= L.
        v: `[B, HKV, S, D]`.
        scale: Positive multiplier of the scores, D**-0.5 by default.
        return_lse: Return the log-sum-exp of each row's scores too.
        impl: "eager" or "triton", never replaced by the other; None takes triton for CUDA tensors, else eager.

    Returns:
        out `[B, HQ, L, D]` of q's dtype, or (out, lse `[B, HQ, L]` float32, natural log; float64 for float64 input).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or `impl` cannot run these tensors.
    """
    scale = _check("full_attention", q, k, v, scale)
    out, lse = _backend("full_attention", impl, q).full_attention(q, k, v, scale)
    return (out, lse) if return_lse else out


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: PatternConfig,
    *,
    prompt_tokens: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Result:
    """Causal attention restricted to `pattern`; arguments, result and errors as `full_attention`.

    Args:
        pattern: What a query sees.
        prompt_tokens: Length of the whole prompt in exact prefill; None (chunked calls, decode) means streaming.
    """
    scale = _check("sparse_attention", q, k, v, scale)
    if not isinstance(pattern, PatternConfig):
        raise ValueError(f"[sparse_attention] expected a PatternConfig, got {type(pattern).__name__}.")
    if prompt_tokens is not None and (isinstance(prompt_tokens, bool) or not isinstance(prompt_tokens, int)):
        raise ValueError(f"[sparse_attention] prompt_tokens must be an integer or None, got {prompt_tokens!r}.")
    backend = _backend("sparse_attention", impl, q)
    if prompt_tokens is not None and pattern.name == "xattention":
        out, lse = backend.xattention(q, k, v, pattern, scale)
    elif prompt_tokens is not None and pattern.name == "triangle":
        out, lse = _triangle(backend, q, k, v, pattern, prompt_tokens, scale)
    else:
        out, lse = backend.streaming_attention(q, k, v, pattern, scale)
    return (out, lse) if return_lse else out


def _triangle(
    backend: ModuleType,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: PatternConfig,
    prompt_tokens: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Streaming, but the prompt's last queries see every earlier key: at most three calls over runs of rows."""
    kv_tokens, offset = k.shape[2], k.shape[2] - q.shape[2]
    cuts = (offset, prompt_tokens - pattern.last_tokens, prompt_tokens, kv_tokens)
    cuts = [min(max(cut, offset), kv_tokens) for cut in cuts]
    parts = []
    for dense, first, stop in zip((False, True, False), cuts[:-1], cuts[1:], strict=True):
        if first == stop:
            continue
        rows = (q[:, :, first - offset : stop - offset], k[:, :, :stop], v[:, :, :stop])
        if dense:
            parts.append(backend.full_attention(*rows, scale))
        else:
            parts.append(backend.streaming_attention(*rows, pattern, scale))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _backend(who: str, impl: str | None, q: torch.Tensor) -> ModuleType:
    """The module that computes: `eager`, or `triton_attention` where it can run `q`."""
    if impl is None:
        impl = "triton" if q.is_cuda else "eager"
    if impl not in IMPLS:
        raise ValueError(f"[{who}] impl must be one of {list(IMPLS)} or None, got {impl!r}.")
    if impl == "eager":
        return eager
    try:
        from cuda_reference import triton_attention
    except ImportError as error:
        raise ValueError(f"[{who}] impl='triton' needs the package triton: {error}") from error
    refusal = triton_attention.refusal(q)
    if refusal:
        raise ValueError(f"[{who}] impl='triton': {refusal}.")
    return triton_attention


def _check(who: str, q: Any, k: Any, v: Any, scale: float | None) -> float:
    """Refuse arguments that do not fit together; returns the scale."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            shape = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"[{who}] expected {name} to be a tensor [B, H, L, D], got {shape}.")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"[{who}] {name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}.")
    if q.dtype not in FLOATS:
        raise ValueError(f"[{who}] expected a float dtype, got {q.dtype}.")
    if k.shape != v.shape:
        raise ValueError(f"[{who}] k has shape {tuple(k.shape)}, but v has {tuple(v.shape)}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"[{who}] expected non-empty q [B, HQ, L, D] and k [B, HKV, S, D], "
            f"got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"[{who}] k has {k.shape[1]} heads, which does not divide q's {q.shape[1]}.")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"[{who}] q has {q.shape[2]} tokens, more than k's {k.shape[2]}.")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"[{who}] scale must be a positive finite number, got {scale!r}.")
    return float(scale)
