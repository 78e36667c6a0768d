"""docs/entry_points.md: what benchmarks/entry_points.json and the other results say, and the words around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parity_tests.entry_point_cells import ABSENT, ENTRY_POINTS, FAILS, PRECISIONS, YES

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "entry_points.md"
DRIFT = ROOT / "benchmarks" / "prefix_drift.json"
LONG_RUNS = ROOT / "benchmarks" / "long_runs.json"

Cells = dict[str, dict[str, dict[str, str]]]
"""Family to precision to entry point to outcome."""

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
    "`--adapter-path` of our commands": (
        "test_adapters.py",
        "works for lora, dora and full; settings, names, shapes and values are checked before a model is used",
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
        "test_server.py, test_server_refusals.py, test_server_parts.py, test_soak.py, test_server_replay.py",
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
    "`save_prompt_cache` of mlx-lm": (
        "test_cache.py; test_kv_policy.py",
        "works; refused before anything is written for a cache that dropped keys under the KV policy evict",
    ),
}
"""Command to (what runs it, what holds)."""


INTRODUCTION = """# Entry points, families, precisions

Made by `python -m parity_tests.entry_points`, which runs every cell on a tiny random model on a CPU, last at commit
{commit} on {date} ([outcomes](../benchmarks/entry_points.json)); every test run compares some cells with that.
*all* is {precisions}. With full routes a cell gives what the stock model gives, token by token
(without cache in bfloat16: within rounding); with the routers' routes it runs to its end. *none in stock*: the
family's stock model cannot do it either. Mixtures of experts in bfloat16 are missing because MLX's CPU backend
multiplies experts in float32 only.

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


def table(cells: Cells) -> str:
    """The document's table."""
    lines = ["| family | " + " | ".join(ENTRY_POINTS) + " |", "|---" * (1 + len(ENTRY_POINTS)) + "|"]
    for family, rows in cells.items():
        columns = (_cell({precision: rows[precision][name] for precision in PRECISIONS}) for name in ENTRY_POINTS)
        lines.append(f"| {family} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _cell(outcomes: dict[str, str]) -> str:
    """A cell of the table, of precision to outcome."""
    named = {word: [p for p, outcome in outcomes.items() if outcome == word] for word in (YES, ABSENT, FAILS)}
    for word, whole in ((YES, "all"), (ABSENT, "none in stock")):
        if len(named[word]) == len(outcomes):
            return whole
    return ", ".join(named[YES] + [f"**{precision} fails**" for precision in named[FAILS]])


def drift() -> str:
    """The end of the introduction's last sentence, and a table: what benchmarks/prefix_drift.py found."""
    found = json.loads(DRIFT.read_text("utf-8"))
    lines = [
        "on SmolLM2-135M with routers of a window of 1,024, before those that ship "
        f"({found['samples']} samples, documents of {found['document_tokens']:.0f} tokens on average, "
        f"{found['hardware']}; "
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


def long_runs() -> str:
    """A table of command to what it holds."""
    mutants = json.loads(LONG_RUNS.read_text("utf-8"))["mutated files"]["mutants"]
    found = {
        "FLUX_MLX_SOAK=1000 python -m pytest -s parity_tests/test_soak.py": (
            "1,000 requests, eight at a time, shared prefixes, clients that hang up: every answer is its single run's, "
            "memory is flat after warm-up"
        ),
        "FLUX_MLX_SOAK=1000 python -m pytest -s parity_tests/test_server_replay.py": (
            "1,000 requests with automatic routes, eight at a time: every answer is its replay's"
        ),
        "python -m parity_tests.fuzz --count 2000": (
            f"{sum(mutants.values()):,} mutants of {len(mutants)} kinds of files ({', '.join(mutants)}): no crash, no "
            "silent load of a stamped file, every error names its file"
        ),
    }
    return "\n".join(["| command | what it holds |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in found.items())])


def document(record: dict[str, Any]) -> str:
    """The whole document, of what benchmarks/entry_points.json holds."""
    rows = [f"| {name} | {by} | {holds} |" for name, (by, holds) in COMMANDS.items()]
    return INTRODUCTION.format(
        commit=record["commit"],
        date=record["date"],
        precisions=", ".join(PRECISIONS),
        table=table(record["cells"]),
        commands="\n".join(["| command | run by | with Flux models |", "|---|---|---|", *rows]),
        drift=drift(),
        long_runs=long_runs(),
    )
