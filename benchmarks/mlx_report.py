"""The measured tables of docs/speed.md, from JSON files, all but one of an H100: `python -m benchmarks.mlx_report`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.mlx_prediction import columns
from benchmarks.mlx_router_cost import APART, ASIDE, AT_HAND, FORCED, OPERATIONS, USED, cost
from flux_mlx.benchmark_compare import median_ratio
from flux_mlx.spec import Route

FOLDER = Path(__file__).parent
NAMES_OF_BITS = {16: "bf16", 4: "4bit"}
COMPARED = ("mlx_bf16", "mlx_bf16_256k", "mlx_4bit", "mlx_4bit_256k")
SHORT = "mlx_short"


def record(name: str) -> dict[str, Any]:
    """A record by its file's name."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def is_measured(name: str) -> bool:
    """Whether there is such a record."""
    return (FOLDER / f"{name}.json").exists()


def length(tokens: int) -> str:
    """As 32K or 1M."""
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K" if tokens >= 1024 else str(tokens)


def compared_rows() -> Iterable[tuple[int, dict[str, Any]]]:
    """(bits, row) of whole runs, stock beside Flux."""
    for name in filter(is_measured, COMPARED):
        found = record(name)
        yield from ((found["model"]["bits"], row) for row in found["rows"])


def prefill_table() -> str:
    """Prefill of whole prompts."""
    lines: list[tuple[Any, ...]] = [
        (
            "bits",
            "tokens",
            "sparse of 36",
            "stock s",
            "Flux s",
            "speed-up",
            "first token",
            "ceiling",
            "of ceiling",
            "runs",
        )
    ]
    for bits, row in compared_rows():
        prefill = row["prefill"]
        times = (f"{row[side]['prefill_s']['median']:.2f}" for side in ("stock", "flux"))
        ratios = (prefill["speedup"], row["first_token_speedup"], prefill["ceiling"], prefill["fraction_of_ceiling"])
        sparse = round(row["sparse_layers"])
        lines.append((bits, length(row["prompt_tokens"]), sparse, *times, *(f"{x:.2f}" for x in ratios), row["trials"]))
    return columns(lines)


def router_table() -> str:
    """What routers cost, over the rounds of all processes."""
    kinds: list[tuple[str, str]] = [
        (USED, "routers by kernels, as used"),
        (OPERATIONS, "routers by MLX's operations"),
        (APART, "routers that share no projection with attention"),
        (ASIDE, "such routers beside forced routes, which nobody asks"),
        (AT_HAND, "routes that the device knows without a router"),
    ]
    rows = record("mlx_router")["rows"]

    def times(kind: str) -> list[float]:
        return [run_s for row in rows for run_s in row["runs"][kind]["all_prefill_s"]]

    lines: list[tuple[Any, ...]] = [("against forced routes, 8K", "ms", "% of prefill", "95 %")]
    for kind, words in kinds:
        seconds, share, (low, high) = cost(times(kind), times(FORCED))
        lines.append((words, f"{1e3 * seconds:.1f}", f"{100 * share:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"))
    return columns(lines)


def short_table() -> str:
    """Prompts that sink and window hold, and one just beyond: stock's time over Flux's."""
    lines: list[tuple[Any, ...]] = [("tokens", "prefill", "first token", "a token", "stock's token ms, least to most")]
    for row in record(SHORT)["rows"]:
        ratios = (row["prefill"]["speedup"], row["first_token_speedup"], row["decode"]["speedup"])
        token = row["stock"]["token_s"]
        lines.append(
            (
                row["prompt_tokens"],
                *(f"{x:.3f}" for x in ratios),
                f"{1e3 * token['min']:.1f} to {1e3 * token['max']:.1f}",
            )
        )
    return columns(lines)


def decode_table() -> str:
    """A token over filled caches."""
    lines: list[tuple[Any, ...]] = [
        (
            "bits",
            "tokens",
            "stock ms",
            "keep ms",
            "evict ms",
            "least of each ms",
            "keep",
            "evict",
            "ceiling",
            "keep of it",
        )
    ]
    for bits, name in NAMES_OF_BITS.items():
        for row in record(f"mlx_decode_{name}")["rows"]:
            times = (f"{1e3 * row[f'{kind}_token_s']:.1f}" for kind in ("stock", "keep", "evict"))
            least = " / ".join(f"{1e3 * s:.1f}" for s in row["least_token_s"].values())
            ratios = (row["speedup"], row["evict_speedup"], row["ceiling"], row["fraction_of_ceiling"])
            lines.append((bits, length(row["tokens"]), *times, least, *(f"{x:.2f}" for x in ratios)))
    return columns(lines)


def host_table() -> str:
    """Where a token's time goes."""
    lines: list[tuple[Any, ...]] = [
        ("bits", "layers", "tokens", "Python builds", "MLX hands over", "then waits", "together ms")
    ]
    for bits, name in NAMES_OF_BITS.items():
        for row in record(f"mlx_host_time_{name}")["rows"]:
            times = (f"{1e3 * row[part]:.2f}" for part in ("build_s", "encode_s", "wait_s", "total_s"))
            lines.append((bits, row["kind"], length(row["tokens"]), *times))
    return columns(lines)


def graph_table() -> str:
    """Nodes and building time of a decoding step, counted and timed without a GPU, before and after blocks' steps."""
    stages = record("mlx_graph_cost")["stages"]
    lines: list[tuple[Any, ...]] = [
        ("bits", "layers", "nodes a layer, before", "after", "views", "build over stock's, before", "after", "ms")
    ]
    for bits, name in NAMES_OF_BITS.items():
        befores, afters = (stages[f"{name}-{when}"]["rows"] for when in ("before", "after"))
        for before, after in zip(befores, afters, strict=True):
            nodes = (before["nodes_a_layer"], after["nodes_a_layer"], after["views_a_layer"])
            ratios = (row["build_s"] / rows[0]["build_s"] for row, rows in ((before, befores), (after, afters)))
            build = f"{1e3 * after['build_s']:.2f}"
            lines.append((bits, after["kind"], *(f"{x:.1f}" for x in nodes), *(f"{x:.2f}" for x in ratios), build))
    return columns(lines)


def device_table() -> str:
    """Our kernels by NVIDIA's profiler."""
    lines: list[tuple[Any, ...]] = [("kernel", "keys", "queries", "device ms", "of ideal")]
    for row in record("mlx_kernel_times")["rows"]:
        ideal = f"{row['fraction_of_ideal']:.2f}" if "fraction_of_ideal" in row else ""
        kernel = f"{row['route']} {row['operation']}"
        lines.append((kernel, length(row["tokens"]), length(row["q_tokens"]), f"{row['median_ms']:.4f}", ideal))
    return columns(lines)


def attention_table() -> str:
    """Prefill attention by the host's clock: stock's dense call, ours, the composition of stock calls."""
    lines: list[tuple[Any, ...]] = [
        ("keys", "queries", "stock dense ms", "ideal ms", "our kernel ms", "of ideal", "portable", "composition")
    ]
    for name in ("prefill-32K", "prefill-128K", "chunks"):
        for row in record("mlx_cuda_attention")["stages"][name]["rows"]:
            times = (f"{row[f'{kind}_ms']:.3f}" for kind in ("dense", "ideal", "hopper"))
            shares = (f"{row[f'{kind}_of_ideal']:.2f}" for kind in ("hopper", "portable", "composition"))
            lines.append((length(row["tokens"]), length(row["q_tokens"]), *times, *shares))
    return columns(lines)


def exact_table() -> str:
    """Exact prefill over chunked prefill at equal routes."""
    lines: list[tuple[Any, ...]] = [
        (
            "tokens",
            "time, all full",
            "time, spread",
            "peak over the allowed one, all full",
            "spread",
            "stock over chunked spread",
        )
    ]
    for row in record("mlx_exact")["rows"]:
        ratios = (
            row[f"{what}_{kind}"] for what in ("exact_over_chunked", "peak_over_allowed") for kind in ("full", "spread")
        )
        chunked = (row["runs"][f"chunked, {kind}"]["all_prefill_s"] for kind in ("full", "spread"))
        lines.append((length(row["tokens"]), *(f"{x:.2f}" for x in (*ratios, median_ratio(*chunked)))))
    return columns(lines)


def ratio(value: float | None) -> str:
    """A speed-up or a ceiling, which a noisy machine may lack."""
    return "" if value is None else f"{value:.2f}"


def commands_table() -> str:
    """Stock's commands, which prefill in chunks: the stock model, and a Flux model by force and routed."""
    lines: list[tuple[Any, ...]] = [
        (
            "tokens",
            "stock s",
            "forced s",
            "routed s",
            "prefill, forced",
            "prefill, routed",
            "first token, forced",
            "first token, routed",
        )
    ]
    for row in record("mlx_commands")["rows"]:
        times = (f"{row['runs'][kind]['prefill_s']:.3f}" for kind in ("stock", "forced", "routed"))
        ratios = (row[f"{what}_speedup_{kind}"] for what in ("prefill", "first_token") for kind in ("forced", "routed"))
        lines.append((length(row["tokens"]), *times, *map(ratio, ratios)))
    return columns(lines)


def batch_table() -> str:
    """Whole prompts of several rows at a time; tokens a second are of all rows."""
    lines: list[tuple[Any, ...]] = [
        (
            "rows",
            "tokens",
            "prefill, stock s",
            "Flux s",
            "speed-up",
            "ceiling",
            "decode, stock tok/s",
            "Flux tok/s",
            "speed-up",
            "ceiling",
            "peak, stock GB",
            "Flux GB",
        )
    ]
    for row in record("mlx_batch")["rows"]:
        cells = []
        for phase, name, digits in (("prefill", "prefill_s", 1), ("decode", "decode_tokens_per_s", 0)):
            cells += [f"{row[side][name]['median']:.{digits}f}" for side in ("stock", "flux")]
            cells += [ratio(row[phase][what]) for what in ("speedup", "ceiling")]
        peaks = (f"{row[side]['peak_bytes'] / 1e9:.1f}" for side in ("stock", "flux"))
        lines.append((row["batch_size"], length(row["prompt_tokens"]), *cells, *peaks))
    return columns(lines)


def million_table() -> str:
    """A very long prompt on a small shape, evict: flat should be a sparse layer's cache, and its time for a token."""
    lines: list[tuple[Any, ...]] = [
        (
            "tokens",
            "prefill s",
            "tok/s",
            "a new token ms",
            "peak GB",
            "hidden states GB",
            "caches GB",
            "largest sparse layer's MB",
            "a sparse layer, us a token",
        )
    ]
    for row in record("mlx_million")["rows"]:
        sparse = [layer["seconds"] for layer in row["layers"] if layer["route"] == Route.SPARSE.name]
        lines.append(
            (
                length(row["tokens"]),
                f"{row['prefill_s']:.2f}",
                f"{row['tokens'] / row['prefill_s']:.0f}",
                f"{1e3 * row['token_s']:.2f}",
                *(f"{row[name] / 1e9:.3f}" for name in ("peak_bytes", "hidden_buffer_bytes", "kv_bytes")),
                f"{row['largest_sparse_cache_bytes'] / 1e6:.2f}",
                f"{1e6 * statistics.median(sparse) / row['tokens']:.3f}",
            )
        )
    return columns(lines)


def crossover_table() -> str:
    """Speed-ups by length, then the lengths from which on routing pays."""
    found = record("mlx_crossover")
    rows: list[tuple[Any, ...]] = [("tokens", "prefill", "decode", "runs")]
    for row in found["rows"]:
        speedups = (f"{row[phase]['speedup']:.3f}" for phase in ("prefill", "decode"))
        rows.append((row["prompt_tokens"], *speedups, row["trials"]))
    phases: list[tuple[Any, ...]] = [("phase", "pays from", "not at", "least speed-up", "at")]
    for phase, what in found["crossover"].items():
        bounds = (what[name] or "none measured" for name in ("pays_from_tokens", "does_not_pay_at_tokens"))
        phases.append((phase, *bounds, f"{what['least_speedup']:.3f}", what["least_speedup_at_tokens"]))
    return f"{columns(rows)}\n\n{columns(phases)}"


LATER = {
    "mlx_commands": commands_table,
    "mlx_batch": batch_table,
    "mlx_million": million_table,
    "mlx_crossover": crossover_table,
}
"""Tables that are shown as soon as their record is there."""


def tables() -> list[str]:
    """All of them, in the page's order."""
    decoding = (decode_table, host_table, graph_table)
    makers = (prefill_table, exact_table, router_table, short_table, *decoding, attention_table, device_table)
    later = [make for name, make in LATER.items() if is_measured(name)]
    return [make() for make in (*makers, *later)]


if __name__ == "__main__":
    print("\n\n".join(tables()))
