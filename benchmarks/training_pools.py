"""How well routers tell tasks apart, by the number of tokens that they pool at each end of a prompt.

    python -m benchmarks.training_pools --model DIRECTORY --text-cache T.npz --json benchmarks/training_pools.json

A recipe's start is fitted (`calibration.fit_masks`) to the pooled queries of short training prompts with every layer
full, once for each pool size; what counts is the share of decisions that follow the masks on other prompts: of the test
split, and with forms, fillers and instructions that are never trained on. Only layers whose masks differ are looked at.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuda_reference.baselines import mask_of
from cuda_reference.calibration import agreement, calibrate, fit_masks
from cuda_reference.data import make_corpora
from cuda_reference.data_prompts import Sample, Writer
from cuda_reference.data_tasks import TaskMaker
from cuda_reference.evaluate import write_json
from cuda_reference.recipe import Recipe, load_recipe
from cuda_reference.router import LayerRouter, pool_queries


class Pools:
    """Pooled queries of prompts, of several sizes, with every layer full.

    Args:
        path: Directory of a causal LM whose attention has a q_proj and no norm behind it.
        layers: Layers to look at.
        sizes: Tokens pooled at each end.
    """

    def __init__(self, path: str, layers: Sequence[int], sizes: Sequence[int]):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model
        self.model.layers = self.model.layers[: max(layers) + 1]
        self.layers, self.sizes = list(layers), list(sizes)
        self.head_dim = self.model.layers[0].self_attn.head_dim
        self._queries: dict[int, torch.Tensor] = {}
        for layer in layers:
            self.model.layers[layer].self_attn.q_proj.register_forward_hook(self._keep(layer))

    def _keep(self, layer: int):
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            self._queries[layer] = output.unflatten(-1, (-1, self.head_dim))

        return hook

    @torch.inference_mode()
    def of(self, sample: Sample) -> torch.Tensor:
        """float32 `[sizes, layers, D]` of a sample's prompt without its last token."""
        self.model(torch.from_numpy(sample.tokens[None, : sample.prompt_tokens - 1].astype(np.int64)), use_cache=False)
        return torch.stack(
            [torch.cat([pool_queries(self._queries[layer], size) for layer in self.layers]) for size in self.sizes]
        )


def samples(maker: TaskMaker, recipe: Recipe, count: int, lengths: Sequence[int]) -> Iterator[Sample]:
    """Samples of a split: tasks by the recipe's shares, lengths with a uniform logarithm."""
    rng, names = np.random.default_rng(recipe.seed), list(recipe.data.tasks)
    shares = np.array([recipe.data.tasks[name] for name in names], float)
    for i in range(count):
        task = names[rng.choice(len(names), p=shares / shares.sum())]
        yield maker.sample(task, i, int(np.exp(rng.uniform(*np.log(lengths)))))


def fitted(pooled: torch.Tensor, task: torch.Tensor, masks: torch.Tensor, recipe: Recipe) -> dict[int, LayerRouter]:
    """Routers of the layers (numbered 0, 1, ..) fitted to the masks `[tasks, layers]`; pooled is `[n, layers, D]`."""
    torch.manual_seed(recipe.seed)
    routers = {layer: LayerRouter(pooled.shape[-1], recipe.router) for layer in range(pooled.shape[1])}
    for layer, router in routers.items():
        calibrate(router, pooled[:, layer])
    fit_masks(routers, dict(enumerate(pooled.unbind(1))), task, masks, recipe.start_confidence)
    return routers


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text-cache", type=Path)
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--sizes", nargs="*", type=int, default=[16, 32, 50, 100])
    parser.add_argument("--lengths", nargs=2, type=int, default=[384, 640], help="shortest and longest prompt")
    parser.add_argument("--samples", type=int, default=480, help="prompts to fit")
    parser.add_argument("--others", type=int, default=120, help="prompts of each of the other splits")
    parser.add_argument("--set", nargs="*", default=[], help="override settings of the recipe")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    recipe = load_recipe(args.recipe, args.set)
    masks = torch.stack([mask_of(list(recipe.start[name]), recipe.start_layers) for name in recipe.tasks])
    layers = (masks != masks[0]).any(0).nonzero().flatten().tolist()
    pools, writer = Pools(args.model, layers, args.sizes), Writer(AutoTokenizer.from_pretrained(args.model))
    corpora = make_corpora(writer, recipe.data.text_chars, cache=args.text_cache)
    pooled, task = {}, {}
    for split, count in (("train", args.samples), ("test", args.others), ("ood", args.others)):
        made = list(samples(TaskMaker(writer, corpora, split, recipe.seed), recipe, count, args.lengths))
        pooled[split] = torch.stack([pools.of(sample) for sample in made])
        task[split] = torch.tensor([recipe.tasks.index(sample.task) for sample in made])
    rows = []
    for i, size in enumerate(args.sizes):
        config = replace(recipe, router=replace(recipe.router, pool_tokens=size))
        routers = fitted(pooled["train"][:, i], task["train"], masks[:, layers], config)
        row = {"pool_tokens": size}
        for split in ("train", "test", "ood"):
            found = dict(enumerate(pooled[split][:, i].unbind(1)))
            row[split] = agreement(routers, found, task[split], masks[:, layers])
        rows.append(row)
        print(row, flush=True)
    settings = {name: str(value) for name, value in vars(args).items()}
    hardware = {"machine": platform.machine(), "dtype": "float32", "torch": torch.__version__}
    write_json(args.json, {"settings": settings, "hardware": hardware, "layers": layers, "rows": rows})


if __name__ == "__main__":
    main()
