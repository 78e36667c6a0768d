"""Decode on CUDA inside MLX: comparisons, times on the device, and what a call costs the host.

The stages "decode", "host", "decode-times" and "decode-1M" of `benchmarks.mlx_cuda_attention`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx

from benchmarks.mlx_cuda_common import DTYPE, HEAD_DIM, HEADS, PATTERN, Rows, attempt, draw, draw_queries, parity
from flux_mlx import cuda_kernels, streaming
from flux_mlx.cuda_kernels import Run
from flux_mlx.spec import PatternConfig, Route

DECODE_LENGTHS = (4096, 32768, 131072, 524288)
SIZES = (("bfloat16", 128), ("float16", 128), ("bfloat16", 64), ("float16", 64))
QUERIES = ((4, 1), (1, 1), (4, 3), (8, 1), (1, 3), (4, 8))  # query heads of a KV head, tokens
KEY_SETS = 8  # caches that decode goes round: 70 MB of visible keys
HOST_TOKENS = 4096
ROW_CALLS = 64
HOST_SAMPLES = 20
CALLS_AT_ONCE = 48


def decoder_of(q: mx.array, k: mx.array, pattern: PatternConfig, route: Any, run: Run) -> Callable[..., mx.array]:
    """The prepared decode of such calls."""
    dtype = str(q.dtype).rpartition(".")[2]
    return cuda_kernels.decoder(tuple(q.shape), tuple(k.shape), dtype, pattern, q.shape[3] ** -0.5, route, run)


def decode_parity(
    run: Run, pattern: PatternConfig = PATTERN, kv_tokens: int = 2600, sizes: Any = SIZES, queries: Any = QUERIES
) -> Rows:
    """Every dtype and head dim, GQA and number of tokens over a longer buffer; a slice; and calls that run at once."""
    rows = []
    for dtype, head_dim in sizes:
        kind = {"batch": 2, "dtype": dtype, "head_dim": head_dim}
        k, v = draw(2, kv_tokens + 100, **kind), draw(2, kv_tokens + 100, **kind)
        for group, q_tokens in queries:
            q = draw_queries(2 * group, q_tokens, **kind)
            name = f"decode {dtype} D {head_dim} GQA {group} tokens {q_tokens}"
            rows.append(parity(name, q, k, v, pattern, kv_tokens=kv_tokens, run=run))
            rows.append(same_as_routed(q, k, v, pattern, kv_tokens, run))
        sliced = [x[:, :, :kv_tokens] for x in (k, v)]
        rows.append(parity(f"decode {dtype} D {head_dim} from a slice", q, *sliced, pattern, run=run))
    return [*rows, at_once(pattern, kv_tokens, run)]


def same_as_routed(q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, kv_tokens: int, run: Run) -> dict:
    """Whether `decoder` gives the bits of `routed_attention`."""
    codes = (int(Route.SPARSE), int(Route.FULL))
    wanted = cuda_kernels.routed_attention(q, k, v, codes, pattern, kv_tokens=kv_tokens, run=run)[0]
    found = decoder_of(q, k, pattern, codes, run)(q, k, v, kv_tokens)
    is_same = mx.array_equal(found, wanted.swapaxes(1, 2).reshape(found.shape)).item()
    return {"case": "the same by decoder()", "q": list(q.shape), "right": is_same}


def at_once(pattern: PatternConfig, kv_tokens: int, run: Run) -> dict:
    """Whether calls that do not depend on each other, evaluated together, give the bits of one after the other."""
    k, v = (draw(HEADS[1], kv_tokens) for _ in range(2))
    queries = [draw(HEADS[0], 1) for _ in range(CALLS_AT_ONCE)]
    decode = decoder_of(queries[0], k, pattern, Route.SPARSE, run)
    single = [decode(q, k, v, kv_tokens) for q in queries]
    for out in single:
        mx.eval(out)
    together = [decode(q, k, v, kv_tokens) for q in queries]
    mx.eval(together)
    is_same = all(mx.array_equal(a, b).item() for a, b in zip(single, together, strict=True))
    return {"case": f"{CALLS_AT_ONCE} calls at once", "right": is_same}


def million_parity(run: Run, tokens: int = 1 << 20) -> Rows:
    """One row SPARSE, one FULL, over a million keys."""
    q, k, v = (draw(heads, n, batch=2) for heads, n in ((HEADS[0], 1), (HEADS[1], tokens), (HEADS[1], tokens)))
    return [parity(f"decode of {tokens} keys", q, k, v, PATTERN, run=run)]


def contenders(q: mx.array, k: mx.array, run: Run) -> dict[str, Callable[..., mx.array]]:
    """Attention of one query over whole buffers, by name: functions of q, k and v."""
    scale, tokens = HEAD_DIM**-0.5, k.shape[2]
    decode = decoder_of(q, k, PATTERN, Route.SPARSE, run)
    return {
        "dense": partial(streaming.dense, scale=scale),
        "decoder": lambda q, k, v: decode(q, k, v, tokens).reshape(q.shape),
        "sparse": lambda q, k, v: cuda_kernels.sparse_attention(q, k, v, PATTERN, run=run)[0],
        "composition": partial(streaming.attend, pattern=PATTERN, scale=scale),
        "full_ours": lambda q, k, v: cuda_kernels.full_attention(q, k, v, run=run)[0],
    }


def decode_times(tokens: int, run: Run) -> Rows:
    """One query over `tokens` keys, call after call: stock dense, ours sparse and full, the composition."""
    caches = [(draw(HEADS[1], tokens), draw(HEADS[1], tokens)) for _ in range(KEY_SETS)]
    first, times = draw(HEADS[0], 1), {}
    for name, attend in contenders(first, caches[0][0], run).items():

        def call(index: int, before: mx.array | None, attend: Callable[..., mx.array] = attend) -> mx.array:
            return attend(first if before is None else before, *caches[index % KEY_SETS])

        attempt(times, name, call, chained=True)
    return [{"operation": "decode", "tokens": tokens, "dtype": DTYPE} | times]


def host_times(run: Run, tokens: int = HOST_TOKENS, calls: int = ROW_CALLS, samples: int = HOST_SAMPLES) -> Rows:
    """Microseconds of a call on the host: made but not evaluated; and in a row of dependent calls, evaluated."""
    q, k, v = draw(HEADS[0], 1), draw(HEADS[1], tokens), draw(HEADS[1], tokens)
    rows = []
    for name, attend in contenders(q, k, run).items():

        def chain(attend: Callable[..., mx.array] = attend) -> mx.array:
            out = q
            for _ in range(calls):
                out = attend(out, k, v)
            return out

        mx.eval(chain())  # loads the kernel
        made, evaluated = [], []
        for _ in range(samples):
            start = time.perf_counter()
            out = chain()
            made.append(time.perf_counter() - start)
            mx.eval(out)
            evaluated.append(time.perf_counter() - start)
        row = {"made_us": 1e6 * median(made) / calls, "evaluated_us": 1e6 * median(evaluated) / calls}
        rows.append({"operation": "host", "call": name, "tokens": tokens} | row)
    return rows
