"""Which rows of a sparse layer cost retrieval something: KL of the answer when only some rows follow the pattern.

    python -m benchmarks.training_rows --model DIRECTORY --text-cache T.npz --full 7 8 14 17 18 20 21 23 24 --out R.json

Rows of a sample: the text (all of the prompt but its last 128 tokens), the question (those, without the very last), and
the answer (the prompt's last token, which predicts the first one, and its own). Rows that do not follow the pattern see
everything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from cuda_reference import packed_model
from cuda_reference.baselines import mask_of
from cuda_reference.data import make_corpora
from cuda_reference.data_packing import Pack, pack
from cuda_reference.data_prompts import Writer
from cuda_reference.data_tasks import TaskMaker
from cuda_reference.objective import sample_divergence, sample_nll
from cuda_reference.packed_attention import PackedAttention
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import load_recipe
from cuda_reference.train import load_model

QUESTION_ROWS = 128
PARTS = {"text": (0, 1), "question": (1, 2), "prompt": (0, 2), "answer": (2, 3), "all": (0, 3)}
"""Name to the range of parts (text 0, question 1, answer 2) that follow the pattern."""
FIRST_SAMPLE = 3_000_000


def part_of(position: torch.Tensor, prompt_tokens: torch.Tensor) -> torch.Tensor:
    """0 for rows of the text, 1 of the question, 2 of the answer."""
    last = prompt_tokens - 1
    return (position >= last - QUESTION_ROWS).int() + (position >= last).int()


class PartlySparse(PackedAttention):
    """Attention whose sparse layers are sparse in `parts` only (without FlexAttention)."""

    parts = PARTS["all"]

    def _allowed(self, full: torch.Tensor, kept: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
        sparse = super()._allowed(full, kept)
        dense = super()._allowed(torch.ones_like(full))
        first, stop = self.parts

        def allowed(b: object, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            part = part_of(self._positions[q], self._prompt_tokens[q])
            return torch.where((first <= part) & (part < stop), sparse(b, h, q, k), dense(b, h, q, k))

        return allowed


@torch.no_grad()
def costs(model: PackedModel, packed: Pack, mask: torch.Tensor) -> dict[str, dict[str, float]]:
    """Name of the parts to KL and difference in NLL of the answer, nats a token, from all layers full."""

    def run(layers: torch.Tensor, parts: tuple[int, int]) -> torch.Tensor:
        PartlySparse.parts = parts
        return model(packed, forced=layers[:, None].expand(len(mask), packed.groups))[0]

    def nll(logits: torch.Tensor) -> float:
        return float(sample_nll(logits, packed.loss_targets, packed.loss_sample, packed.samples).mean())

    base, found = run(torch.ones_like(mask), PARTS["all"]), {}
    for name, parts in PARTS.items():
        logits = run(mask, parts)
        divergence = float(sample_divergence(logits, base, packed.loss_sample, packed.samples).mean())
        found[name] = {"divergence": divergence, "nll_difference": nll(logits) - nll(base)}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of a transformers causal LM")
    parser.add_argument("--text-cache", type=Path, help="file of encoded text: read if it exists, else written")
    parser.add_argument("--full", type=int, nargs="+", required=True, help="full layers of the mask")
    parser.add_argument("--tokens", type=int, default=3072, help="of a sample, a multiple of 128")
    parser.add_argument("--window", type=int, default=1024, help="window of the pattern, tokens")
    parser.add_argument("--samples", type=int, default=5, help="training samples, one fact and many facts in turn")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    recipe = load_recipe("smollm2", ['pattern.name="streaming"', f"pattern.window_tokens={args.window}"])
    packed_model.PackedAttention = PartlySparse
    model = load_model(args.model, replace(recipe, gradient_checkpointing=False), torch.device("cpu"))
    writer = Writer(AutoTokenizer.from_pretrained(args.model))
    maker = TaskMaker(writer, make_corpora(writer, recipe.data.text_chars, 0, args.text_cache), "train", recipe.seed)
    mask = mask_of(args.full, len(model.backbone.get_decoder().layers))
    rows = []
    for i in tqdm(range(args.samples)):
        task, form = (("single", ""), ("multi", "keys"))[i % 2]
        sample = maker.sample(task, FIRST_SAMPLE + i, args.tokens, form=form)
        packed = pack([sample], recipe.tasks, recipe.router.pool_tokens, args.tokens)
        rows.append({"task": task, "depth": sample.depth, **costs(model, packed, mask)})
        print(rows[-1], flush=True)
    means = {name: {k: float(np.mean([r[name][k] for r in rows])) for k in rows[0][name]} for name in PARTS}
    settings = {name: str(value) for name, value in vars(args).items()}
    found = {"settings": settings, "hardware": "CPU, float32", "means": means, "samples": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
