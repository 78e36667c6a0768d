"""Predicted, not measured: Qwen3-8B with 4-bit weights on Apple silicon, stock against Flux.

    python -m benchmarks.apple_prediction [--json benchmarks/apple_prediction.json]

The arithmetic is that of `benchmarks/mlx_prediction.py`; the rates come from public figures, each with its source in
`SOURCES`. What MLX reaches of them is taken from figures that mlx-lm publishes for an M4 Max, and held for every chip;
the rest of those figures, and what Apple said of M5 against M4, check it. Nobody has run Flux on any of these machines.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.mlx_prediction import (
    ITEM_BYTES,
    QUANTIZED_BITS,
    QWEN3_4B,
    QWEN3_8B,
    Machine,
    columns,
    crossover_tokens,
    error,
    known_table,
    prefill_s,
    token_s,
)

LABEL = "predicted, not measured"
LENGTHS_TOKENS = (8192, 32768, 131072, 262144)
BITS = 4
OMEGAS = {8192: 25, 32768: 25, 131072: 25, 262144: 28}
"""Sparse layers of 36: Omega 0.7, and 0.77 at 256K."""

SOURCES = {
    "mlx-lm": "mlx-lm 0.32.2, BENCHMARKS.md (Qwen3-4B-Instruct-2507 on a 64 GB M4 Max, prompts of 2,048 tokens): "
    "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/BENCHMARKS.md",
    "M2 Ultra": "800 GB/s, 76 cores: 'Apple M2 Ultra chip unveiled for Mac Pro and Mac Studio', "
    "https://propakistani.pk/2023/06/06/apple-m2-ultra-chip-unveiled-for-mac-pro-and-mac-studio/ ; 27.2 TFLOP/s: "
    "Apple's Mac Pro page, https://www.apple.com/mac-pro/",
    "M3 Ultra": "819 GB/s, 80 cores: 'Apple Unleashes New Mac Studio With M3 Ultra and M4 Max SoCs', "
    "https://www.techpowerup.com/news-tags/Mac%20Studio ; 1,398 MHz: '40-Core M3 Max', "
    "https://hmc-tech.com/gpu/apple-8-core-m4-fl-vs-apple-40-core-m3-max",
    "M4": "120 GB/s, the comparison of M5 and M4 in 'Apple's M5 Macs With macOS 26.2', "
    "https://particle.news/story/apples-m5-macs-with-macos-262-deliver-up-to-4x-faster-local-llm-start-times-in-mlx ; "
    "1,578 MHz: '8-Core M4', https://hmc-tech.com/gpu/apple-8-core-m4-fl-vs-apple-24-core-m1-max",
    "M4 Max": "546 GB/s, 40 cores: 'Apple M4 Max official', "
    "http://www.notebookcheck.net/Apple-M4-Max-official-with-incremental-upgrades-over-the-M3-Max.911098.0.html ; "
    "the clock of M4",
    "M5": "153 GB/s, 10 cores, over 4 times M4's peak for matrices: 'Apple's M5 chip brings faster AI', "
    "https://the-decoder.com/apples-m5-chip-brings-faster-ai-to-macbook-ipad-and-vision-pro/ ; 1,024 operations a core "
    "and cycle: 'Investigating the GPU Neural Accelerators on Apple A19/M5', "
    "https://tzakharko.github.io/apple-neural-accelerators-benchmark ; M4's clock, which gives the 4 times",
    "M5 Max": "614 GB/s, 40 cores, over 4 times M4 Max's peak for matrices: 'Apple debuts M5 Pro and M5 Max', "
    "https://www.apple.com/newsroom/2026/03/apple-debuts-m5-pro-and-m5-max-to-supercharge-the-most-demanding-pro-workflows/"
    " ; operations and clock as M5",
    "M5 against M4": "up to 4.1 times sooner to the first token, 19 to 27 % faster after it: 'Apple confirms up to 4x "
    "MLX AI performance boost', https://www.applemust.com/apple-confirms-up-to-4x-mlx-ai-performance-boost-with-macos-26-2",
}

# mlx-lm's figures for an M4 Max: bits -> (prompt tokens/s, generated tokens/s, bits of a stored weight)
M4_MAX_QWEN3_4B = {
    16: (1780.63, 52.47, 16.0),
    8: (1606.573, 86.907, 8.5),
    6: (1576.73, 104.68, 6.5),
    4: (1622.27, 134.52, 4.5),
}
ATTENTION_SHARE = 0.8  # of the matrix rate, for dense attention: assumed, as in benchmarks/metal_roofline.py
SPARSE_FRACTION = 0.8  # of the ideal, for sparse attention in prefill: assumed


@dataclass(frozen=True)
class Chip:
    """Public figures of one chip, with the largest GPU and memory that it is sold with."""

    name: str
    gb_s: float
    tflops: float
    memory_gb: int


CHIPS = (
    Chip("M2 Ultra", 800, 27.2, 192),
    Chip("M3 Ultra", 819, 80 * 256 * 1.398 / 1000, 512),
    Chip("M4 Max", 546, 40 * 256 * 1.578 / 1000, 128),
    Chip("M5", 153, 10 * 1024 * 1.578 / 1000, 32),
    Chip("M5 Max", 614, 40 * 1024 * 1.578 / 1000, 128),
)
M4 = Chip("M4", 120, 10 * 256 * 1.578 / 1000, 32)


@dataclass(frozen=True)
class Reached:
    """What MLX reaches of a chip's peaks.

    Args:
        bandwidth: Share of the memory bandwidth, in decode.
        token_s: Time of a decoded token that bytes do not explain.
        products: Share of the matrix rate in prefill, by bits of a weight.
    """

    bandwidth: float
    token_s: float
    products: dict[int, float]


def reached_on_m4_max() -> Reached:
    """Solve for what the M4 Max reaches: decode from its 16- and 4-bit rows, prefill from each."""
    chip = next(chip for chip in CHIPS if chip.name == "M4 Max")
    times = {bits: 1 / row[1] for bits, row in M4_MAX_QWEN3_4B.items()}
    size = {bits: QWEN3_4B.read_weights * row[2] / 8 for bits, row in M4_MAX_QWEN3_4B.items()}
    bytes_s = (size[16] - size[4]) / (times[16] - times[4])
    bandwidth = bytes_s / (chip.gb_s * 1e9)
    products = {}
    for bits in (16, 8, 4):
        without = Machine("", {bits: float("inf")}, ATTENTION_SHARE * chip.tflops, bytes_s / 1e9, 0.0, 1.0)
        left = 2048 / M4_MAX_QWEN3_4B[bits][0] - prefill_s(QWEN3_4B, without, bits, 2048)
        flops = 2 * QWEN3_4B.layers * QWEN3_4B.layer_weights * 2048
        products[bits] = flops / left / (chip.tflops * 1e12)
    return Reached(bandwidth, times[16] - size[16] / bytes_s, products)


def machine(chip: Chip, reached: Reached) -> Machine:
    """The chip as the arithmetic sees it."""
    return Machine(
        chip.name,
        {bits: share * chip.tflops for bits, share in reached.products.items()},
        ATTENTION_SHARE * chip.tflops,
        reached.bandwidth * chip.gb_s,
        reached.token_s,
        SPARSE_FRACTION,
    )


def bytes_needed(tokens: int) -> float:
    """Weights and the keys and values of every layer."""
    weights = QWEN3_8B.read_weights * QUANTIZED_BITS[BITS] / 8
    return weights + QWEN3_8B.layers * QWEN3_8B.kv_token_bytes * tokens


def predictions(reached: Reached) -> list[dict[str, Any]]:
    """One row for each chip and length."""
    rows = []
    for chip in CHIPS:
        device = machine(chip, reached)
        for tokens in LENGTHS_TOKENS:
            sparse = OMEGAS[tokens]
            first = [prefill_s(QWEN3_8B, device, BITS, tokens, n) for n in (0, sparse)]
            decode = [1 / token_s(QWEN3_8B, device, BITS, tokens, n) for n in (0, sparse)]
            rows.append(
                {
                    "chip": chip.name,
                    "tokens": tokens,
                    "sparse_layers": sparse,
                    "stock_first_token_s": first[0],
                    "flux_first_token_s": first[1],
                    "first_token_speedup": first[0] / first[1],
                    "stock_decode_tokens_per_s": decode[0],
                    "flux_decode_tokens_per_s": decode[1],
                    "decode_speedup": decode[1] / decode[0],
                    "stock_fits": bytes_needed(tokens) < 1e9 * chip.memory_gb,
                }
            )
    return rows


def crossovers(reached: Reached) -> dict[str, int | None]:
    """Length from which on 25 sparse layers of 36 gain 2 % of prefill, by chip."""
    return {chip.name: crossover_tokens(QWEN3_8B, machine(chip, reached), BITS, 25) for chip in CHIPS}


def checks(reached: Reached) -> list[dict[str, Any]]:
    """Public figures that the calibration did not use, beside what the arithmetic says."""
    rows = []
    chip = next(chip for chip in CHIPS if chip.name == "M4 Max")
    for bits in (8, 6):
        size = QWEN3_4B.read_weights * M4_MAX_QWEN3_4B[bits][2] / 8
        predicted = 1 / (reached.token_s + size / (reached.bandwidth * chip.gb_s * 1e9))
        rows.append({"figure": f"M4 Max, Qwen3-4B {bits}-bit, decode, tokens/s", "predicted": predicted})
        rows[-1]["public"] = M4_MAX_QWEN3_4B[bits][1]
    m4, m5 = machine(M4, reached), machine(next(c for c in CHIPS if c.name == "M5"), reached)
    first = prefill_s(QWEN3_8B, m4, BITS, 4096) / prefill_s(QWEN3_8B, m5, BITS, 4096)
    rows.append({"figure": "M5 over M4, first token, times (published: up to)", "predicted": first, "public": 4.1})
    decode = token_s(QWEN3_8B, m4, BITS, 4096) / token_s(QWEN3_8B, m5, BITS, 4096)
    rows.append({"figure": "M5 over M4, decode, times (published: 1.19 to 1.27)", "predicted": decode, "public": 1.23})
    return rows


def as_text(rows: list[dict[str, Any]], reached: Reached) -> str:
    """Markdown for docs/speed.md."""
    head = ("chip", "tokens", "omega", "TTFT stock s", "TTFT Flux s", "times", "stock tok/s", "Flux tok/s", "times")
    lines: list[tuple[Any, ...]] = [head]
    for row in rows:
        first = (f"{row[f'{side}_first_token_s']:.1f}" for side in ("stock", "flux"))
        decode = (f"{row[f'{side}_decode_tokens_per_s']:.1f}" for side in ("stock", "flux"))
        lines.append(
            (
                *(
                    row["chip"] + "*" * (not row["stock_fits"]),
                    f"{row['tokens'] // 1024}K",
                    f"{row['sparse_layers'] / QWEN3_8B.layers:.2f}",
                ),
                *(*first, f"{row['first_token_speedup']:.2f}", *decode, f"{row['decode_speedup']:.2f}"),
            )
        )
    checked: list[tuple[Any, ...]] = [("public figure", "published", "by this arithmetic", "error")]
    for row in checks(reached):
        values = (f"{row['public']:.4g}", f"{row['predicted']:.4g}", error(row["predicted"], row["public"]))
        checked.append((row["figure"], *values))
    where: list[tuple[Any, ...]] = [("chip", "prefill pays from, tokens"), *crossovers(reached).items()]
    note = "\\* stock's keys and values do not fit into this chip's largest memory; those of evict do"
    tables = (
        f"Qwen3-8B, 4-bit weights: {LABEL}",
        columns(lines),
        note,
        columns(where),
        columns(checked),
        known_table(),
    )
    return "\n\n".join(tables)


def main() -> None:
    """Print the tables; write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the predictions")
    args = parser.parse_args()
    reached = reached_on_m4_max()
    rows = predictions(reached)
    print(as_text(rows, reached))
    if args.json:
        record = {
            "command": "python -m benchmarks.apple_prediction --json benchmarks/apple_prediction.json",
            "what": LABEL,
            "sources": SOURCES,
            "assumed": {
                "attention_share": ATTENTION_SHARE,
                "sparse_fraction": SPARSE_FRACTION,
                "kv_item_bytes": ITEM_BYTES,
            },
            "reached_on_m4_max": vars(reached),
            "chips": [vars(chip) for chip in CHIPS],
            "crossover_tokens": crossovers(reached),
            "checks": checks(reached),
            "rows": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
