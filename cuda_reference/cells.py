"""What is evaluated: cells of held-out samples, by split, task, form and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, Dataset

from cuda_reference.data_prompts import RETRIEVAL, Sample
from cuda_reference.data_tasks import TaskMaker

SPLITS = ("valid", "test", "ood")
"""Held-out samples: "valid" for what is chosen by results, "test" for what is reported, "ood" of unseen forms."""
REPORTED = ("test", "ood")
"""The splits that are evaluated unless others are asked for."""
KEY_FORMS = ("keys", "keys4", "keys3", "keys2")
"""Forms of "multi" from the hardest on: ten facts of one form, four, three, two."""
KINDS = {
    "single-magic": ("single", "magic"),
    "single": ("single", ""),
    "single-bare": ("single", "bare"),
    "multi-keys": ("multi", "keys"),
    "multi-hops": ("multi", "hops"),
    "aggregation": ("aggregation", ""),
    "code": ("code", ""),
    "icl": ("icl", ""),
    "document": ("document", ""),
}
"""Name of a kind of samples to (task, form), as `TaskMaker.sample` takes them."""
UNSEEN_KINDS = ("single", "multi-keys")
"""Kinds that are made out of domain too."""


@dataclass(frozen=True)
class Cell:
    """Samples that are averaged together.

    Args:
        split: One of `SPLITS`.
        kind: Name of `KINDS`.
        tokens: Length of the samples.
        form: As `TaskMaker.sample` takes it.
    """

    split: str
    kind: str
    tokens: int
    form: str

    @property
    def name(self) -> str:
        """As "test/multi-keys/4096"."""
        return f"{self.split}/{self.kind}/{self.tokens}"

    @property
    def task(self) -> str:
        """The task."""
        return KINDS[self.kind][0]

    @property
    def retrieves(self) -> bool:
        """Whether something is to be found in the text."""
        return self.task in RETRIEVAL

    @property
    def is_choice(self) -> bool:
        """Whether the quality is judged by a choice among ten, which takes many samples; hops are too hard for it."""
        return self.retrieves and self.form != "hops"


def default_cells(
    lengths: Sequence[int], kinds: Sequence[str] = tuple(KINDS), splits: Sequence[str] = REPORTED
) -> list[Cell]:
    """Every kind at every length, and retrieval out of domain; the longest samples first."""
    found = []
    for tokens in sorted(lengths, reverse=True):
        for split in splits:
            chosen = [kind for kind in kinds if split != "ood" or kind in UNSEEN_KINDS]
            found += [Cell(split, kind, tokens, KINDS[kind][1]) for kind in chosen]
    return found


def shard_of(cells: Sequence[Cell], shard: str) -> list[Cell]:
    """The cells of one of several processes: "1/4" is the second of four. They differ little in their work.

    Raises:
        ValueError: Not of that form.
    """
    index, slash, count = shard.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"[shard_of] expected a shard like 0/4, got {shard!r}.")
    return list(cells[int(index) :: int(count)])


class _Samples(Dataset):
    """Sample i of a cell: needles at evenly spread depths, in an order in which any first part is spread too."""

    def __init__(self, cell: Cell, maker: TaskMaker, start: int = 0):
        self.cell, self.maker, self.start = cell, maker, start

    def __getitem__(self, i: int) -> Sample:
        depth = (0.5 + i * 0.6180339887498949) % 1.0  # golden ratio: evenly spread for any number of samples
        return self.maker.sample(self.cell.task, self.start + i, self.cell.tokens, depth=depth, form=self.cell.form)


def samples_of(
    cell: Cell, makers: Mapping[str, TaskMaker], count: int, workers: int = 0, *, start: int = 0
) -> list[Sample]:
    """`count` samples of a cell, made by `workers` processes (0: this one), numbered from `start` on."""
    rows = _Samples(cell, makers[cell.split], start)
    settings = {"multiprocessing_context": "fork"} if workers else {}
    return list(DataLoader(rows, sampler=range(count), batch_size=None, num_workers=workers, **settings))


def with_form(cell: Cell, form: str) -> Cell:
    """The same cell with samples of another form."""
    return replace(cell, form=form)
