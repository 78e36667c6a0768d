"""Many samples in one row of tokens: where each lies, what is pooled, and what the loss counts.

Every sample starts on a tile of the attention kernel, so that no tile holds two samples; tokens that fill up a tile
come after the sample's answer, where the causal rule hides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from cuda_reference.data_prompts import Sample
from flux_mlx.spec import RouterConfig

TILE = 128


@dataclass(frozen=True)
class Pack:
    """N samples in one row of T tokens; all tensors int64 unless said otherwise.

    Args:
        tokens: `[T]`.
        positions: `[T]`, position within the sample.
        sample: `[T]`, index of the sample that a token belongs to.
        branch: `[T]`, 0 for what every later token sees; a branch > 0 is seen by its own tokens only. With candidates,
            wrong candidate c is branch c and the answer the branch after the last of them.
        group: `[T]`, which route decision a token follows: its sample's, or with chunked routing its chunk's.
        final_group: `[N]`, the decision that each sample ends with.
        prompt_tokens: `[N]`.
        lengths: `[N]`, tokens of prompt and answer.
        pool_rows: `[groups, 2 P]`, tokens that the routers pool.
        pool_weights: `[groups, 2 P]` float32; the rows' weights sum to 1, absent ones have 0.
        loss_rows: `[M]`, tokens whose prediction counts.
        loss_targets: `[M]`, what they should predict.
        loss_sample: `[M]`, their sample.
        loss_branch: `[M]`, their candidate: 0 for the answer, c for wrong candidate c.
        task: `[N]`, index into the task list given to `pack`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    sample: torch.Tensor
    branch: torch.Tensor
    group: torch.Tensor
    final_group: torch.Tensor
    prompt_tokens: torch.Tensor
    lengths: torch.Tensor
    pool_rows: torch.Tensor
    pool_weights: torch.Tensor
    loss_rows: torch.Tensor
    loss_targets: torch.Tensor
    loss_sample: torch.Tensor
    loss_branch: torch.Tensor
    task: torch.Tensor

    @property
    def samples(self) -> int:
        """N."""
        return self.prompt_tokens.shape[0]

    @property
    def groups(self) -> int:
        """Route decisions of one layer: N, or with chunked routing the chunks of all samples."""
        return self.pool_rows.shape[0]

    def to(self, device: torch.device | str) -> Pack:
        """The same pack on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def packed_tokens(sample: Sample, candidates: bool = False) -> int:
    """Tokens of a row that `sample` takes: whole tiles."""
    extra = sum(map(len, sample.candidates[1:])) if candidates else 0
    return -(-(len(sample.tokens) + extra) // TILE) * TILE


def pack(
    samples: Sequence[Sample],
    tasks: Sequence[str],
    pool_tokens: int,
    row_tokens: int,
    *,
    candidates: bool = False,
    chunk_tokens: int = 0,
    read_tokens: Sequence[int] | None = None,
) -> Pack:
    """Lay samples out in one row.

    Args:
        samples: At least one.
        tasks: Task names; a sample's task must be among them.
        pool_tokens: P of the routers.
        row_tokens: T; unused tokens follow the last sample as its padding.
        candidates: Add the wrong candidates of each sample as branches 1, 2, .. beside the answer.
        chunk_tokens: Route each chunk of this many prompt tokens anew, as stock prefill does; whole tiles. 0 routes
            every prompt once.
        read_tokens: How much of each prompt its routers read, 1 to prompt_tokens - 1, where every prompt is routed
            once; None is all of it but the last token.

    Raises:
        ValueError: No sample, they do not fit, or chunks that are no whole tiles.
    """
    if chunk_tokens % TILE:
        raise ValueError(f"[pack] chunk_tokens must be a multiple of {TILE} or 0, got {chunk_tokens}.")
    needed = sum(packed_tokens(s, candidates) for s in samples)
    if not samples or needed > row_tokens or row_tokens % TILE:
        raise ValueError(
            f"[pack] expected samples of 1 to {row_tokens} tokens in all and whole tiles of {TILE}, "
            f"got {len(samples)} samples of {needed} tokens."
        )
    row = {name: np.zeros(row_tokens, np.int64) for name in ("tokens", "positions", "sample", "branch", "group")}
    losses: list[np.ndarray] = []
    pools: list[tuple[np.ndarray, np.ndarray]] = []
    final_group = []
    start = 0
    for index, sample in enumerate(samples):
        last = index == len(samples) - 1
        end = row_tokens if last else start + packed_tokens(sample, candidates)
        losses.append(_lay(row, sample, index, start, end, candidates))
        read = sample.prompt_tokens - 1 if read_tokens is None else read_tokens[index]
        for first, stop in _chunks(read, chunk_tokens):
            row["group"][start + first : end] = len(pools)
            rows, weights = _pool(stop, pool_tokens)
            pools.append((rows + start, weights))
        final_group.append(len(pools) - 1)
        start = end
    loss = np.concatenate(losses, axis=1)
    arrays = {
        **row,
        "prompt_tokens": [s.prompt_tokens for s in samples],
        "lengths": [len(s.tokens) for s in samples],
        "pool_rows": np.stack([rows for rows, _ in pools]),
        "final_group": final_group,
        "task": [tasks.index(s.task) for s in samples],
        **dict(zip(("loss_rows", "loss_targets", "loss_sample", "loss_branch"), loss, strict=True)),
    }
    weights = torch.from_numpy(np.stack([w for _, w in pools]))
    return Pack(pool_weights=weights, **{k: torch.from_numpy(np.asarray(v, np.int64)) for k, v in arrays.items()})


def _chunks(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """(first, stop) of the chunks of a prompt that are routed: all of them but a last one that is too short for it."""
    if not chunk_tokens:
        return [(0, tokens)]
    cuts = [(first, min(first + chunk_tokens, tokens)) for first in range(0, tokens, chunk_tokens)]
    shortest = RouterConfig().min_prefill_tokens
    return cuts[:1] + [(first, stop) for first, stop in cuts[1:] if stop - first >= shortest]


def _pool(tokens: int, pool_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, weights) of the mean over the first and last P of `tokens` tokens, as `spec.pool_queries` takes it."""
    each = min(pool_tokens, tokens)
    rows, weights = np.zeros(2 * pool_tokens, np.int64), np.zeros(2 * pool_tokens, np.float32)
    rows[: 2 * each] = np.concatenate([np.arange(each), np.arange(tokens - each, tokens)])
    weights[: 2 * each] = 1.0 / (2 * each)
    return rows, weights


def _lay(row: dict, sample: Sample, index: int, start: int, end: int, candidates: bool) -> np.ndarray:
    """Write one sample into the row; returns its loss entries, `[4, m]`: rows, targets, sample, branch."""
    length, prompt = len(sample.tokens), sample.prompt_tokens
    row["sample"][start:end] = index
    row["positions"][start:end] = np.arange(end - start)
    row["tokens"][start : start + length] = sample.tokens
    losses = [_losses(sample.answer, start + prompt, start + prompt - 1, index, 0)]
    if candidates and sample.candidates:
        row["branch"][start + prompt : start + length] = len(sample.candidates)
    first = start + length
    for branch, answer in enumerate(sample.candidates[1:] if candidates else (), start=1):
        stop = first + len(answer)
        row["tokens"][first:stop] = answer
        row["positions"][first:stop] = prompt + np.arange(len(answer))
        row["branch"][first:stop] = branch
        losses.append(_losses(answer, first, start + prompt - 1, index, branch))
        first = stop
    return np.concatenate(losses, axis=1)


def _losses(answer: np.ndarray, first: int, before: int, index: int, branch: int) -> np.ndarray:
    """The first token is predicted by the row `before` (the prompt's last), each other one by its predecessor."""
    rows = np.concatenate([[before], np.arange(first, first + len(answer) - 1)])
    return np.stack([rows, answer, np.full(len(answer), index), np.full(len(answer), branch)])
