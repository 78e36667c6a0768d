"""What the bench_triton_* scripts share: tensors, timing, dense baselines, and the JSON they write."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flux_mlx.spec import PatternConfig, visible_pairs

HQ, HKV = 32, 8  # heads of Qwen3-8B and Llama-3-8B
PATTERN = PatternConfig()  # sink 128, window 2048, block 128
BASELINES = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}


def arguments(description: str, lengths: list[int]) -> argparse.Namespace:
    """--lengths, --head-dims, --repeat-ms and --out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens of the prompt or of the cache")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--repeat-ms", type=int, default=200, help="time spent on each figure")
    parser.add_argument("--rounds", type=int, default=3, help="passes over all figures; the median is reported")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the JSON")
    return parser.parse_args()


def random_qkv(q_tokens: int, kv_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal bfloat16 q `[1, HQ, L, D]` and k, v `[1, HKV, S, D]` on the GPU."""
    shapes = ((1, HQ, q_tokens, head_dim), (1, HKV, kv_tokens, head_dim), (1, HKV, kv_tokens, head_dim))
    return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)


def milliseconds(figures: dict[str, Callable[[], Any]], repeat_ms: int, rounds: int) -> dict[str, float]:
    """Median time of every call, the calls taken in turn so that a change of clocks touches all of them."""
    times: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(rounds):
        for name, run in figures.items():
            warmup = min(25, repeat_ms)
            times[name].append(triton.testing.do_bench(run, warmup=warmup, rep=repeat_ms, return_mode="median"))
    return {name: statistics.median(values) for name, values in times.items()}


def dense_baseline(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of as many queries as keys, by one of PyTorch's kernels."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attention_flops(pairs: int, head_dim: int) -> float:
    """Operations of both products over `pairs` visible (query, key) pairs of one head, for all heads."""
    return 4.0 * head_dim * HQ * pairs


def ideal_speedup(q_tokens: int, kv_tokens: int) -> float:
    """Dense visible pairs over streaming's: what a kernel with no cost but its pairs would gain."""
    return visible_pairs(None, q_tokens, kv_tokens) / visible_pairs(PATTERN, q_tokens, kv_tokens)


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, read and written bytes both counted."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ms = milliseconds({"copy": lambda: target.copy_(source)}, 200, 1)["copy"]
    return 2 * source.numel() * 2 / ms * 1e3


def _command() -> str:
    """The command of this run, less the place of its results."""
    words = [f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(words)


def write(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write the rows with the hardware, the versions and the command that made them; print them as a table."""
    gpu = torch.cuda.get_device_properties(0)
    record = {
        "hardware": {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "cpu": platform.machine()},
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "command": _command(),
        "shape": {"batch": 1, "query_heads": HQ, "kv_heads": HKV, "dtype": "bfloat16"},
        "pattern": {"sink_tokens": PATTERN.sink_tokens, "window_tokens": PATTERN.window_tokens, "block_size": 128},
        **facts,
        "rows": rows,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.rename(path)
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
