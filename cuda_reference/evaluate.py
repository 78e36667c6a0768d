"""`flux_mlx.evaluate`: what routing costs and where it is sparse, on samples held out from training.

    flux_mlx.evaluate --model DIRECTORY --routers routers.safetensors --out results.json

Every policy is scored on the same samples, so that differences are paired: answer NLL, choice among 10 candidates,
Omega by task, agreement of the routes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from cuda_reference import baselines
from cuda_reference.checkpoints import load_routers
from cuda_reference.data import make_corpora
from cuda_reference.data_prompts import Sample, Writer
from cuda_reference.data_tasks import TaskMaker
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import load_recipe
from cuda_reference.scoring import Policy, Score, score
from cuda_reference.train import load_model
from flux_mlx.spec import parse_route


@dataclass(frozen=True)
class Cell:
    """Samples that are averaged together.

    Args:
        split: "test" or "ood".
        task: Task.
        form: As `TaskMaker.sample` takes it.
        tokens: Length of the samples.
    """

    split: str
    task: str
    form: str
    tokens: int

    @property
    def name(self) -> str:
        """As "test/multi-keys/4096"."""
        return f"{self.split}/{self.task}{'-' + self.form if self.form else ''}/{self.tokens}"


RETRIEVAL_KINDS = (("single", "magic"), ("single", ""), ("multi", "keys"), ("multi", "hops"))
OTHER_KINDS = tuple((task, "") for task in ("aggregation", "code", "icl", "document"))


def default_cells(lengths: Sequence[int]) -> list[Cell]:
    """Every task at every length, and retrieval out of domain."""
    kinds = (*RETRIEVAL_KINDS, *OTHER_KINDS)
    cells = [Cell("test", task, form, tokens) for task, form in kinds for tokens in lengths]
    return cells + [Cell("ood", task, form, tokens) for task, form in RETRIEVAL_KINDS[1:3] for tokens in lengths]


def samples_of(cell: Cell, makers: Mapping[str, TaskMaker], count: int) -> list[Sample]:
    """`count` samples of a cell, needles at evenly spread depths."""
    maker = makers[cell.split]
    return [maker.sample(cell.task, i, cell.tokens, depth=(i + 0.5) / count, form=cell.form) for i in range(count)]


def summary(samples: Sequence[Sample], scores: Sequence[Score], base: Sequence[Score]) -> dict[str, float]:
    """Means of a cell, and paired differences from the base policy on the same samples.

    Returns:
        nll, nll_ratio (to the base), accuracy and accuracy_diff with its 95 % bounds (normal approximation of the
        paired difference), omega, omega_std. Accuracies are shares; they are left out without candidates.
    """
    nll, base_nll = (np.array([s.nll for s in part]) for part in (scores, base))
    omega = np.array([s.omega for s in scores])
    found = {
        "samples": len(scores),
        "nll": float(nll.mean()),
        "nll_ratio": float(nll.mean() / base_nll.mean()),
        "nll_diff_se": float((nll - base_nll).std() / math.sqrt(len(nll))),
        "omega": float(omega.mean()),
        "omega_std": float(omega.std()),
    }
    if samples[0].candidates:
        right, base_right = (np.array([s.chosen == 0 for s in part], float) for part in (scores, base))
        difference = right - base_right
        half = 1.96 * difference.std() / math.sqrt(len(right))
        found |= {"accuracy": float(right.mean()), "accuracy_diff": float(difference.mean())}
        found |= {
            "accuracy_diff_low": float(difference.mean() - half),
            "accuracy_diff_high": float(difference.mean() + half),
        }
    return found


def route_statistics(scores: Sequence[Score]) -> dict[str, object]:
    """Share of full routes by layer, and their mean entropy in bits (0: every sample is routed alike)."""
    full = np.array([s.full for s in scores]).mean(0)
    p = np.clip(full, 1e-12, 1 - 1e-12)
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return {"full_by_layer": [round(float(x), 4) for x in full], "entropy_bits": float(entropy.mean())}


def evaluate(
    model: PackedModel,
    makers: Mapping[str, TaskMaker],
    cells: Sequence[Cell],
    policies: Mapping[str, Policy],
    count: int,
    *,
    out: Path | None = None,
    row_tokens: int = 65536,
    seconds: float = float("inf"),
) -> dict[str, object]:
    """Score every cell under every policy; "full" is the base of the differences and is always scored.

    Args:
        count: Samples of a cell.
        out: JSON file, written again after every cell.
        seconds: Stop before the next cell after this time; the cells done so far count.
    """
    start, results = time.monotonic(), {"cells": {}, "routes": {}}
    for cell in tqdm(cells, mininterval=1.0):
        if time.monotonic() - start > seconds:
            break
        samples = samples_of(cell, makers, count)
        base = score(model, samples, "full", row_tokens)
        found = {"full": summary(samples, base, base)}
        for name, policy in policies.items():
            scores = score(model, samples, policy, row_tokens)
            found[name] = summary(samples, scores, base)
            if isinstance(policy, str) and policy == "auto":
                results["routes"][cell.name] = route_statistics(scores) | {
                    "routes": ["".join("F" if f > 0.5 else "s" for f in s.full) for s in scores[:64]],
                }
        results["cells"][cell.name] = found
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def policy_of(text: str, layers: int) -> Policy:
    """A command-line policy: auto, full, sparse, a list of full layers, or interleaved:N, first:N, last:N."""
    kind, colon, number = text.partition(":")
    if colon and kind in ("interleaved", "first", "last") and number.isdigit() and 0 < int(number) <= layers:
        return getattr(baselines, kind)(layers, int(number))
    route = parse_route(text)
    return route if isinstance(route, str) else baselines.mask_of(list(route), layers)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="flux_mlx.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory or hub id of a transformers causal LM")
    parser.add_argument("--routers", type=Path, help="routers.safetensors; needed by the policy auto")
    parser.add_argument("--recipe", default="smollm2", help="recipe that the routers were trained with")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="override settings of the recipe")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--policies", nargs="*", default=["auto", "sparse"], help="auto, sparse, 0,2,6-8, first:8, ..")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 4096, 8192], help="sample lengths, tokens")
    parser.add_argument("--samples", type=int, default=100, help="samples of a cell")
    parser.add_argument("--row-tokens", type=int, default=65536, help="tokens of a packed row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--workers", type=int, default=0, help="processes that read text")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    args = build_parser().parse_args(argv)
    recipe = load_recipe(args.recipe, args.set)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "auto" in args.policies and args.routers is None:
        raise SystemExit("[evaluate] the policy auto needs --routers.")
    model = load_model(args.model, recipe, device)
    if args.routers is not None:
        load_routers(args.routers, model.routers())
    writer = Writer(AutoTokenizer.from_pretrained(args.model))
    corpora = make_corpora(writer, recipe.data.text_chars, args.workers)
    makers = {split: TaskMaker(writer, corpora, split, recipe.seed) for split in ("test", "ood")}
    layers = len(model.backbone.get_decoder().layers)
    policies = {text: policy_of(text, layers) for text in args.policies if text != "full"}
    cells = default_cells(args.lengths)
    results = evaluate(model, makers, cells, policies, args.samples, row_tokens=args.row_tokens, seconds=args.seconds)
    results["settings"] = {k: str(v) for k, v in vars(args).items()} | {"cells": [asdict(c) for c in cells]}
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
