"""Full and sparse attention in MLX: shapes are checked here, then `impl` is chosen.

Layout `[B, H, L, D]`. Keys are positions 0..S-1 of the sequence, queries its last L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx

from flux_mlx import cuda_kernels, kernel_policy, kernels, streaming, xattention
from flux_mlx.spec import PatternConfig

_MODULES = {"metal": kernels} | dict.fromkeys(cuda_kernels.FAMILIES, cuda_kernels)
_OPTIONS = {impl: {"family": family} for impl, family in cuda_kernels.FAMILIES.items()}
IMPLS = ("ops", *_MODULES)


def _check(who: str, q: mx.array, k: mx.array, v: mx.array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"[{who}] {name} must be [B, H, L, D], got shape {tuple(x.shape)}.")
        if x.dtype != q.dtype or not mx.issubdtype(x.dtype, mx.floating):
            raise ValueError(
                f"[{who}] q, k and v must share a float dtype, got {q.dtype} for q and {x.dtype} for {name}."
            )
    (B, HQ, L, D), (Bk, HKV, S, Dk) = q.shape, k.shape
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"[{who}] k and v must share [B, HKV, S], got {tuple(k.shape)} and {tuple(v.shape)}.")
    if Bk != B or Dk != D:
        raise ValueError(f"[{who}] q {tuple(q.shape)} and k {tuple(k.shape)} must share B and D.")
    if HKV < 1 or HQ % HKV:
        raise ValueError(f"[{who}] k has {HKV} heads, which does not divide q's {HQ}.")
    if not 1 <= L <= S:
        raise ValueError(f"[{who}] the queries are the last L of S positions; got L {L} and S {S}.")


def _check_impl(who: str, impl: str | None) -> None:
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"[{who}] impl must be one of {list(IMPLS)} or None, got {impl!r}.")


def full_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float | None = None, impl: str | None = None
) -> mx.array:
    """Causal attention.

    Args:
        q: `[B, HQ, L, D]`, float.
        k, v: `[B, HKV, S, D]`, the dtype of q; HKV divides HQ, S >= L.
        scale: Multiplier of the scores, D**-0.5 by default.
        impl: "ops" (MLX's own kernel, also the default), or one of ours: "metal", "cuda", or "cuda-portable" (prefill
            by the kernel that every GPU since Ampere takes).

    Returns:
        `[B, HQ, L, D]`.

    Raises:
        ValueError: Shapes, dtypes or `impl` do not fit.
        RuntimeError: impl="metal" without a Metal device, impl="cuda" without a CUDA device.
    """
    _check("full_attention", q, k, v)
    _check_impl("full_attention", impl)
    if impl in _MODULES:
        return _MODULES[impl].full_attention(q, k, v, scale=scale, **_OPTIONS.get(impl, {}))[0]
    return streaming.dense(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def sparse_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    pattern: PatternConfig,
    *,
    prompt_tokens: int | None = None,
    scale: float | None = None,
    kv_tokens: int | None = None,
    impl: str | None = None,
) -> mx.array:
    """Causal attention restricted to `pattern` (`flux_mlx.spec.visible`).

    Work and memory of streaming are O(L * (sink + window)); no [L, S] mask is made and KV heads are not repeated.

    Args:
        q: `[B, HQ, L, D]`, float.
        k, v: `[B, HKV, S, D]`, the dtype of q; HKV divides HQ, S >= L.
        pattern: Which keys a query sees.
        prompt_tokens: Length of the whole prompt in exact prefill; None (chunked calls, decode) means streaming.
        scale: Multiplier of the scores, D**-0.5 by default.
        kv_tokens: S: keys in use, where k and v are the longer buffers of a cache; kernels read these in place, and MLX
            may copy a slice of them. All by default.
        impl: "ops" (compositions of stock attention calls), or our kernels as in `full_attention`, whose gradient is
            that of "ops"; never replaced when named. None: what `kernel_policy.choose` says.

    Returns:
        `[B, HQ, L, D]`.

    Raises:
        ValueError: Shapes, dtypes or `impl` do not fit.
        RuntimeError: impl="metal" without a Metal device, impl="cuda" without a CUDA device.
    """
    _check("sparse_attention", q, k, v)
    _check_impl("sparse_attention", impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    buffers = k, v
    if kv_tokens == k.shape[2]:
        kv_tokens = None
    if kv_tokens is not None:
        if not q.shape[2] <= kv_tokens < k.shape[2]:
            raise ValueError(
                f"[sparse_attention] kv_tokens must be from L to the keys in the buffer, got {kv_tokens} with "
                f"L {q.shape[2]} and {k.shape[2]} keys."
            )
        k, v = k[:, :, :kv_tokens], v[:, :, :kv_tokens]
    if impl is None:
        impl = kernel_policy.choose(q, k, v, pattern, prompt_tokens)
    if impl in cuda_kernels.FAMILIES:
        return _by_kernels(impl, pattern, prompt_tokens, scale, kv_tokens)(q, *buffers)
    if impl in _MODULES:
        return _by_kernels(impl, pattern, prompt_tokens, scale)(q, k, v)
    return _by_operations(q, k, v, pattern, prompt_tokens, scale)


@lru_cache
def _by_kernels(
    impl: str, pattern: PatternConfig, prompt_tokens: int | None, scale: float, kv_tokens: int | None = None
) -> Callable[..., mx.array]:
    """The kernels as a function of q, k and v. They have no gradient of their own: it is recomputed by operations."""
    used = slice(kv_tokens)

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        options = {"prompt_tokens": prompt_tokens, "scale": scale} | _OPTIONS.get(impl, {})
        options |= {} if kv_tokens is None else {"kv_tokens": kv_tokens}
        return _MODULES[impl].sparse_attention(q, k, v, pattern, **options)[0]

    def by_operations(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return _by_operations(q, k[:, :, used], v[:, :, used], pattern, prompt_tokens, scale)

    @forward.vjp
    def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        return mx.vjp(by_operations, primals, [cotangent])[1]

    return forward


def _by_operations(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None, scale: float
) -> mx.array:
    if prompt_tokens is None or pattern.name == "streaming":
        return streaming.attend(q, k, v, pattern, scale)
    if pattern.name == "triangle":
        return streaming.triangle(q, k, v, pattern, prompt_tokens, scale)
    return xattention.attend(q, k, v, pattern, scale)
