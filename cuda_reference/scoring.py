"""Scores of samples under a route policy: answer NLL, choice among candidates, Omega. Packed rows, teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cuda_reference.data_packing import Pack, pack, packed_tokens
from cuda_reference.data_prompts import TASKS, Sample
from cuda_reference.objective import target_nll
from cuda_reference.packed_model import PackedModel, Routing

Policy = str | torch.Tensor
""""auto" (the routers decide), "full", "sparse", or a static mask: bool `[model layers]`, True is full."""


@dataclass(frozen=True)
class Score:
    """One sample's results.

    Args:
        nll: Mean NLL of the answer's tokens, natural log.
        chosen: Index of the candidate with the greatest likelihood (0 is right); -1 without candidates.
        exact: Whether each token of the answer is the likeliest after those before it: greedy decoding gives it.
        omega: Share of sparse layers (heads) that the sample ends with.
        full: Routes, one number for each routed layer, 1.0 is full (by head: the share of full heads).
        gaps: logit 1 - logit 0 of each routed layer; empty with a static policy and by head.
    """

    nll: float
    chosen: int
    exact: bool
    omega: float
    full: tuple[float, ...]
    gaps: tuple[float, ...] = ()


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
    model: PackedModel,
    samples: Sequence[Sample],
    policy: Policy = "auto",
    row_tokens: int = 65536,
    chunk_tokens: int = 0,
) -> list[Score]:
    """Score samples, in their order.

    Args:
        model: On its device.
        samples: Any number.
        policy: Who routes.
        row_tokens: Tokens of a packed row; a sample with its candidates must fit.
        chunk_tokens: With "auto": route each chunk anew, as stock prefill with this step does; 0 routes exactly.
    """
    scores: list[Score] = []
    tasks = tuple({*TASKS, *(s.task for s in samples)})
    device = next(model.parameters()).device
    chunks = chunk_tokens if isinstance(policy, str) and policy == "auto" else 0
    for row in rows_of(samples, row_tokens):
        batch = [samples[i] for i in row]
        pool_tokens = model.config.router.pool_tokens
        packed = pack(batch, tasks, pool_tokens, row_tokens, candidates=True, chunk_tokens=chunks).to(device)
        logits, routing = model(packed, forced=forced_routes(model, packed, policy))
        scores += _scores(logits, routing, packed, batch)
    return scores


def _scores(logits: torch.Tensor, routing: Routing, packed: Pack, batch: list[Sample]) -> list[Score]:
    nll = target_nll(logits, packed.loss_targets)
    branches = 1 + max(len(s.candidates) for s in batch)
    key = packed.loss_sample * branches + packed.loss_branch
    sums, wrong = (torch.zeros(len(batch) * branches, device=nll.device) for _ in range(2))
    sums = sums.index_add(0, key, nll).view(-1, branches).cpu()
    missed = (logits.argmax(-1) != packed.loss_targets).float()
    wrong = wrong.index_add(0, key, missed).view(-1, branches)[:, 0].tolist()
    full = routing.shares().T.cpu()
    gaps = _gaps(routing, packed)
    found = []
    for i, sample in enumerate(batch):
        count = len(sample.candidates)
        chosen = int(sums[i, :count].argmin()) if count else -1
        mean = float(sums[i, 0]) / len(sample.answer)
        found.append(Score(mean, chosen, wrong[i] == 0, 1.0 - float(full[i].mean()), tuple(full[i].tolist()), gaps[i]))
    return found


def _gaps(routing: Routing, packed: Pack) -> list[tuple[float, ...]]:
    """logit 1 - logit 0 of each sample's final decisions by layer; empty tuples where nobody decided, and by head."""
    if not routing.logits or routing.by_head:
        return [()] * packed.samples
    gaps = torch.stack([routing.logits[layer].diff(dim=1).squeeze(1) for layer in sorted(routing.logits)], dim=1)
    return [tuple(row) for row in gaps[packed.final_group].tolist()]


def forced_routes(model: PackedModel, packed: Pack, policy: Policy) -> torch.Tensor | None:
    """A policy as `Routing.forced`.

    Raises:
        ValueError: Not a policy.
    """
    if isinstance(policy, str) and policy == "auto":
        return None
    layers, device = len(model.backbone.get_decoder().layers), packed.tokens.device
    if isinstance(policy, str):
        if policy not in ("full", "sparse"):
            raise ValueError(f"[score] policy must be auto, full, sparse or a mask, got {policy!r}.")
        policy = torch.full((layers,), policy == "full")
    return policy.to(device)[:, None].expand(layers, packed.groups)
