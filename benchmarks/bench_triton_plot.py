"""Draw bench_triton_prefill.png from bench_triton_prefill.json: rate over visible pairs, and fraction of the ideal.

Run from the repository root: python -m benchmarks.bench_triton_plot
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
COLOURS = {
    "dense cuDNN": "grey",
    "dense ours": "black",
    "streaming ours": "tab:blue",
    "streaming ours, portable kernel": "tab:orange",
    "streaming FlexAttention": "tab:green",
}


def main() -> None:
    """Two panels for head dim 128, a line a kernel."""
    record = json.loads((FOLDER / "bench_triton_prefill.json").read_text())
    rows = [row for row in record["rows"] if row["head_dim"] == 128]
    figure, (rate, fraction) = plt.subplots(1, 2, figsize=(10, 3.6))
    for kernel, colour in COLOURS.items():
        mine = [row for row in rows if row["kernel"] == kernel]
        tokens = [row["tokens"] for row in mine]
        rate.plot(tokens, [row["tflops"] for row in mine], marker="o", label=kernel, color=colour)
        if kernel.startswith("streaming"):
            fraction.plot(
                tokens, [row["fraction_of_ideal_cudnn"] for row in mine], marker="o", label=kernel, color=colour
            )
    fraction.axhline(1.0, color="grey", linewidth=0.8)
    rate.set_ylabel("TFLOP/s over visible pairs")
    fraction.set_ylabel("fraction of ideal, against cuDNN")
    for axis in (rate, fraction):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.suptitle(f"{record['hardware']['gpu']}, bfloat16, 32 query and 8 KV heads, D 128, sink 128, window 2048")
    figure.tight_layout()
    figure.savefig(FOLDER / "bench_triton_prefill.png", dpi=110)


if __name__ == "__main__":
    main()
