"""Every entry point of mlx-lm on every family and precision, run: `python -m parity_tests.entry_points` writes
docs/entry_points.md.

A cell lists the precisions for which the entry point ran on a tiny random model of the family and did what it should:
with full routes exactly what the stock model does, with the routers' own routes to the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import mlx.core as mx

from parity_tests.entry_point_cells import ENTRY_POINTS, PRECISIONS, make_case, run_case
from parity_tests.tiny_models import FAMILIES

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "entry_points.md"
DRIFT = ROOT / "benchmarks" / "prefix_drift.json"

COMMANDS = {
    "`mlx_lm.generate`": (
        "test_stock_commands.py",
        "works; `--max-kv-size` is ignored, as for every model with a cache of its own",
    ),
    "`mlx_lm.chat`": (
        "test_stock_commands.py",
        "works; a turn shorter than the pool takes no layer from full to sparse",
    ),
    "`mlx_lm.cache_prompt`": ("test_stock_commands.py", "works; `flux_mlx.cache_prompt` adds a fingerprint"),
    "`mlx_lm.benchmark`": ("test_stock_commands.py", "runs; routes on its random tokens mean nothing"),
    "`mlx_lm.convert -q`": ("test_stock_commands.py", "works; routers keep their dtype"),
    "`mlx_lm.lora`, `mlx_lm.fuse`": (
        "test_stock_commands.py",
        "work; training is with full attention and passes routers by. `FLUX_MLX_TRAIN_ROUTERS=1`, for lora, fuse and "
        "whatever loads the adapters, opens the routers to training (test_router_training.py)",
    ),
    "`mlx_lm.evaluate`": (
        "test_stock_tools.py: its class, over a stand-in for lm_eval",
        "works; a continuation of 16 tokens or more is routed anew",
    ),
    "`mlx_lm.perplexity`": (
        "test_stock_tools.py",
        "works; every row is routed by itself, over the whole window",
    ),
    "`mlx_lm.awq`, `mlx_lm.gptq`, `mlx_lm.dynamic_quant`": (
        "test_stock_tools.py",
        "work, and leave routers alone; families that mlx-lm's awq does not know are refused by it",
    ),
    "`mlx_lm.server`": (
        "test_stock_commands.py",
        "works; but its `--trust-remote-code` trusts every model that a request names, and with `--draft-model` it "
        "goes on with cached prefixes at wrong positions, whatever the model: use `flux_mlx.server`",
    ),
    "`flux_mlx.server`": (
        "test_server.py, test_soak.py, test_server_replay.py",
        "works; `/stats` lists routes, chunks and cached prefix of each request",
    ),
    "`mlx.launch`, two local processes": (
        "test_distributed.py",
        "works for families with `shard`: llama, qwen2, qwen3, qwen3_moe, glm4_moe",
    ),
    "`mlx_lm.fuse --export-gguf`": (
        "test_router_training.py",
        "refused when the model is loaded, before anything is written: export the base model",
    ),
    "a Flux model as `--draft-model`": (
        "test_models.py: the function; test_server.py: `flux_mlx.server`",
        "stock commands load drafts without the trust flag: use `flux_mlx.server`, or Python",
    ),
}
"""Command to (what runs it, what holds)."""


def table(results: dict[tuple[str, str, str], str]) -> str:
    """The document's table, of (family, precision, entry point) to outcome."""
    lines = ["| family | " + " | ".join(ENTRY_POINTS) + " |", "|---" * (1 + len(ENTRY_POINTS)) + "|"]
    for family in dict.fromkeys(family for family, *_ in results):
        cells = []
        for name in ENTRY_POINTS:
            found = {precision: results[family, precision, name] for precision in PRECISIONS}
            ran = [precision for precision, outcome in found.items() if outcome == "yes"]
            absent = [precision for precision, outcome in found.items() if outcome.startswith("no such")]
            fails = [f"**{precision} fails**" for precision, outcome in found.items() if outcome.startswith("FAILS")]
            whole = "all" if len(ran) == len(PRECISIONS) else "none in stock" if len(absent) == len(PRECISIONS) else ""
            cells.append(whole or ", ".join(ran + fails))
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


LONG_RUNS = {
    "FLUX_MLX_SOAK=1000 python -m pytest -s parity_tests/test_soak.py": (
        "1,000 requests, eight at a time, shared prefixes, clients that hang up: every answer is its single run's, "
        "memory is flat after warm-up"
    ),
    "FLUX_MLX_SOAK=1000 python -m pytest -s parity_tests/test_server_replay.py": (
        "1,000 requests with automatic routes, eight at a time: every answer is its replay's"
    ),
    "python -m parity_tests.fuzz --count 2000": (
        "12,000 mutated configs, weights, tokenizers, router files, prompt caches and GGUF files: no crash, no silent "
        "load of a stamped file, every error names its file"
    ),
}
"""Command to what it holds."""

INTRODUCTION = """# Entry points, families, precisions

Made by `python -m parity_tests.entry_points`, which runs every cell on a tiny random model on a CPU. *all* is
{precisions}. With full routes a cell gives what the stock model gives, token by token (without cache in bfloat16:
within rounding); with the routers' routes it runs to its end. *none in stock*: the family's stock model cannot do it
either. Mixtures of experts in bfloat16 are missing because MLX's CPU backend multiplies experts in float32 only.

{table}

The commands themselves are run by the test suite on a tiny Llama in float32:

{commands}

## Chunks and cached prefixes

With automatic routes a run equals its replay: the same chunks, on the same cached prefixes, give the same routes and
the same greedy tokens. `FLUX_MLX_SOAK=1000 python -m pytest parity_tests/test_server_replay.py` holds it for 1,000
requests to `flux_mlx.server`, eight at a time; near-ties are counted and listed
([long runs](../benchmarks/long_runs.json)). On a cached prefix that was cut, all layers are full until 16 new tokens
come in one call: a shorter question is answered with full attention. How far runs drift from a cold, exact one,
{drift}

## Long runs

Not part of every test run; [what they gave](../benchmarks/long_runs.json).

{long_runs}
"""


def drift() -> str:
    """The end of the introduction's last sentence, and a table: what benchmarks/prefix_drift.py found."""
    found = json.loads(DRIFT.read_text("utf-8"))
    lines = [
        f"on SmolLM2-135M with its shipped routers ({found['samples']} samples, documents of "
        f"{found['document_tokens']:.0f} tokens on average, {found['hardware']}; "
        "[figures and command](../benchmarks/prefix_drift.json)):",
        "",
        "| prefill | layers routed as in the cold run | sparse layers | answer NLL, nats a token | minus cold run's |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        away = f"{row['nll_minus_exact']:+.3f} ± {row['nll_minus_exact_standard_error']:.3f}"
        cells = (f"{100 * row['same_routes']:.1f} %", f"{100 * row['sparse']:.1f} %", f"{row['answer_nll']:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if name == 'exact' else away} |")
    return "\n".join(lines)


def document(results: dict[tuple[str, str, str], str]) -> str:
    """docs/entry_points.md."""
    rows = [f"| {name} | {by} | {holds} |" for name, (by, holds) in COMMANDS.items()]
    commands = "\n".join(["| command | run by | with Flux models |", "|---|---|---|", *rows])
    precisions = ", ".join(PRECISIONS)
    runs = [f"| `{command}` | {holds} |" for command, holds in LONG_RUNS.items()]
    long_runs = "\n".join(["| command | what it holds |", "|---|---|", *runs])
    parts = {"table": table(results), "commands": commands, "drift": drift(), "long_runs": long_runs}
    return INTRODUCTION.format(precisions=precisions, **parts)


def main() -> None:
    """Run every cell and write the document. Exits with the failures, if there are any."""
    parser = argparse.ArgumentParser(prog="parity_tests.entry_points", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    args = parser.parse_args()
    results = {}
    for family, precision in itertools.product(FAMILIES, PRECISIONS):
        case = make_case(family, precision)
        results |= {(family, precision, name): run_case(case, name) for name in ENTRY_POINTS}
        mx.clear_cache()
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(document(results))
    failures = [f"{key}: {outcome}" for key, outcome in results.items() if outcome.startswith("FAILS")]
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
