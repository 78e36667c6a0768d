"""Batches for training and evaluation: row number `step` of a process is a pure function of recipe, split and number.

So any number of loading processes gives the same batches, and a resumed run goes on with the batch it would have had.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from cuda_reference.data_packing import TILE, Pack, pack, packed_tokens
from cuda_reference.data_prompts import Sample, Writer
from cuda_reference.data_tasks import TaskMaker
from cuda_reference.data_text import Corpus, build_corpora, collect, digest, load_corpora, save_corpora
from cuda_reference.recipe import Recipe

Corpora = dict[tuple[str, str], Corpus]


def make_corpora(writer: Writer, text_chars: int, workers: int = 0, cache: Path | None = None) -> Corpora:
    """Collect this machine's text and encode it: (kind, split) to tokens.

    Args:
        writer: Encodes.
        text_chars: Characters of each kind.
        workers: Processes that read.
        cache: File of an earlier call with the same arguments: read if it exists, else written.

    Raises:
        ValueError: `cache` is of another tokenizer or size, or no such file.
    """
    settings = {"text_chars": text_chars, **writer.settings()}
    if cache is not None and cache.is_file():
        return load_corpora(cache, settings)
    documents = collect(max_chars=text_chars, workers=workers)
    corpora = build_corpora(documents, writer.encode_batch, writer.newline_ids())
    if cache is not None:
        save_corpora(cache, corpora, settings)
    return corpora


class MadeUpRows(Dataset):
    """Packed rows of made-up tasks.

    Args:
        maker: Makes the samples.
        recipe: Tasks, lengths, row size, pool size.
        rank, ranks: This process among all; each has rows of its own.
    """

    def __init__(self, maker: TaskMaker, recipe: Recipe, rank: int = 0, ranks: int = 1):
        self.maker, self.recipe, self.rank, self.ranks = maker, recipe, rank, ranks

    def __getitem__(self, row: int) -> Pack:
        recipe, data = self.recipe, self.recipe.data
        number = row * self.ranks + self.rank
        rng = np.random.default_rng([recipe.seed, number])
        samples = [
            self.maker.sample(task, number * 1000 + i, tokens)
            for i, (task, tokens) in enumerate(self._plan(rng, data.row_tokens))
        ]
        pool_tokens = recipe.router.pool_tokens
        return pack(samples, recipe.tasks, pool_tokens, data.row_tokens, read_tokens=self._read(rng, samples))

    def fingerprint(self) -> str:
        """A short hash of the text that the samples are made of."""
        return digest(self.maker.code.tokens, self.maker.prose.tokens)

    def _read(self, rng: np.random.Generator, samples: Sequence[Sample]) -> list[int] | None:
        """Tokens that the routers read of each prompt: a random first part of some, of at least two pools."""
        if not self.recipe.data.truncated_share:
            return None
        least = 2 * self.recipe.router.pool_tokens
        whole = [sample.prompt_tokens - 1 for sample in samples]
        cut = rng.random(len(samples)) < self.recipe.data.truncated_share
        return [int(rng.integers(min(least, n), n + 1)) if is_cut else n for n, is_cut in zip(whole, cut, strict=True)]

    def _plan(self, rng: np.random.Generator, room: int) -> list[tuple[str, int]]:
        """Tasks and lengths that fill a row, in random order.

        Systematic sampling: the samples stand at equal distances, from a random offset on, along the joined shares. So
        the expected samples of a task are exactly its share of the row's, and the found ones less than one away.
        """
        data = self.recipe.data
        lengths = list(self._lengths(rng, room))
        ends = np.cumsum(list(data.tasks.values()), dtype=float)
        places = (np.arange(len(lengths)) + rng.random()) / max(1, len(lengths))
        chosen = rng.permutation(np.searchsorted(ends[:-1] / ends[-1], places, side="right"))
        names = list(data.tasks)
        return [(names[task], tokens) for task, tokens in zip(chosen, lengths, strict=True)]

    def _lengths(self, rng: np.random.Generator, room: int) -> Iterator[int]:
        """Lengths of samples that fill a row."""
        data = self.recipe.data
        low, high = math.log(data.shortest_tokens), math.log(data.longest_tokens)
        while room >= data.shortest_tokens:
            tokens = min(int(math.exp(rng.uniform(low, high))), room)
            if room - tokens < data.shortest_tokens:
                tokens = min(room, data.longest_tokens)
            yield tokens
            room -= -(-tokens // TILE) * TILE


class FileRows(Dataset):
    """Packed rows of a user's own samples, in a new order for each pass.

    Args:
        samples: All samples.
        recipe: Row size and pool size.
        rank, ranks: This process among all.

    Raises:
        ValueError: No sample, or one that does not fit into a row.
    """

    def __init__(self, samples: Sequence[Sample], recipe: Recipe, rank: int = 0, ranks: int = 1):
        self.samples, self.recipe, self.rank, self.ranks = samples, recipe, rank, ranks
        longest = max(map(packed_tokens, samples), default=0)
        if not 0 < longest <= recipe.data.row_tokens:
            raise ValueError(
                f"[FileRows] expected samples of at most {recipe.data.row_tokens} tokens, got {len(samples)} "
                f"samples, the longest of {longest}."
            )

    def __getitem__(self, row: int) -> Pack:
        number, passed = row * self.ranks + self.rank, 0
        for epoch in range(number + 1):
            rows = self._rows(epoch)
            if number - passed < len(rows):
                chosen = [self.samples[i] for i in rows[number - passed]]
                return pack(chosen, self.recipe.tasks, self.recipe.router.pool_tokens, self.recipe.data.row_tokens)
            passed += len(rows)
        raise IndexError(row)

    def fingerprint(self) -> str:
        """A short hash of the samples."""
        notes = json.dumps([(s.task, s.prompt_tokens, len(s.tokens)) for s in self.samples])
        return digest(notes.encode(), *(s.tokens for s in self.samples))

    def _rows(self, epoch: int) -> list[list[int]]:
        """The samples of each row of one pass: next fit in shuffled order."""
        rows: list[list[int]] = [[]]
        room = self.recipe.data.row_tokens
        for index in np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.samples)).tolist():
            size = packed_tokens(self.samples[index])
            if size > room:
                rows.append([])
                room = self.recipe.data.row_tokens
            rows[-1].append(index)
            room -= size
        return rows


Rows = MadeUpRows | FileRows


def read_jsonl(path: str | Path, writer: Writer, tasks: Sequence[str]) -> list[Sample]:
    """A user's samples: lines {"prompt": .., "answer": .., "task": ..}; empty lines are left out.

    Prompts are encoded as they stand, after the tokenizer's first token where made-up plain prompts have it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line that is not such an object; the message names its number.
    """
    samples = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                samples.append(_sample(json.loads(line.decode("utf-8")), writer, tasks))
            except ValueError as error:  # also of bytes that are no text, and of text that is no JSON
                raise ValueError(f"[read_jsonl] {path} line {number}: {error}") from None
    return samples


def _sample(line: object, writer: Writer, tasks: Sequence[str]) -> Sample:
    names = ("prompt", "answer", "task")
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in names):
        raise ValueError(f"expected an object with the strings {list(names)}, got {str(line)[:80]}")
    if line["task"] not in tasks:
        raise ValueError(f"expected a task among {list(tasks)}, got {line['task']!r}")
    prompt, answer = (
        writer.encode_prompt(line["prompt"]),
        np.asarray(writer.encode_batch([line["answer"]])[0], np.int32),
    )
    return Sample(np.concatenate([prompt, answer]), len(prompt), line["task"])


def training_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    text_cache: Path | None = None,
) -> Rows:
    """The training rows of a recipe: its JSONL file if it names one, else made-up tasks on this machine's text."""
    writer = Writer(tokenizer)
    if recipe.data.jsonl:
        samples = read_jsonl(recipe.data.jsonl, writer, recipe.tasks)
        absent = [task for task in recipe.tasks if task not in {sample.task for sample in samples}]
        if absent and rank == 0:
            warnings.warn(f"[training_rows] {recipe.data.jsonl} has no sample of {absent}.", stacklevel=2)
        return FileRows(samples, recipe, rank, ranks)
    corpora = make_corpora(writer, recipe.data.text_chars, workers, text_cache)
    return MadeUpRows(TaskMaker(writer, corpora, "train", recipe.seed), recipe, rank, ranks)


def calibration_rows(rows: Rows, recipe: Recipe) -> tuple[Rows, range]:
    """Rows for the routers' start, and the numbers of those that this process reads: row i of rank k is i * ranks + k.

    Made-up ones come after those of training, of the same text, in lengths of their own. Of a user's own samples it is
    one pass at most: what the fit did not see must not be in another row.
    """
    first, count = recipe.optimiser.steps * recipe.data.micro_steps, recipe.calibration_rows
    if isinstance(rows, FileRows):
        first, count = 0, min(count, len(rows._rows(0)))
    else:
        rows = MadeUpRows(rows.maker, recipe.for_calibration(), rows.rank, rows.ranks)
    return rows, range(first, first + len(range(rows.rank, count, rows.ranks)))


def stream(rows: Dataset, numbers: Iterable[int], workers: int = 0, *, pin: bool = False) -> Iterator[Pack]:
    """The rows of these numbers in order, made ahead of time by `workers` processes."""
    ahead = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(rows, sampler=list(numbers), batch_size=None, num_workers=workers, pin_memory=pin, **ahead)
    return iter(loader)
