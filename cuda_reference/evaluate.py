"""`flux_mlx.evaluate`: what routing costs and where it is sparse, on samples held out from training.

    flux_mlx.evaluate --model DIRECTORY --routers routers.safetensors --policies sparse first:8 --out results.json

Every contender is scored on the same samples as the backbone with every layer full, so that differences are paired:
answer NLL, choice among 10 candidates, greedy exact match, Omega and routes by task.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cuda_reference.cells import (
    KEY_FORMS,
    KINDS,
    REPORTED,
    SPLITS,
    Cell,
    default_cells,
    samples_of,
    shard_of,
    with_form,
)
from cuda_reference.checkpoints import flux_config
from cuda_reference.console import ends_in_one_line
from cuda_reference.contenders import Contender, router_contenders, static_contender
from cuda_reference.data import make_corpora
from cuda_reference.data_prompts import Sample, Writer
from cuda_reference.data_tasks import TaskMaker
from cuda_reference.engines import ENGINES, Engine
from cuda_reference.recipe import load_recipe
from cuda_reference.scoring import Score
from cuda_reference.summaries import equal_routes, route_statistics, summary
from cuda_reference.train import load_tokenizer

FORM_SAMPLES, FORM_START, FORM_FLOOR = 100, 1_000_000, 0.66
"""The number of keys is chosen on this many samples of its own, by the accuracy that the backbone must have there: the
0.6 that is asked of it, and a standard error of these samples."""


@dataclass
class Evaluation:
    """Samples of all cells, their base scores, and what was found so far.

    Args:
        engine: Scores.
        makers: Split to maker of samples.
        choice_samples: Samples of a cell that is judged by choice.
        other_samples: Of every other cell.
        form_samples: By which the number of keys is chosen; equal ones choose alike, whatever the samples of the cell.
        workers: Processes that make samples.
        keep_scores: Keep NLL, choice, routes and routers' logit gaps of every sample in the results.
        with_base: Score the model with every layer full; without it contenders are compared with themselves.
    """

    engine: Engine
    makers: Mapping[str, TaskMaker]
    choice_samples: int = 100
    other_samples: int = 100
    form_samples: int = FORM_SAMPLES
    workers: int = 0
    keep_scores: bool = False
    with_base: bool = True
    results: dict[str, Any] = field(default_factory=lambda: {"cells": {}, "routes": {}, "forms": {}})
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    base: dict[str, list[Score]] = field(default_factory=dict)
    exact: dict[tuple[str, str], list[Score]] = field(default_factory=dict)

    def add_cell(self, cell: Cell, full: Contender) -> None:
        """Make the samples of a cell and score the base on them."""
        self.engine.use(full)
        if cell.form == KEY_FORMS[0] and self.with_base:
            cell = self._hardest_form(cell)
        count = self.choice_samples if cell.is_choice else self.other_samples
        samples = samples_of(cell, self.makers, count, self.workers)
        self.samples[cell.name] = samples
        self.results["cells"][cell.name], self.results["routes"][cell.name] = {}, {}
        if self.with_base:
            base = self.base[cell.name] = self.engine.score(samples)
            self.results["cells"][cell.name]["full"] = summary(samples, base, base)

    def _hardest_form(self, cell: Cell) -> Cell:
        """As many keys as leave the backbone the accuracy `FORM_FLOOR`, where a loss can be seen."""
        tried: dict[str, float] = {}
        for form in KEY_FORMS:
            chosen = with_form(cell, form)
            samples = samples_of(chosen, self.makers, self.form_samples, self.workers, start=FORM_START)
            tried[form] = sum(s.chosen == 0 for s in self.engine.score(samples)) / len(samples)
            if tried[form] >= FORM_FLOOR:
                break
        self.results["forms"][cell.name] = tried
        return with_form(cell, max(tried, key=lambda form: (tried[form] >= FORM_FLOOR, tried[form])))

    def add(self, contender: Contender) -> None:
        """Score one contender on every cell."""
        self.engine.use(contender)
        routed = contender.routers is not None
        for name, samples in self.samples.items():
            scores = self.engine.score(samples)
            found = summary(samples, scores, self.base.get(name, scores), contender.config.pattern)
            if routed:
                self._add_routes(name, contender, scores, found)
            if self.keep_scores:
                kept = [{"nll": s.nll, "chosen": s.chosen, "full": s.full, "gaps": s.gaps} for s in scores]
                self.results.setdefault("scores", {}).setdefault(name, {})[contender.name] = kept
            self.results["cells"][name][contender.name] = found

    def _add_routes(self, cell: str, contender: Contender, scores: list[Score], found: dict[str, Any]) -> None:
        self.results["routes"][cell][contender.name] = route_statistics(scores)
        exact_name = contender.name.partition("@")[0]
        if not contender.chunk_tokens:
            self.exact[cell, contender.name] = scores
        elif (cell, exact_name) in self.exact:
            found["routes_as_exact"] = equal_routes(scores, self.exact[cell, exact_name])

    def generate(self, contender: Contender, count: int) -> None:
        """Greedy generation of the first samples of the cells with a needle: exact matches, beside teacher forcing."""
        self.engine.use(contender)
        for name, samples in self.samples.items():
            if name.startswith("test/single"):
                said = [self.engine.generate(s) for s in samples[:count]]
                right = [list(s.answer) == tokens for s, tokens in zip(samples, said, strict=False)]
                forced = [score.exact for score in self.engine.score(samples[:count])]
                agree = sum(a == b for a, b in zip(right, forced, strict=True))
                found = {"samples": len(said), "exact": sum(right) / len(said), "as_teacher_forced": agree / len(said)}
                self.results.setdefault("generation", {}).setdefault(name, {})[contender.name] = found


def contenders_of(args: argparse.Namespace, layers: int) -> list[Contender]:
    """Those of the command line: routers first; the first of them chunked too. "auto" stands for them.

    Raises:
        ValueError: The policy auto without routers, two contenders of one name, or what the contenders refuse.
    """
    if "auto" in args.policies and not args.routers:
        raise ValueError("[evaluate] the policy auto needs --routers.")
    config = flux_config(load_recipe(args.recipe, args.set))
    found = []
    for i, text in enumerate(args.routers):
        found += router_contenders(text, config, args.chunks if i == 0 else ())
    found += [static_contender(text, layers, config) for text in args.policies if text not in ("full", "auto")]
    names = ["full", *(contender.name for contender in found)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"[evaluate] expected contenders of different names (NAME=...), got {twice} more than once.")
    return found


def write_json(path: Path, data: object) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="flux_mlx.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of a causal LM (torch: or a hub id)")
    parser.add_argument("--backend", choices=tuple(ENGINES), default="torch", help="who computes")
    parser.add_argument("--routers", nargs="*", default=[], metavar="[NAME=]FILE[@PATTERN]", help="routers.safetensors")
    parser.add_argument("--chunks", nargs="*", type=int, default=[], help="route the first routers by such chunks too")
    parser.add_argument(
        "--policies", nargs="*", default=["sparse"], help="[NAME=]sparse, 0,2,6-8, first:8, ..[@PATTERN]"
    )
    parser.add_argument("--recipe", default="smollm2", help="settings of the static policies, and of bare routers")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="override settings of the recipe")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 4096, 8192], help="sample lengths, tokens")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="kinds of samples")
    parser.add_argument(
        "--splits",
        nargs="*",
        default=list(REPORTED),
        choices=list(SPLITS),
        help="ood: unseen forms; valid: for choices",
    )
    parser.add_argument("--samples", type=int, default=100, help="samples of a cell that is judged by choice")
    parser.add_argument("--other-samples", type=int, default=None, help="samples of other cells (default: the same)")
    parser.add_argument(
        "--form-samples",
        type=int,
        help=f"samples that choose the number of keys (default: --samples, {FORM_SAMPLES} at most)",
    )
    parser.add_argument("--generate", type=int, default=0, help="samples of a needle cell to generate answers for")
    parser.add_argument("--shard", default="0/1", help="cells of this process: 0/4 is the first of four")
    parser.add_argument("--row-tokens", type=int, default=65536, help="tokens of a packed row (torch)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="start no contender after this time; OUT.partial holds the others",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="torch; default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="compile MLPs and norms (torch on CUDA)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read text and make samples")
    parser.add_argument("--text-cache", type=Path, help="file of encoded text: read if it exists, else written")
    parser.add_argument("--no-base", action="store_true", help="leave out the model with every layer full")
    parser.add_argument("--keep-scores", action="store_true", help="keep every sample's NLL, choice, routes and gaps")
    return parser


def evaluate(args: argparse.Namespace, evaluation: Evaluation, contenders: Sequence[Contender]) -> None:
    """Score all contenders on all cells of this shard; until the end, what is there after each is in `OUT.partial`."""
    start, partial = time.monotonic(), args.out.with_name(args.out.name + ".partial")
    full = Contender("full", "full", flux_config(load_recipe(args.recipe, args.set)))
    cells = shard_of(default_cells(args.lengths, args.kinds, args.splits), args.shard)
    for cell in tqdm(cells, desc="samples and base", mininterval=1.0):
        evaluation.add_cell(cell, full)
    left = list(contenders)
    for contender in tqdm(contenders, desc="contenders", mininterval=1.0):
        if time.monotonic() - start > args.seconds:
            break
        evaluation.add(contender)
        left.remove(contender)
        write_json(partial, evaluation.results)
    for contender in [full, *contenders[:1]] if args.generate else []:
        evaluation.generate(contender, args.generate)
    settings = {name: str(value) for name, value in vars(args).items()}
    evaluation.results["settings"] = settings | {"cells": [asdict(cell) for cell in cells]}
    if left:
        evaluation.results["left_out"] = [contender.name for contender in left]
        write_json(partial, evaluation.results)
        raise SystemExit(f"[evaluate] the time was over before {evaluation.results['left_out']}: see {partial}.")
    write_json(args.out, evaluation.results)
    partial.unlink(missing_ok=True)


@ends_in_one_line(build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    args = build_parser().parse_args(argv)
    recipe = load_recipe(args.recipe, args.set)
    engine = ENGINES[args.backend](args.model, recipe, args.device, args.row_tokens, args.compile)
    contenders = contenders_of(args, engine.layers)
    writer = Writer(load_tokenizer(args.model))
    corpora = make_corpora(writer, recipe.data.text_chars, args.workers, args.text_cache)
    makers = {split: TaskMaker(writer, corpora, split, recipe.seed) for split in SPLITS}
    others = args.samples if args.other_samples is None else args.other_samples
    forms = args.form_samples or min(FORM_SAMPLES, args.samples)
    counts = {"choice_samples": args.samples, "other_samples": others, "form_samples": forms}
    evaluation = Evaluation(
        engine, makers, **counts, workers=args.workers, keep_scores=args.keep_scores, with_base=not args.no_base
    )
    evaluate(args, evaluation, contenders)


if __name__ == "__main__":
    main()
