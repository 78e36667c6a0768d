"""Packed rows: layout, pools, loss entries, and the batches that training reads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from cuda_reference.data import FileRows, MadeUpRows, calibration_rows, read_jsonl, stream, training_rows
from cuda_reference.data_packing import TILE, pack, packed_tokens
from cuda_reference.data_prompts import TASKS, Sample, Writer
from cuda_reference.data_tasks import TaskMaker
from cuda_reference.data_text import build_corpora, collect
from cuda_reference.recipe import DataConfig, Recipe, load_recipe
from flux_mlx.spec import RouterConfig, pool_queries
from parity_tests.tiny_training import byte_tokenizer, write_corpus

P = 20
TARGETS = dict.fromkeys(TASKS, 0.5)


def made(lengths, answer=5, candidates=0):
    rng = np.random.default_rng(0)
    found = []
    for i, n in enumerate(lengths):
        tokens = rng.integers(0, 99, n).astype(np.int32)
        others = tuple(rng.integers(0, 99, answer + j % 2).astype(np.int32) for j in range(candidates))
        right = (tokens[-answer:],) if candidates else ()
        found.append(Sample(tokens, n - answer, TASKS[i % len(TASKS)], right + others))
    return found


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    writer = Writer(byte_tokenizer())
    documents = collect({"site": write_corpus(tmp_path_factory.mktemp("corpus"))})
    return TaskMaker(writer, build_corpora(documents, writer.encode_batch, writer.newline_ids()), "train", seed=0)


@pytest.fixture
def recipe():
    data = DataConfig(dict.fromkeys(TASKS, 1.0), shortest_tokens=1700, longest_tokens=3000, row_tokens=16384)
    return Recipe(targets=TARGETS, data=data, router=RouterConfig(pool_tokens=P))


def test_every_sample_lies_whole_on_its_own_tiles():
    samples = made([100, 128, 129, 300])
    packed = pack(samples, TASKS, P, 8 * TILE)
    for index, sample in enumerate(samples):
        rows = (packed.sample == index).nonzero().flatten().numpy()
        assert rows[0] % TILE == 0
        assert np.array_equal(packed.tokens[rows[: len(sample.tokens)]], sample.tokens)
        assert np.array_equal(packed.positions[rows], np.arange(len(rows)))
    assert packed.sample[-1] == 3
    assert (packed.branch == 0).all()


def test_routers_may_read_a_first_part_of_the_prompt(maker, recipe):
    data = replace(recipe.data, truncated_share=0.5)
    whole, cut = (MadeUpRows(maker, replace(recipe, data=d))[3] for d in (recipe.data, data))
    assert np.array_equal(whole.tokens, cut.tokens)
    starts = np.flatnonzero(np.diff(whole.sample, prepend=-1))
    ends = cut.pool_rows.amax(1).numpy() - starts + 1
    full = whole.prompt_tokens.numpy() - 1
    assert np.array_equal(whole.pool_rows.amax(1).numpy() - starts + 1, full)
    assert (ends <= full).all()
    assert (ends >= 2 * P).all()
    assert 0 < (ends < full).sum() < len(full)


def test_loss_entries_predict_the_answer_from_the_row_before():
    samples = made([100, 131])
    packed = pack(samples, TASKS, P, 3 * TILE)
    starts = [0, TILE]
    for index, sample in enumerate(samples):
        mine = packed.loss_sample == index
        assert np.array_equal(packed.loss_targets[mine], sample.answer)
        rows = starts[index] + np.arange(sample.prompt_tokens - 1, len(sample.tokens) - 1)
        assert np.array_equal(packed.loss_rows[mine], rows)


def test_candidates_follow_as_branches_at_the_answers_positions():
    (sample,) = made([100], candidates=3)
    packed = pack([sample], TASKS, P, TILE, candidates=True)
    assert packed_tokens(sample, candidates=True) == TILE
    for branch, answer in enumerate(sample.candidates[1:], start=1):
        rows = (packed.branch == branch).nonzero().flatten().numpy()
        assert np.array_equal(packed.tokens[rows], answer)
        assert np.array_equal(packed.positions[rows], sample.prompt_tokens + np.arange(len(answer)))
        mine = packed.loss_branch == branch
        assert np.array_equal(packed.loss_targets[mine], answer)
        assert packed.loss_rows[mine].tolist() == [sample.prompt_tokens - 1, *rows[:-1]]


@pytest.mark.parametrize("prompt", [2, 15, 20, 21, 40, 41, 97])
def test_pools_are_those_of_the_specification(prompt):
    sample = Sample(np.arange(prompt + 3, dtype=np.int32), prompt, "code")
    filler = made([70])
    packed = pack([*filler, sample], TASKS, P, 3 * TILE)
    queries = np.random.default_rng(0).normal(size=(3 * TILE, 2, 4))
    start = int((packed.sample == 1).nonzero()[0])
    expected = pool_queries(queries[None, start : start + prompt - 1], P)[0]
    rows, weights = packed.pool_rows[1].numpy(), packed.pool_weights[1].double().numpy()
    assert np.allclose((queries.mean(1)[rows] * weights[:, None]).sum(0), expected, atol=1e-7)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1 samples of 256 tokens"):
        pack(made([200]), TASKS, P, TILE)
    with pytest.raises(ValueError, match="whole tiles"):
        pack(made([100]), TASKS, P, 200)
    with pytest.raises(ValueError, match="got 0 samples"):
        pack([], TASKS, P, TILE)


def test_made_up_rows_are_filled_and_mix_tasks(maker, recipe):
    rows = MadeUpRows(maker, recipe)
    used, tasks = 0, []
    for number in range(8):
        packed = rows[number]
        used += int(packed.lengths.sum())
        tasks += packed.task.tolist()
    assert used / (8 * recipe.data.row_tokens) > 0.93
    counts = np.bincount(tasks, minlength=len(TASKS))
    assert counts.min() >= counts.sum() / len(TASKS) - 2


@pytest.mark.parametrize("name", ["smollm2", "smollm2-unbalanced"])
def test_tasks_are_drawn_by_the_shares_of_the_recipe(name):
    """Systematic sampling: each row is within one sample of every share, all rows together within their noise."""
    recipe, rows = load_recipe(name), 400
    planner = MadeUpRows(None, recipe)
    names, shares = list(recipe.data.tasks), np.array(list(recipe.data.tasks.values()))
    shares = shares / shares.sum()
    found, orders = np.zeros((rows, len(names))), set()
    for row in range(rows):
        plan = [task for task, _ in planner._plan(np.random.default_rng([1, row]), recipe.data.row_tokens)]
        found[row] = [plan.count(task) for task in names]
        orders.add(tuple(plan))
    wanted = found.sum(1, keepdims=True) * shares
    assert np.abs(found - wanted).max() < 1 + 1e-9
    part = wanted % 1  # of one sample: what chance decides
    noise = np.sqrt((part * (1 - part)).sum(0))
    assert (np.abs((found - wanted).sum(0)) < 4 * noise + 1e-9).all()
    assert found.sum(0).min() > 0
    assert len(orders) > rows / 4


def test_rows_are_a_function_of_their_number(maker, recipe):
    alone = [p.tokens.tolist() for p in stream(MadeUpRows(maker, recipe), range(4))]
    assert [p.tokens.tolist() for p in stream(MadeUpRows(maker, recipe), range(2, 4), workers=2)] == alone[2:]
    pairs = [MadeUpRows(maker, recipe, rank, 2) for rank in range(2)]
    assert [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]][3].tokens.tolist() == alone[3]
    assert len({str(tokens) for tokens in alone}) == 4


def test_file_rows_hold_every_sample_once_a_pass(recipe):
    samples = made([100 + 50 * i for i in range(40)])
    rows = FileRows(samples, recipe)
    a_pass = len(rows._rows(0))
    seen = [p.lengths.tolist() for p in (rows[i] for i in range(a_pass))]
    assert sorted(tokens for row in seen for tokens in row) == sorted(len(s.tokens) for s in samples)
    assert [p.lengths.tolist() for p in (rows[i] for i in range(a_pass, a_pass + 1))] != seen[:1]
    with pytest.raises(ValueError, match="at most 16384"):
        FileRows(made([17000]), recipe)


def test_jsonl_is_read_and_bad_lines_are_named(tmp_path):
    writer, path = Writer(byte_tokenizer()), tmp_path / "mine.jsonl"
    good = {"prompt": "What is up?", "answer": " The sky", "task": "code"}
    path.write_text(json.dumps(good) + "\n")
    (sample,) = read_jsonl(path, writer, TASKS)
    assert writer.tokenizer.decode(sample.tokens) == "What is up? The sky"
    assert sample.prompt_tokens == len("What is up?")
    for bad in ("{", "[]", '{"prompt": "a"}', json.dumps(good | {"task": "x"}), json.dumps(good | {"answer": ""})):
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=r"mine\.jsonl line 2"):
            read_jsonl(path, writer, TASKS)


def test_empty_lines_are_left_out_and_bytes_that_are_no_text_are_named(tmp_path):
    writer, path = Writer(byte_tokenizer()), tmp_path / "mine.jsonl"
    good = json.dumps({"prompt": "What is up?", "answer": " The sky", "task": "code"}).encode()
    path.write_bytes(b"\n" + good + b"\r\n  \n" + good + b"\n\n")
    assert len(read_jsonl(path, writer, TASKS)) == 2
    path.write_bytes(good + b"\n\n" + good.replace(b"sky", b"\xff") + b"\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl line 3: 'utf-8' codec"):
        read_jsonl(path, writer, TASKS)
    assert not writer._encoded


def test_prompts_of_a_file_begin_as_made_up_ones_do(tmp_path):
    tokenizer, path = byte_tokenizer(), tmp_path / "mine.jsonl"
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    writer = Writer(tokenizer)
    lines = [{"prompt": text, "answer": "b", "task": "code"} for text in ("aa", "<s>aa")]
    path.write_text("\n".join(map(json.dumps, lines)))
    plain = writer.prompt("a", lambda n: writer.encode("a"), "", "", tokens=3, chat=False)
    for sample in read_jsonl(path, writer, TASKS):
        assert sample.tokens[: sample.prompt_tokens].tolist() == plain.tolist()
        assert len(sample.answer) == 1


def test_tasks_without_a_sample_and_settings_that_a_file_does_not_follow_are_named(tmp_path, recipe):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "What is up?", "answer": " The sky", "task": "code"}))
    mine = replace(recipe, data=replace(recipe.data, jsonl=str(path)))
    with pytest.warns(UserWarning, match=r"no sample of \['single', 'multi', 'aggregation', 'icl', 'document'\]"):
        training_rows(mine, byte_tokenizer())
    with pytest.raises(ValueError, match=r"with data.jsonl expected \[\] and 0, got \[384, 640\]"):
        replace(mine, calibration_tokens=(384, 640))


def test_a_start_reads_every_sample_of_a_file_once(recipe):
    """Else the fit would have seen what its agreement is measured on."""
    samples = made([100 + 50 * i for i in range(40)])
    for count, ranks in ((100, 1), (3, 2), (100, 2)):
        wanted = replace(recipe, calibration_rows=count)
        parts = [calibration_rows(FileRows(samples, wanted, rank, ranks), wanted) for rank in range(ranks)]
        packs = [list(stream(*part)) for part in parts]
        seen = [length for part in packs for p in part for length in p.lengths.tolist()]
        assert len(set(seen)) == len(seen)
        assert sum(map(len, packs)) == min(count, len(parts[0][0]._rows(0)))


def test_processes_share_the_rows_of_a_start(maker, recipe):
    recipe = replace(recipe, calibration_rows=3)
    steps = recipe.optimiser.steps
    parts = [calibration_rows(MadeUpRows(maker, recipe, rank, 2), recipe) for rank in range(2)]
    assert [numbers for _, numbers in parts] == [range(steps, steps + 2), range(steps, steps + 1)]
    found = [rows[numbers[0]].tokens.tolist() for rows, numbers in parts]
    one = MadeUpRows(maker, recipe)
    assert found == [one[2 * steps].tokens.tolist(), one[2 * steps + 1].tokens.tolist()]
