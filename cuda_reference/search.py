"""`python -m cuda_reference.search`: which layers must stay full for a task, by greedy search on training samples.

From all layers full, the layer whose sparsity costs least is made sparse, again and again. One search gives a mask for
every number of full layers: the static baseline when the tasks are the whole mix, and what the best router could reach
on a task, the oracle, when they are that task's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cuda_reference import baselines
from cuda_reference.console import ends_in_one_line
from cuda_reference.data import make_corpora
from cuda_reference.data_packing import Pack, pack
from cuda_reference.data_prompts import Sample, Writer
from cuda_reference.data_tasks import TaskMaker
from cuda_reference.evaluate import write_json
from cuda_reference.objective import sample_divergence, sample_nll
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import Recipe, load_recipe
from cuda_reference.scoring import rows_of
from cuda_reference.train import load_model, load_tokenizer


@dataclass(frozen=True)
class Cost:
    """What a mask costs on the samples of a search.

    Args:
        divergence: Mean KL of the samples' answers from those of all layers full.
        nll_ratio: Mean NLL, to that of all layers full.
    """

    divergence: float
    nll_ratio: float


class Probe:
    """Samples on which masks are compared; the all-full answers are kept.

    Args:
        model: On its device.
        samples: At least one.
        tasks: Their task names.
        row_tokens: Tokens of a packed row.
    """

    def __init__(self, model: PackedModel, samples: Sequence[Sample], tasks: Sequence[str], row_tokens: int):
        self.model = model
        self.layers = len(model.backbone.get_decoder().layers)
        device, pool_tokens = next(model.parameters()).device, model.config.router.pool_tokens
        rows = ([samples[i] for i in row] for row in rows_of(samples, row_tokens))
        self._packs = [pack(row, tasks, pool_tokens, row_tokens).to(device) for row in rows]
        full = torch.ones(self.layers, dtype=torch.bool)
        self._teachers = [self._logits(packed, full) for packed in self._packs]
        self._base = self._mean(self._nll(*pair) for pair in zip(self._packs, self._teachers, strict=True))

    @torch.no_grad()
    def _logits(self, packed: Pack, mask: torch.Tensor) -> torch.Tensor:
        forced = mask.to(packed.tokens.device)[:, None].expand(self.layers, packed.groups)
        return self.model(packed, forced=forced)[0]

    @staticmethod
    def _nll(packed: Pack, logits: torch.Tensor) -> torch.Tensor:
        return sample_nll(logits, packed.loss_targets, packed.loss_sample, packed.samples)

    @staticmethod
    def _mean(parts) -> float:
        return float(torch.cat(list(parts)).mean())

    @torch.no_grad()
    def cost(self, mask: torch.Tensor) -> Cost:
        """What `mask`, bool `[layers]`, costs."""
        divergences, nlls = [], []
        for packed, teacher in zip(self._packs, self._teachers, strict=True):
            logits = self._logits(packed, mask)
            divergences.append(sample_divergence(logits, teacher, packed.loss_sample, packed.samples))
            nlls.append(self._nll(packed, logits))
        return Cost(self._mean(divergences), self._mean(nlls) / self._base)


def draw_samples(
    recipe: Recipe, maker: TaskMaker, tasks: Sequence[str], count: int, shortest_tokens: int
) -> list[Sample]:
    """`count` samples of tasks in turn, of the recipe's lengths but at least `shortest_tokens`."""
    low, high = np.log(shortest_tokens), np.log(recipe.data.longest_tokens)
    rng = np.random.default_rng([recipe.seed, 1])
    lengths = np.exp(rng.uniform(low, high, count)).astype(int)
    return [maker.sample(tasks[i % len(tasks)], 2_000_000 + i, int(n)) for i, n in enumerate(lengths)]


def search(probe: Probe, fewest: int, drop: int) -> dict[str, object]:
    """Run the search; returns masks and costs by number of full layers, and each layer's cost alone."""
    alone: dict[int, float] = {}
    found: dict[str, dict[str, object]] = {"masks": {}, "divergence": {}, "nll_ratio": {}}
    with tqdm(desc="masks", mininterval=1.0) as bar:

        def loss(mask: torch.Tensor) -> float:
            cost = probe.cost(mask).divergence
            if int(mask.sum()) == probe.layers - 1:
                alone[int((~mask).nonzero())] = cost
            bar.update()
            return cost

        for mask in baselines.greedy_path(probe.layers, fewest, loss, drop):
            cost, count = probe.cost(mask), str(int(mask.sum()))
            found["masks"][count] = mask.nonzero().flatten().tolist()
            found["divergence"][count], found["nll_ratio"][count] = cost.divergence, cost.nll_ratio
    return found | {"alone": [alone[layer] for layer in range(probe.layers)]}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="cuda_reference.search", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory or hub id of a transformers causal LM")
    parser.add_argument("--recipe", default="smollm2", help="pattern, lengths and seed")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="override settings of the recipe")
    parser.add_argument("--tasks", nargs="+", required=True, help="tasks that one mask must serve")
    parser.add_argument("--samples", type=int, default=32, help="training samples")
    parser.add_argument("--shortest", type=int, default=2048, help="their least length, tokens")
    parser.add_argument("--fewest", type=int, default=3, help="full layers to stop at")
    parser.add_argument("--drop", type=int, default=1, help="layers to make sparse at once in the first round")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--row-tokens", type=int, default=65536, help="tokens of a packed row")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="compile MLPs and norms (CUDA)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read text")
    parser.add_argument("--text-cache", type=Path, help="file of encoded text: read if it exists, else written")
    return parser


@ends_in_one_line(build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    args, start = build_parser().parse_args(argv), time.monotonic()
    recipe = load_recipe(args.recipe, args.set)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(args.model, recipe, device, compiled=args.compile)
    writer = Writer(load_tokenizer(args.model))
    corpora = make_corpora(writer, recipe.data.text_chars, args.workers, args.text_cache)
    samples = draw_samples(
        recipe, TaskMaker(writer, corpora, "train", recipe.seed), args.tasks, args.samples, args.shortest
    )
    found = search(Probe(model, samples, recipe.tasks, args.row_tokens), args.fewest, args.drop)
    settings = {name: str(value) for name, value in vars(args).items()}
    write_json(args.out, found | {"settings": settings, "seconds": round(time.monotonic() - start, 1)})


if __name__ == "__main__":
    main()
