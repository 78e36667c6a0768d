"""Decode attention of one token: a layer's time in a CUDA graph over the caches of many layers, cold in the L2 cache.

Run on a GPU from the repository root: python -m benchmarks.bench_triton_decode
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench_triton_common import (
    HKV,
    HQ,
    PATTERN,
    arguments,
    copy_bandwidth,
    milliseconds,
    write,
)
from cuda_reference.attention import full_attention, sparse_attention

LAYERS = 12


def layer_ms(run: Callable[[int], Any], repeat_ms: int, rounds: int) -> float:
    """Milliseconds of `run(layer)`, captured for all layers in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in range(LAYERS):
            run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            run(layer)
    return milliseconds({"graph": graph.replay}, repeat_ms, rounds)["graph"] / LAYERS


def rows_of(head_dim: int, tokens: int, bandwidth: float, repeat_ms: int, rounds: int) -> list[dict[str, Any]]:
    """Full and streaming decode at the end of a cache of `tokens` keys."""
    q = torch.randn(LAYERS, 1, HQ, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(LAYERS, 1, HKV, tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    runs = {
        "full": lambda layer: full_attention(q[layer], k[layer], v[layer], impl="triton"),
        "streaming": lambda layer: sparse_attention(q[layer], k[layer], v[layer], PATTERN, impl="triton"),
    }
    start = PATTERN.window_start(tokens - 1)
    keys = {"full": tokens, "streaming": tokens - start + min(PATTERN.sink_span, start)}
    rows = []
    for name, run in runs.items():
        ms = layer_ms(run, repeat_ms, rounds)
        bytes_read = 2 * HKV * keys[name] * head_dim * 2
        floor_ms = bytes_read / bandwidth * 1e3
        row = {"head_dim": head_dim, "tokens": tokens, "kernel": name, "us_per_layer": round(ms * 1e3, 2)}
        row |= {"keys_read": keys[name], "bandwidth_floor_us": round(floor_ms * 1e3, 2)}
        rows.append(row | {"time_over_floor": round(ms / floor_ms, 3), "tb_per_s": round(bytes_read / ms / 1e9, 3)})
    return rows


def main() -> None:
    """Time every head dim and length."""
    options = arguments(__doc__, [4096, 65536, 131072, 1048576])
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    rows = []
    for head_dim in options.head_dims:
        for tokens in options.lengths:
            rows += rows_of(head_dim, tokens, bandwidth, options.repeat_ms, options.rounds)
    write(options.out / "bench_triton_decode.json", rows, copy_tb_per_s=round(bandwidth / 1e12, 3), layers=LAYERS)


if __name__ == "__main__":
    main()
