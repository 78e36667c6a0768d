"""The made-up tasks: sample number i of a split, always the same for the same seed and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cuda_reference.data_prompts import TASKS, Sample, Writer, insert
from cuda_reference.data_text import Corpus, stable_hash
from cuda_reference.data_words import VALUE_KINDS, Form, words

CANDIDATES = 10
LONGEST_ANSWER_TOKENS = 256
PLAINEST_SHARE = 0.25  # of the needles: a number in the plainest sentence
ASKED_BEFORE_SHARE = 0.2  # of the questions: they stand before the text instead of after it
BARE_SHARE = 0.5  # of the needles to train on: the answer's beginning is not given, as nobody gives it in use


@dataclass(frozen=True)
class Question:
    """Facts to hide and what is asked about them.

    Args:
        task, form: Of the sample.
        facts: Sentences; the first is the one that the depth of the sample is about.
        question: The question.
        lead: Beginning of the answer; a value follows after a space.
        values: Possible answers, the right one first.
    """

    task: str
    form: str
    facts: list[str]
    question: str
    lead: str
    values: list[str]


class TaskMaker:
    """Makes samples of one split.

    Args:
        writer: Encodes text.
        corpora: (kind, split) to text, from `data_text.build_corpora`.
        split: "train", "valid", "test" or "ood" (text of "test", forms and fillers that "train" never has).
        seed: Of everything drawn.
    """

    def __init__(self, writer: Writer, corpora: Mapping[tuple[str, str], Corpus], split: str, seed: int):
        self.writer, self.split, self.seed = writer, split, seed
        text_split = "test" if split == "ood" else split
        self.code, self.prose = corpora["code", text_split], corpora["prose", text_split]
        self.words = words()

    def sample(self, task: str, index: int, tokens: int, depth: float | None = None, form: str = "") -> Sample:
        """Sample `index` of `task`: exactly `tokens` tokens, the answer counted.

        Args:
            task: One of `TASKS`.
            index: Any integer >= 0.
            tokens: Length; 384 holds every task.
            depth: Place of the needle; None draws it.
            form: "magic" for "single" (the plain sentence with a number that other suites use), or "bare" (the answer's
                beginning belongs to the answer, not to the prompt); for "multi" "keys" (ten facts of one form), "keys2"
                to "keys9" (that many) or "hops"; "" draws it.

        Raises:
            ValueError: Unknown task, or too few tokens for it.
        """
        if task not in TASKS:
            raise ValueError(f"[TaskMaker.sample] task must be one of {list(TASKS)}, got {task!r}.")
        rng = np.random.default_rng([self.seed, stable_hash(f"{self.split}/{task}/{form}") % 2**32, index])
        depth = float(rng.random()) if depth is None else depth
        chat = bool(rng.random() < 0.6)
        if task == "single":
            return self._needle(rng, tokens, chat, depth, others=0, magic=form == "magic", bare=form == "bare")
        if task == "multi":
            hops = form == "hops" or (not form and rng.random() < 0.4)
            if hops:
                return self._hops(rng, tokens, chat, depth)
            return self._needle(rng, tokens, chat, depth, others=int(form.removeprefix("keys") or CANDIDATES) - 1)
        return getattr(self, f"_{task}")(rng, tokens, chat)

    # Retrieval

    def _form(self, rng: np.random.Generator, magic: bool) -> tuple[Form, str]:
        """A sentence form and a kind of value; numbers in the plainest sentence are the most frequent."""
        forms = self.words.ood_forms if self.split == "ood" else self.words.forms
        form, kind = forms[rng.integers(len(forms))], str(rng.choice(VALUE_KINDS))
        return (forms[0], "digits") if magic or rng.random() < PLAINEST_SHARE else (form, kind)

    def _needle(
        self,
        rng: np.random.Generator,
        tokens: int,
        chat: bool,
        depth: float,
        others: int,
        *,
        magic: bool = False,
        bare: bool = False,
    ) -> Sample:
        """One fact to find; with `others`, facts of the same form about other keys are the wrong candidates."""
        form, kind = self._form(rng, magic)
        values = self.words.values(rng, kind, CANDIDATES)
        keys = self._keys(rng, 1 + others)
        if tokens < 1024 and others:
            keys = keys[:4]
        facts = [form.statement.format(key=key, value=value) for key, value in zip(keys, values, strict=False)]
        question, lead = form.question.format(key=keys[0]), form.lead.format(key=keys[0])
        asked = Question("multi" if others else "single", form.statement, facts, question, lead, values)
        return self._ask(rng, tokens, chat, depth, asked, bare=bare)

    def _hops(self, rng: np.random.Generator, tokens: int, chat: bool, depth: float) -> Sample:
        """Two facts to join: a box holds a key, the key opens a code; two such chains stand in the text."""
        values = self.words.values(rng, str(rng.choice(VALUE_KINDS)), CANDIDATES)
        boxes, keys = self._keys(rng, 2), self._keys(rng, 2)
        facts = [f"The {box} box holds the {key} key." for box, key in zip(boxes, keys, strict=True)]
        facts += [f"The {key} key opens {value}." for key, value in zip(keys, values, strict=False)]
        question, lead = (
            text.format(boxes[0]) for text in ("What does the key in the {} box open?", "The key in the {} box opens")
        )
        return self._ask(rng, tokens, chat, depth, Question("multi", "hops", facts, question, lead, values))

    def _keys(self, rng: np.random.Generator, count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.words.key(rng, self.split)] = None
        return list(found)

    def _instruction(self, rng: np.random.Generator, *kinds: str) -> str:
        """One of the instructions of these kinds."""
        table = self.words.ood_instructions if self.split == "ood" else self.words.instructions
        return str(rng.choice([text for kind in kinds for text in table[kind]]))

    def _ask(
        self, rng: np.random.Generator, tokens: int, chat: bool, depth: float, asked: Question, *, bare: bool = False
    ) -> Sample:
        """Hide the facts in a filler, the first at `depth`, and ask for the first value."""
        depths = [depth, *rng.random(len(asked.facts) - 1)]
        pieces = [self.writer.encode("\n" + fact) for fact in asked.facts]
        candidates = tuple(self.writer.encode(" " + value) for value in asked.values)
        early = rng.random() < ASKED_BEFORE_SHARE
        question = self._instruction(rng, "tail").format(asked.question)
        head = self._instruction(rng, "any", "ask") + (f"{question}\n" if early else "")
        tail = "\n\n" + (self._instruction(rng, "early_tail") if early else question)

        def body(room: int) -> np.ndarray:
            window, breaks = self._filler(rng, room - sum(map(len, pieces)))
            return insert(window, breaks, pieces, depths)

        begin = "" if chat and self.writer.has_template else "Answer:"
        lead = f"{begin} {asked.lead}" if begin else asked.lead
        if bare or (self.split == "train" and rng.random() < BARE_SHARE):
            first = self.writer.encode(lead.removeprefix(begin))
            candidates = tuple(np.concatenate([first, value]) for value in candidates)
            lead = begin
        prompt = self.writer.prompt(head, body, tail, lead, tokens=tokens - len(candidates[0]), chat=chat)
        whole = np.concatenate([prompt, candidates[0]])
        return Sample(whole, len(prompt), asked.task, candidates, depth, asked.form)

    # Fillers

    @cached_property
    def _sentences(self) -> list[list[np.ndarray]]:
        """Encoded sentences of every language."""
        languages = self.words.ood_sentences if self.split == "ood" else self.words.sentences
        nouns = self.words.nouns
        return [
            [
                self.writer.encode("\n" + s.strip().format(a=a, b=b))
                for a, b in zip(nouns[:40], nouns[40:], strict=False)
                for s in lines
            ]
            for lines in languages.values()
        ]

    def _filler(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens of prose, code or made-up sentences, with the places where a fact may stand."""
        if count < 1:
            raise ValueError(f"[TaskMaker.sample] expected room for a filler, {1 - count} tokens are missing.")
        share = rng.random()
        if share < (0.0 if self.split == "ood" else 0.75):
            return (self.prose if share < 0.45 else self.code).window(rng, count)
        language = self._sentences[rng.integers(len(self._sentences))]
        lines, breaks, total = [], [], 0
        while total < count:
            line = language[rng.integers(len(language))]
            breaks.append(total)
            lines.append(line)
            total += len(line)
        return np.concatenate(lines)[:count], np.asarray(breaks)

    # Everything else

    def _text(self, rng: np.random.Generator, tokens: int, chat: bool, corpus: Corpus, task: str, kind: str) -> Sample:
        """Text that goes on: the prompt is cut at a random point, the answer is what follows.

        In the chat form the user gives the text, and the assistant's turn goes on with it.
        """
        chat = chat and self.writer.has_template
        most = min(LONGEST_ANSWER_TOKENS, tokens // 3)
        answer = int(rng.integers(most // 2, most + 1))
        text = np.zeros(0, np.int32)

        def body(room: int) -> np.ndarray:
            nonlocal text
            text = corpus.window(rng, room + answer)[0]
            return text[:room]

        head = self._instruction(rng, "any", kind) if chat else ""
        prompt = self.writer.prompt(head, body, "", "", tokens=tokens - answer, chat=chat)
        return Sample(np.concatenate([prompt, text[-answer:]]), len(prompt), task)

    def _code(self, rng: np.random.Generator, tokens: int, chat: bool) -> Sample:
        return self._text(rng, tokens, chat, self.code, "code", "code")

    def _document(self, rng: np.random.Generator, tokens: int, chat: bool) -> Sample:
        return self._text(rng, tokens, chat, self.prose, "document", "text")

    def _aggregation(self, rng: np.random.Generator, tokens: int, chat: bool) -> Sample:
        """Which category of things is named most often in the whole text?"""
        names = list(self.words.categories)
        rng.shuffle(names)
        shares = np.array([0.5] + [0.5 / (len(names) - 1)] * (len(names) - 1))
        candidates = tuple(self.writer.encode(f" {name}") for name in names)
        count = max(8, tokens // 64)

        def body(room: int) -> np.ndarray:
            kinds = rng.choice(len(names), count, p=shares)
            pieces = [
                self.writer.encode(f"\nSeen: {rng.choice(self.words.categories[names[kind]])}.") for kind in kinds
            ]
            window, breaks = self._filler(rng, room - sum(map(len, pieces)))
            return insert(window, breaks, pieces, rng.random(count))

        question = f"Which kind of thing was seen most often: {', '.join(sorted(names))}?"
        tail = "\n\n" + self._instruction(rng, "tail").format(question)
        prompt = self.writer.prompt(
            self._instruction(rng, "any", "count"),
            body,
            tail,
            "Answer:",
            tokens=tokens - len(candidates[0]),
            chat=chat,
        )
        return Sample(np.concatenate([prompt, candidates[0]]), len(prompt), "aggregation", candidates, form="most seen")

    def _icl(self, rng: np.random.Generator, tokens: int, chat: bool) -> Sample:
        """Examples of a made-up labelling of words; the last one is to be labelled."""
        names = [str(name) for name in rng.choice(list(self.words.categories), 4, replace=False)]
        labels = [str(label) for label in rng.choice(self.words.labels, 4, replace=False)]
        candidates = [self.writer.encode(f" {label}") for label in labels]
        wanted = int(rng.integers(4))
        query = str(rng.choice(self.words.categories[names[wanted]]))

        def body(room: int) -> np.ndarray:
            lines, total = [], 0
            while total < room:
                kind = rng.integers(4)
                word = rng.choice(self.words.categories[names[kind]])
                lines.append(self.writer.encode(f"\n{word} ->{' '}{labels[kind]}"))
                total += len(lines[-1])
            return np.concatenate(lines)[-room:]

        ordered = (candidates[wanted], *(c for i, c in enumerate(candidates) if i != wanted))
        prompt = self.writer.prompt(
            self._instruction(rng, "any", "label"),
            body,
            f"\n{query} ->",
            "",
            tokens=tokens - len(ordered[0]),
            chat=False,
        )
        return Sample(np.concatenate([prompt, ordered[0]]), len(prompt), "icl", ordered, form="labels")
