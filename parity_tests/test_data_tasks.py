"""Made-up tasks: exact lengths, right answers in the text, nothing shared between splits."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_reference.data_prompts import RETRIEVAL, TASKS, Sample, Writer, insert
from cuda_reference.data_tasks import CANDIDATES, TaskMaker
from cuda_reference.data_text import build_corpora, collect
from cuda_reference.data_words import VALUE_KINDS, words
from parity_tests.tiny_training import byte_tokenizer, write_corpus

TOKENS = 2500  # bytes


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    writer = Writer(byte_tokenizer())
    documents = collect({"site": write_corpus(tmp_path_factory.mktemp("corpus"))})
    corpora = build_corpora(documents, writer.encode_batch, writer.newline_ids())
    return {split: TaskMaker(writer, corpora, split, seed=3) for split in ("train", "test", "ood")}


def text(maker, ids):
    return maker.writer.tokenizer.decode(ids)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [1700, TOKENS])
def test_samples_have_exactly_the_length_asked_for(makers, task, tokens):
    for index in range(6):
        sample = makers["train"].sample(task, index, tokens)
        assert len(sample.tokens) == tokens
        assert sample.task == task
        assert sample.tokens.min() >= 0


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_the_same_every_time_and_differ_by_index_and_split(makers, task):
    first, again, other = (makers["train"].sample(task, i, TOKENS).tokens for i in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, makers["test"].sample(task, 0, TOKENS).tokens)


@pytest.mark.parametrize("task", RETRIEVAL)
def test_the_fact_stands_in_the_prompt_and_candidates_differ(makers, task):
    for index in range(12):
        sample = makers["test"].sample(task, index, TOKENS)
        prompt, answer = (
            text(makers["test"], sample.tokens[: sample.prompt_tokens]),
            text(makers["test"], sample.answer),
        )
        candidates = [text(makers["test"], c) for c in sample.candidates]
        assert candidates[0] == answer
        assert len(set(candidates)) == CANDIDATES
        assert answer.strip() in prompt
        if task == "single":
            assert not any(c.strip() in prompt.replace(answer.strip(), "") for c in candidates[1:] if len(c) > 5)


def test_half_of_the_answers_to_train_on_begin_with_their_lead(makers):
    leads = tuple(form.lead.format(key="|").partition("|")[0].strip() for form in words().forms)
    samples = [makers["train"].sample("single", i, 1700) for i in range(80)]
    bare = [text(makers["train"], sample.answer).strip().startswith(tuple(filter(None, leads))) for sample in samples]
    assert 25 <= sum(bare) <= 55
    for sample in (*samples[:6], *(makers["test"].sample("single", i, 1700, form="bare") for i in range(3))):
        assert len(sample.tokens) == 1700
        assert np.array_equal(sample.candidates[0], sample.answer)
    bare = makers["test"].sample("single", 4, 1700, form="bare")
    answers = [text(makers["test"], c) for c in bare.candidates]
    assert len({answer.rpartition(" ")[0] for answer in answers}) < CANDIDATES // 2
    assert text(makers["test"], bare.tokens[: bare.prompt_tokens]).endswith(("assistant\n", "Answer:"))


def test_what_stands_around_a_text_does_not_tell_the_task(makers):
    heads = {task: set() for task in TASKS}
    for task in TASKS:
        for i in range(60):
            sample = makers["train"].sample(task, i, 1700)
            begin = text(makers["train"], sample.tokens[:200])
            heads[task] |= {head for head in words().instructions["any"] if head and head in begin}
    shared = set.intersection(*(heads[task] for task in TASKS))
    assert len(shared) >= 3


def test_needles_lie_at_their_depth(makers):
    for depth in (0.05, 0.5, 0.95):
        places = []
        for index in range(8):
            sample = makers["test"].sample("single", index, TOKENS, depth=depth)
            prompt = text(makers["test"], sample.tokens[: sample.prompt_tokens])
            value = text(makers["test"], sample.answer).strip()
            places.append(prompt.rindex(value) / len(prompt) if value in prompt else np.nan)
        assert abs(np.nanmean(places) - depth) < 0.2


def test_multi_kinds(makers):
    assert all(makers["test"].sample("multi", i, TOKENS, form="hops").form == "hops" for i in range(5))
    for form, facts in (("keys", 10), ("keys3", 3)):
        sample = makers["test"].sample("multi", 2, TOKENS, form=form)
        prompt = text(makers["test"], sample.tokens[: sample.prompt_tokens])
        values = [text(makers["test"], c).strip() for c in sample.candidates]
        assert sum(value in prompt for value in values) == facts


def test_hops_are_answered_by_their_chain(makers):
    sample = makers["train"].sample("multi", 1, TOKENS, form="hops")
    prompt = text(makers["train"], sample.tokens[: sample.prompt_tokens])
    box = prompt.split("key in the ")[-1].split(" box")[0]
    key = prompt.split(f"The {box} box holds the ")[1].split(" key")[0]
    assert prompt.split(f"The {key} key opens")[1].split(".")[0] == text(makers["train"], sample.answer)


def test_forms_and_fillers_out_of_domain_are_never_trained_on(makers):
    lists = words()
    assert not {f.statement for f in lists.forms} & {f.statement for f in lists.ood_forms}
    assert not set(lists.sentences) & set(lists.ood_sentences)
    assert lists.instructions.keys() == lists.ood_instructions.keys()
    for kind, known in lists.instructions.items():
        assert not set(known) & set(lists.ood_instructions[kind])
    trained = {makers["train"].sample("single", i, 1700).form for i in range(60)}
    assert trained <= {f.statement for f in lists.forms}
    assert len(trained) > 8
    assert {makers["ood"].sample("single", i, 1700).form for i in range(20)} == {f.statement for f in lists.ood_forms}


def test_names_belong_to_one_split():
    rng = np.random.default_rng(0)
    names = {split: {words().key(rng, split) for _ in range(400)} for split in ("train", "valid", "test")}
    assert not names["train"] & names["test"]
    assert not names["train"] & names["valid"]


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_values_are_different(kind):
    values = words().values(np.random.default_rng(1), kind, CANDIDATES)
    assert len(set(values)) == CANDIDATES


def test_continued_text_goes_on_where_the_prompt_stops(makers):
    for task in ("code", "document"):
        for index in range(4):
            sample = makers["train"].sample(task, index, TOKENS)
            corpus = getattr(makers["train"], "code" if task == "code" else "prose")
            whole = text(makers["train"], np.concatenate([corpus.tokens, corpus.tokens[:TOKENS]]))
            prompt = text(makers["train"], sample.tokens[: sample.prompt_tokens]).removesuffix("</s>\n<s>assistant\n")
            assert prompt[-60:] + text(makers["train"], sample.answer) in whole


def test_bad_requests_are_refused(makers):
    with pytest.raises(ValueError, match="task must be one of"):
        makers["train"].sample("poetry", 0, TOKENS)
    with pytest.raises(ValueError, match="expected"):
        makers["train"].sample("multi", 0, 200)
    with pytest.raises(ValueError, match="prompt_tokens 5 of 5"):
        Sample(np.arange(5), 5, "single")


def test_plain_tokenizers_have_no_template():
    writer = Writer(byte_tokenizer(chat=False))
    prompt = writer.prompt("head", lambda n: np.zeros(n, np.int32), "tail", "lead", tokens=40, chat=True)
    assert len(prompt) == 40
    assert writer.tokenizer.decode(prompt).endswith("tail\nlead")


def test_insert_puts_pieces_at_the_nearest_break():
    window, breaks = np.arange(100), np.array([0, 40, 90])
    out = insert(window, breaks, [np.array([-1]), np.array([-2, -2])], [0.45, 0.9])
    assert out.tolist() == [*range(40), -1, *range(40, 90), -2, -2, *range(90, 100)]
    assert insert(window, np.array([], int), [np.array([-1])], [0.5]).tolist() == [*range(50), -1, *range(50, 100)]
