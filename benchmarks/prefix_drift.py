"""How far automatic routes drift from a cold, exact run when a prompt comes in chunks or on a cached prefix.

    sh examples/with-openblas .venv/bin/python benchmarks/prefix_drift.py --json benchmarks/prefix_drift.json

A document hides two numbers. The question about the second is answered after several kinds of prefill: exact (layer by
layer, the reference), in chunks, and on the document's keys that the question about the first number left behind, cut
back as the server does it. For each: the share of layers whose route is the reference's, the share of sparse layers,
and the negative log-likelihood per token of the right answer. All layers full goes beside them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import trim_prompt_cache

import flux_mlx
from flux_mlx.spec import Route

DOCUMENT = Path(__file__).resolve().parents[1] / "examples" / "data" / "us_constitution_1787.txt"
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
    questions = tuple(tokenizer.encode(f"\n\nQuestion: what is the code of the {name}?\nAnswer:") for name in names)
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


def on_the_other_questions_cache(model: Any, sample: Sample, cache: list[Any], run: Callable[..., None]) -> None:
    """The document under the first question, that cut off, then the second question."""
    run(model, sample.document + sample.questions[0][:-1], cache)
    trim_prompt_cache(cache, len(sample.questions[0]) - 1)
    run(model, sample.questions[1][:-1], cache)


def answer_nll(model: Any, sample: Sample, cache: list[Any]) -> float:
    """Negative log-likelihood per token of the answer, in nats; the cache holds all but the question's last token."""
    tokens = [sample.questions[1][-1], *sample.answer]
    logits = model(mx.array([tokens[:-1]]), cache=cache)[0].astype(mx.float32)
    return nn.losses.cross_entropy(logits, mx.array(tokens[1:]), reduction="mean").item()


def ways(sample: Sample) -> dict[str, tuple[str, Callable[[Any, list[Any]], None]]]:
    """Name of a way to prefill to (route policy, what fills the cache)."""
    whole = sample.document + sample.questions[1][:-1]

    def chunks(step: int) -> Callable[..., None]:
        return lambda model, tokens, cache: in_chunks(model, tokens, cache, step)

    return {
        "exact": ("auto", lambda model, cache: exactly(model, whole, cache)),
        "chunks of 512": ("auto", lambda model, cache: in_chunks(model, whole, cache, 512)),
        "chunks of 2048": ("auto", lambda model, cache: in_chunks(model, whole, cache, 2048)),
        "cached prefix, exact": (
            "auto",
            lambda model, cache: on_the_other_questions_cache(model, sample, cache, exactly),
        ),
        "cached prefix, chunks of 512": (
            "auto",
            lambda model, cache: on_the_other_questions_cache(model, sample, cache, chunks(512)),
        ),
        "all layers full": ("full", lambda model, cache: exactly(model, whole, cache)),
    }


def measure(model: Any, samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Means over the samples, by way."""
    found: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        reference: list[Route] = []
        for name, (policy, fill) in ways(sample).items():
            flux_mlx.set_route(model, policy)
            cache = model.make_cache()
            fill(model, cache)
            taken = flux_mlx.routes(cache)
            reference = reference or taken
            row = found.setdefault(name, {"same_routes": [], "sparse": [], "answer_nll": []})
            row["same_routes"].append(statistics.mean(a == b for a, b in zip(taken, reference, strict=True)))
            row["sparse"].append(statistics.mean(route == Route.SPARSE for route in taken))
            row["answer_nll"].append(answer_nll(model, sample, cache))
    return {
        name: {key: round(statistics.mean(values), 4) for key, values in row.items()} for name, row in found.items()
    }


def main() -> None:
    """Measure and print a table; --json keeps it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="models/smollm2-135m-flux", help="Flux model directory, trained")
    parser.add_argument("--tokens", type=int, default=1500, help="of a document (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    args = parser.parse_args()
    model, tokenizer = flux_mlx.load(args.model)
    rng = random.Random(0)
    samples = [make_sample(tokenizer, args.tokens, rng) for _ in range(args.samples)]
    rows = measure(model, samples)
    tokens = statistics.mean(len(sample.document) for sample in samples)
    for name, row in rows.items():
        print(f"{name:32} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if args.json:
        command = f"python benchmarks/prefix_drift.py --tokens {args.tokens} --samples {args.samples}"
        result = {"command": command, "model": args.model, "document_tokens": tokens, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
