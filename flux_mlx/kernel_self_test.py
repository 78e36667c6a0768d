"""Self-tests of the kernels: a variant is compared with the specification on a small case before it is used.

Not with stock attention, whose float32 is TF32 on some GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from flux_mlx import cuda_kernels, cuda_router, kernels, spec, xattention
from flux_mlx.spec import PatternConfig, Route, RouterConfig
from metal_kernels.catalog import ROUTER_PARAMETERS

TOLERANCE = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 4e-2}
_KV_TOKENS = 171
_PATTERN = PatternConfig(block_size=48, sink_tokens=20, window_tokens=40)
_ROUTES = (int(Route.FULL), int(Route.SPARSE))  # of the batch rows of a CUDA case
_BLOCKS = PatternConfig(name="xattention", block_size=48, stride=4, threshold=0.6)


@dataclass(frozen=True)
class Variant:
    """What a self-test covers.

    Args:
        operation: "prefill" (streaming or triangle), "decode" (up to 8 queries), "blocks" (xattention's prefill),
            "router" (CUDA: the layer router).
        dtype: Dtype name of q, k and v.
        head_dim: D.
        rows: Metal: query rows of a threadgroup that share a KV head (decode; 1 elsewhere).
        backend: The `impl` that calls of this kernel name.
        pattern: CUDA: what the case is masked by, for kernels are compiled for a pattern.
    """

    operation: str
    dtype: str
    head_dim: int
    rows: int = 1
    backend: str = "metal"
    pattern: PatternConfig | None = None


def self_test(variant: Variant, run: Any = None) -> str:
    """Compare the variant with `flux_mlx.spec` in float64: "" if they agree, else what is wrong.

    Args:
        variant: What is tested.
        run: Launcher of its backend; the device's by default.
    """
    try:
        if variant.operation == "router":
            error = _router_error(variant, run or cuda_kernels.cuda_run)
        elif variant.backend in cuda_kernels.FAMILIES:
            error = _cuda_error(variant, run or cuda_kernels.cuda_run)
        else:
            error = _metal_error(variant, run or kernels.metal_run)
    except Exception as failure:  # a compiler's error is a RuntimeError, but whatever fails here must not pass
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    allowed = TOLERANCE["float32" if variant.operation == "router" else variant.dtype]
    return "" if error <= allowed else f"differs from the specification by {error:.3g}, allowed {allowed:g}"


def _metal_error(variant: Variant, run: Any) -> float:
    """Largest error of outputs and lse (and block masses) over the kernels of a variant; inf if one is not finite."""
    q, k, v = _metal_tensors(variant)
    if variant.operation == "blocks":
        prompt = k.shape[2]
        results = [kernels.sparse_attention(q, k, v, _BLOCKS, prompt_tokens=prompt, run=run)]
        kept = np.array(xattention.select_blocks(q, k, _BLOCKS))
        mask = spec.expand_blocks(kept, _BLOCKS.block_size, q.shape[2], prompt)
    else:
        splits = (1, 2) if variant.operation == "decode" else (None,)
        results = [kernels.sparse_attention(q, k, v, _PATTERN, splits=n, run=run) for n in splits]
        mask = spec.visible_mask(_PATTERN, q.shape[2], k.shape[2])
    q_, k_, v_ = (np.array(x.astype(mx.float32)) for x in (q, k, v))
    expected = spec.masked_attention(q_, k_, v_, mask, variant.head_dim**-0.5)
    pairs = [pair for result in results for pair in zip(result, expected, strict=True)]
    if variant.operation == "blocks":
        mass = spec.block_mass(q_, k_, _BLOCKS.block_size, _BLOCKS.stride)
        pairs.append((kernels.block_mass(q, k, _BLOCKS, run=run), mass))
    return _largest_error(pairs)


def _largest_error(pairs: list[tuple[mx.array, np.ndarray]]) -> float:
    errors = [np.abs(np.array(got.astype(mx.float32)) - want).max() for got, want in pairs]
    return float(max(errors)) if np.isfinite(errors).all() else float("inf")


def _metal_tensors(variant: Variant) -> list[mx.array]:
    """q, k and v of a case whose tiles and rows have rests; k and v are cut from longer buffers, NaN behind."""
    is_decode = variant.operation == "decode"
    group, q_tokens = {1: (1, 1), 2: (2, 1), 4: (2, 3)}[variant.rows] if is_decode else (2, 41)
    q, k, v = _tensors(variant, 2, group, q_tokens, _KV_TOKENS)
    return [q, k[:, :, :_KV_TOKENS], v[:, :, :_KV_TOKENS]]


def _tensors(variant: Variant, batch: int, q_heads: int, q_tokens: int, kv_tokens: int) -> list[mx.array]:
    """q, and k and v of one head whose buffers are longer than `kv_tokens`, NaN behind."""
    rng, dtype = np.random.default_rng(0), getattr(mx, variant.dtype)

    def draw(heads: int, tokens: int, spare: int) -> mx.array:
        values = np.full((batch, heads, tokens + spare, variant.head_dim), np.nan, np.float32)
        values[:, :, :tokens] = rng.standard_normal((batch, heads, tokens, variant.head_dim))
        return mx.array(values).astype(dtype)

    return [draw(q_heads, q_tokens, 0), *(draw(1, kv_tokens, 19) for _ in range(2))]


def _cuda_error(variant: Variant, run: Any) -> float:
    """Largest error of outputs and lse: one batch row is FULL and one SPARSE, in one call.

    Decode is called as models call it, too: one query, whole buffers, NaN behind the keys in use.
    """
    pattern, is_decode = variant.pattern, variant.operation == "decode"
    kv_tokens = pattern.sink_span + pattern.window_span + pattern.block_size + 37
    q, k, v = _tensors(variant, 2, 4 if is_decode else 2, 3 if is_decode else kv_tokens - 50, kv_tokens)
    options = {"kv_tokens": kv_tokens, "family": cuda_kernels.FAMILIES[variant.backend], "run": run}
    results = cuda_kernels.routed_attention(q, k, v, _ROUTES, pattern, **options)
    expected = _expected_by_row(q, k, v, kv_tokens, pattern)
    pairs = list(zip(results, expected, strict=True))
    if is_decode:
        last, scale = q[:, :, -1:], variant.head_dim**-0.5
        key = tuple(last.shape), tuple(k.shape), variant.dtype, pattern, scale, _ROUTES
        out = cuda_kernels.decoder(*key, run)(last, k, v, kv_tokens)
        pairs.append((out, expected[0][:, :, -1].reshape(out.shape)))
    return _largest_error(pairs)


def _router_error(variant: Variant, run: Any) -> float:
    """Largest error of rows and logits; inf for a decision that does not follow from its logits.

    One batch row pools as many tokens as there are, the other one fewer of each end, NaN in the place of the rest.
    """
    rng, D, P = np.random.default_rng(0), variant.head_dim, 13
    queries = mx.array(rng.standard_normal((2 * P, 7, D), np.float32) + 1).astype(getattr(mx, variant.dtype))
    rows = cuda_router.mean_over_heads(queries, run=run)
    means = np.array(queries.astype(mx.float32)).astype(np.float64).mean(axis=1)
    prefix, recent = (np.stack([part, part]).astype(np.float32) for part in (means[:P], means[P:]))
    prefix[1, P - 1 :] = recent[1, :2] = np.nan
    weights = {
        name: rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
        for name, shape in RouterConfig.parameter_shapes(D).items()
    }
    parameters = [mx.array(weights[name]) for name in ROUTER_PARAMETERS]
    counts = ((P, P), (P - 1, P - 2))
    route, logits = cuda_router.decide(mx.array(prefix), mx.array(recent), counts, parameters, run=run)
    pooled = [np.concatenate([prefix[b, :n], recent[b, P - m :]]).mean(axis=0) for b, (n, m) in enumerate(counts)]
    error = _largest_error([(rows, means), (logits, spec.route_logits(weights, np.stack(pooled)))])
    return error if route.tolist() == spec.decide(np.array(logits)) else float("inf")


def _expected_by_row(
    q: mx.array, k: mx.array, v: mx.array, kv_tokens: int, pattern: PatternConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) by the specification, batch row by batch row as `_ROUTES` says."""
    arrays = [np.array(x.astype(mx.float32)) for x in (q, k[:, :, :kv_tokens], v[:, :, :kv_tokens])]
    rules = [pattern if route == Route.SPARSE else _dense(kv_tokens) for route in _ROUTES]
    masks = [spec.visible_mask(rule, q.shape[2], kv_tokens) for rule in rules]
    rows = [[x[row : row + 1] for x in arrays] for row in range(len(masks))]
    found = [spec.masked_attention(*row, mask, q.shape[3] ** -0.5) for row, mask in zip(rows, masks, strict=True)]
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _dense(kv_tokens: int) -> PatternConfig:
    return PatternConfig(window_tokens=kv_tokens)
