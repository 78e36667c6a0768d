"""Scores of samples under a route policy: answer NLL, choice among candidates, Omega. Packed rows, teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from cuda_reference.data_packing import Pack, pack, packed_tokens
from cuda_reference.data_prompts import TASKS, Sample
from cuda_reference.packed_model import PackedModel

Policy = str | torch.Tensor
""""auto" (the routers decide), "full", "sparse", or a static mask: bool `[model layers]`, True is full."""


@dataclass(frozen=True)
class Score:
    """One sample's results.

    Args:
        nll: Mean NLL of the answer's tokens, natural log.
        chosen: Index of the candidate with the greatest likelihood (0 is right); -1 without candidates.
        omega: Share of sparse layers (heads).
        full: Routes, one bool for each layer (by head: the share of full heads), True is full.
        margin: Least distance of a layer's logits, |logit 1 - logit 0|; nan with a static policy.
    """

    nll: float
    chosen: int
    omega: float
    full: tuple[float, ...]
    margin: float


def rows_of(samples: Sequence[Sample], row_tokens: int) -> Iterator[list[int]]:
    """Indices of the samples of each row, in order."""
    row: list[int] = []
    room = row_tokens
    for index, sample in enumerate(samples):
        size = packed_tokens(sample, candidates=True)
        if size > row_tokens:
            raise ValueError(f"[rows_of] sample {index} needs {size} tokens, more than a row of {row_tokens}.")
        if size > room:
            yield row
            row, room = [], row_tokens
        row.append(index)
        room -= size
    if row:
        yield row


@torch.no_grad()
def score(
    model: PackedModel, samples: Sequence[Sample], policy: Policy = "auto", row_tokens: int = 65536
) -> list[Score]:
    """Score samples, in their order.

    Args:
        model: On its device.
        samples: Any number.
        policy: Who routes.
        row_tokens: Tokens of a packed row; a sample with its candidates must fit.
    """
    scores: list[Score] = []
    tasks = tuple({*TASKS, *(s.task for s in samples)})
    device = next(model.parameters()).device
    for row in rows_of(samples, row_tokens):
        batch = [samples[i] for i in row]
        packed = pack(batch, tasks, model.config.router.pool_tokens, row_tokens, candidates=True).to(device)
        scores += _score_pack(model, packed, batch, policy)
    return scores


def _score_pack(model: PackedModel, packed: Pack, batch: list[Sample], policy: Policy) -> list[Score]:
    logits, routing = model(packed, forced=_forced(model, packed, policy))
    nll = functional.cross_entropy(logits.float(), packed.loss_targets, reduction="none")
    branches = 1 + max(len(s.candidates) for s in batch)
    key = packed.loss_sample * branches + packed.loss_branch
    sums = torch.zeros(len(batch) * branches, device=nll.device).index_add(0, key, nll).view(-1, branches).cpu()
    full = torch.stack([routing.z[layer].mean(0) for layer in sorted(routing.z)], dim=1).cpu()
    gaps = [(part[:, 1] - part[:, 0]).view(-1, len(batch)).abs().amin(0) for part in routing.logits.values()]
    margins = torch.stack(gaps).amin(0).tolist() if gaps else [float("nan")] * len(batch)
    found = []
    for i, sample in enumerate(batch):
        count = len(sample.candidates)
        chosen = int(sums[i, :count].argmin()) if count else -1
        mean = float(sums[i, 0]) / len(sample.answer)
        found.append(Score(mean, chosen, 1.0 - float(full[i].mean()), tuple(full[i].tolist()), margins[i]))
    return found


def _forced(model: PackedModel, packed: Pack, policy: Policy) -> torch.Tensor | None:
    """A policy as `Routing.forced`."""
    if isinstance(policy, str) and policy == "auto":
        return None
    layers, device = len(model.backbone.get_decoder().layers), packed.tokens.device
    if isinstance(policy, str):
        if policy not in ("full", "sparse"):
            raise ValueError(f"[score] policy must be auto, full, sparse or a mask, got {policy!r}.")
        policy = torch.full((layers,), policy == "full")
    return policy.to(device)[:, None].expand(layers, packed.samples)
