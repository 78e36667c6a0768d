"""How far automatic routes drift from a cold, exact run when a prompt comes in chunks or on a cached prefix.

    .venv/bin/flux_mlx.convert --gguf models/download/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --routers flux_mlx/data/routers/smollm2-135m-instruct/routers.safetensors \\
        --mlx-path models/smollm2-135m-flux-trained
    sh examples/with-openblas .venv/bin/python benchmarks/prefix_drift.py --json benchmarks/prefix_drift.json

A document hides two numbers. The question about the second is answered after several kinds of prefill: exact (layer by
layer, the reference), in chunks, and on the document's keys that the question about the first number left behind, cut
back as the server does it. For each: the share of layers whose route is the reference's, the share of sparse layers,
and the negative log-likelihood per token of the right answer (NLL), with its mean distance from the reference and that
mean's standard error. A question shorter than 16 tokens would not be routed on a cached prefix: there all layers are
full.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import trim_prompt_cache

import flux_mlx
from flux_mlx.spec import FluxConfig, Route

DOCUMENT = Path(__file__).resolve().parents[1] / "examples" / "data" / "us_constitution_1787.txt"
QUESTION = "\n\nQuestion: in the text above, what is the code of the {name}?\nAnswer: the code of the {name} is"
NAMES = ("harbour", "library", "orchard", "station", "theatre", "foundry")


@dataclass(frozen=True)
class Sample:
    """Token ids of a document with two hidden numbers, of the question about each, and of the second's answer."""

    document: list[int]
    questions: tuple[list[int], list[int]]
    answer: list[int]


def make_sample(tokenizer: Any, tokens: int, rng: random.Random) -> Sample:
    """A sample of about `tokens` tokens."""
    names, numbers = rng.sample(NAMES, 2), [str(rng.randrange(10_000, 100_000)) for _ in range(2)]
    words = DOCUMENT.read_text("utf-8").split()
    start = rng.randrange(len(words))
    words = ((words + words)[start : start + tokens])[: int(0.6 * tokens)]
    for name, number in zip(names, numbers, strict=True):
        words.insert(rng.randrange(len(words)), f"The code of the {name} is {number}.")
    questions = tuple(tokenizer.encode(QUESTION.format(name=name)) for name in names)
    return Sample(tokenizer.encode(" ".join(words)), questions, tokenizer.encode(f" {numbers[1]}"))


def in_chunks(model: Any, tokens: list[int], cache: list[Any], step: int) -> None:
    """Stock's prefill."""
    for start in range(0, len(tokens), step):
        model(mx.array([tokens[start : start + step]]), cache=cache)
        mx.eval([entry.state for entry in cache])
        mx.clear_cache()


def exactly(model: Any, tokens: list[int], cache: list[Any]) -> None:
    """Ours; `prefill` leaves the token after the prompt to the caller, so one is put there for it."""
    flux_mlx.prefill(model, mx.array([*tokens, 0]), cache)


def answer_nll(model: Any, sample: Sample, cache: list[Any]) -> float:
    """Negative log-likelihood per token of the answer, in nats; the cache holds all but the question's last token."""
    tokens = [sample.questions[1][-1], *sample.answer]
    logits = model(mx.array([tokens[:-1]]), cache=cache)[0].astype(mx.float32)
    return nn.losses.cross_entropy(logits, mx.array(tokens[1:]), reduction="mean").item()


def caches(model: Any, sample: Sample, step: int) -> Iterator[tuple[str, list[Any]]]:
    """(way to prefill, cache after it); the first is the reference. Chunks that two ways share are run once."""
    asked = [sample.document + question[:-1] for question in sample.questions]
    exact, on_prefix = model.make_cache(), model.make_cache()
    exactly(model, asked[1], exact)
    yield "exact", exact
    exactly(model, asked[0], on_prefix)
    exactly(model, sample.questions[1][:-1], cut(on_prefix, len(sample.document)))
    yield "cached prefix, exact", on_prefix
    shared, stop = model.make_cache(), len(sample.document) // step * step
    in_chunks(model, sample.document[:stop], shared, step)
    chunked, on_prefix = copy.deepcopy(shared), shared
    in_chunks(model, asked[1][stop:], chunked, step)
    yield f"chunks of {step}", chunked
    in_chunks(model, asked[0][stop:], on_prefix, step)
    in_chunks(model, sample.questions[1][:-1], cut(on_prefix, len(sample.document)), step)
    yield f"cached prefix, chunks of {step}", on_prefix


def cut(cache: list[Any], tokens: int) -> list[Any]:
    """`cache` with all but its first `tokens` tokens dropped, as the server does it for another question."""
    trim_prompt_cache(cache, cache[0].offset - tokens)
    return cache


def measure(model: Any, sample: Sample, step: int) -> dict[str, dict[str, float]]:
    """One sample: what `summary` averages, by way."""
    rows: dict[str, dict[str, float]] = {}
    reference: list[Route] = []
    for name, cache in caches(model, sample, step):
        taken, nll = flux_mlx.routes(cache), answer_nll(model, sample, cache)
        reference = reference or taken
        rows[name] = {
            "same_routes": statistics.mean(a == b for a, b in zip(taken, reference, strict=True)),
            "sparse": statistics.mean(route == Route.SPARSE for route in taken),
            "answer_nll": nll,
        }
        rows[name]["nll_minus_exact"] = nll - rows["exact"]["answer_nll"]
    return rows


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means, the standard error of the distance from the reference, and the share of samples with all routes alike."""
    means = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    distances = [row["nll_minus_exact"] for row in rows]
    means["nll_minus_exact_standard_error"] = statistics.stdev(distances) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
    means["samples_with_all_routes_the_same"] = statistics.mean(row["same_routes"] == 1 for row in rows)
    return {key: round(value, 4) for key, value in means.items()}


def result(args: argparse.Namespace, flux: FluxConfig, samples: list[Sample], found: list[dict]) -> dict[str, Any]:
    """The content of the JSON file, of the samples measured so far."""
    done = samples[: len(found)]
    return {
        "command": " ".join(["benchmarks/prefix_drift.py", *sys.argv[1:]]),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, float32",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "flux-mlx")},
        "blas": os.environ.get("LD_PRELOAD", "reference"),
        "model": args.model,
        "settings": {name: flux.to_dict()[name] for name in ("pattern", "router")},
        "samples": len(done),
        "document_tokens": statistics.mean(len(sample.document) for sample in done),
        "question_tokens": statistics.mean(len(sample.questions[1]) for sample in done),
        "rows": {name: summary([rows[name] for rows in found]) for name in found[0]},
    }


def main() -> None:
    """Measure; print a line and keep the JSON after each sample, so that an interrupted run keeps what it has."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="models/smollm2-135m-flux-trained", help="Flux model directory")
    parser.add_argument("--tokens", type=int, default=2100, help="of a document, about (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--step", type=int, default=512, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    args = parser.parse_args()
    model, tokenizer = flux_mlx.load(args.model)
    flux_mlx.set_route(model, "auto")
    rng = random.Random(0)
    samples = [make_sample(tokenizer, args.tokens, rng) for _ in range(args.samples)]
    found: list[dict[str, dict[str, float]]] = []
    for sample in samples:
        found.append(measure(model, sample, args.step))
        print(json.dumps(found[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(result(args, model.flux, samples, found), indent=1) + "\n")


if __name__ == "__main__":
    main()
