"""Text sources: what is read, that it is the same every time, that no split holds another's paragraphs."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from cuda_reference.data import make_corpora
from cuda_reference.data_prompts import Writer
from cuda_reference.data_text import (
    PARAGRAPH_CHARS,
    SPLITS,
    Corpus,
    Document,
    build_corpora,
    collect,
    load_corpora,
    read_documents,
    save_corpora,
    split_of,
    without_repeats,
)
from parity_tests.tiny_training import byte_tokenizer, write_corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def documents(root):
    return collect({"site": root})


def paragraphs(text):
    return {" ".join(p.split()) for p in text.split("\n\n") if len(" ".join(p.split())) >= PARAGRAPH_CHARS}


def test_no_paragraph_is_in_two_splits(documents):
    seen = {split: set() for split in SPLITS}
    for document in documents:
        seen[split_of(document.package)] |= paragraphs(document.text)
    assert all(seen.values())
    assert not seen["train"] & (seen["test"] | seen["valid"])
    assert not seen["valid"] & seen["test"]


def test_a_repeated_paragraph_is_kept_once():
    shared = "This licence text stands in many packages, word for word, and must not be in two splits.\n" * 5
    own = [f"Paragraph of package {i}: " + "nothing else in the world says this.\n" * 20 for i in range(3)]
    kept = list(without_repeats(Document(f"p{i}", "prose", f"{own[i]}\n\n{shared}") for i in range(3)))
    assert [shared.strip() in d.text for d in kept] == [True, False, False]
    assert all(own[i].strip() in kept[i].text for i in range(3))


def test_collect_gives_the_same_for_any_number_of_workers(root, documents):
    assert collect({"site": root}, workers=2) == documents
    assert {d.kind for d in documents} == {"code", "prose"}


def test_collect_stops_at_its_size(root, documents):
    few = collect({"site": root}, max_chars=20_000)
    assert 0 < len(few) < len(documents)
    assert few == documents[: len(few)] or {d.package for d in few} <= {d.package for d in documents}


def test_splits_follow_their_shares():
    names = [f"site/{i}" for i in range(4000)]
    for split, share in SPLITS.items():
        found = sum(split_of(name) == split for name in names) / len(names)
        assert abs(found - share / sum(SPLITS.values())) < 0.03


def test_long_docstrings_leave_the_code(tmp_path):
    docstring = "\n    ".join(["Explains the thing."] + ["A line with words that explain the thing further."] * 12)
    file = tmp_path / "a.py"
    body = "\n".join(f"    value_{i} = compute(value, {i})" for i in range(30))
    file.write_text(f'def f(value):\n    """{docstring}"""\n{body}\n')
    code, prose = read_documents(("site/a", str(file)))
    assert "explain the thing further" not in code.text
    assert "compute(value, 3)" in code.text
    assert prose.text.startswith("Explains the thing.\nA line with words")


def test_other_files(tmp_path):
    text = "Words that make a text which is long enough to be kept here.\n" * 20
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe" + bytes(2000))
    (tmp_path / "c.txt").write_text("0.123 4.567 8.901\n" * 100)
    (tmp_path / "d.gz").write_bytes(b"no gzip at all")
    found = {name: read_documents(("doc/x", str(tmp_path / name))) for name in ("a.txt.gz", "b.txt", "c.txt", "d.gz")}
    assert found.pop("a.txt.gz")[0].text == text
    assert found == {"b.txt": [], "c.txt": [], "d.gz": []}


def test_corpora_hold_the_documents_and_their_line_ends(documents):
    newline = np.array([ord("\n")])
    corpora = build_corpora(documents, lambda texts: [list(text.encode()) for text in texts], newline)
    corpus = corpora["prose", "train"]
    joined = "".join("\n\n" + d.text for d in documents if d.kind == "prose" and split_of(d.package) == "train")
    assert bytes(corpus.tokens.astype(np.uint8).tolist()).decode() == joined
    assert np.array_equal(corpus.breaks, np.flatnonzero(corpus.tokens == ord("\n")))
    assert len(corpus.starts) == sum(d.kind == "prose" and split_of(d.package) == "train" for d in documents)


def test_window_starts_at_a_line_end_and_wraps():
    corpus = Corpus(np.arange(50, dtype=np.int32), np.array([10, 40]), np.array([0]))
    for seed in range(4):
        tokens, breaks = corpus.window(np.random.default_rng(seed), 30)
        assert tokens[0] in (10, 40)
        assert np.array_equal(tokens, (tokens[0] + np.arange(30)) % 50)
        assert np.array_equal(tokens[breaks], [b for b in (10, 40) if b in tokens] if tokens[0] == 10 else [40, 10])


def test_an_empty_corpus_is_refused():
    empty = Corpus(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="at least one line"):
        empty.window(np.random.default_rng(0), 3)


def test_encoded_text_survives_a_file(tmp_path):
    corpus = Corpus(np.arange(9, dtype=np.int32), np.array([0, 4]), np.array([0, 5]))
    corpora = {(kind, split): corpus for kind in ("code", "prose") for split in SPLITS}
    save_corpora(tmp_path / "new" / "text.npz", corpora, {"text_chars": 7, "probe": [1, 2]})
    found = load_corpora(tmp_path / "new" / "text.npz", {"text_chars": 7, "probe": [1, 2]})
    assert found.keys() == corpora.keys()
    assert np.array_equal(found["prose", "test"].tokens, corpus.tokens)
    assert np.array_equal(found["code", "train"].breaks, corpus.breaks)
    (tmp_path / "bad").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="expected a file of save_corpora"):
        load_corpora(tmp_path / "bad", {})


def test_encoded_text_belongs_to_its_tokenizer_and_size(root, tmp_path, monkeypatch):
    monkeypatch.setattr("cuda_reference.data_text.default_roots", lambda: {"site": root})
    cache, writer = tmp_path / "text.npz", Writer(byte_tokenizer())
    first = make_corpora(writer, 20_000, cache=cache)
    again = make_corpora(writer, 20_000, cache=cache)
    assert all(np.array_equal(first[key].tokens, again[key].tokens) for key in first)
    with pytest.raises(ValueError, match=r"with \{'text_chars': 30000\}, got .* with \{'text_chars': 20000\}; delete"):
        make_corpora(writer, 30_000, cache=cache)
    writer.tokenizer.add_tokens(["function"])
    with pytest.raises(ValueError, match=r"with \{'vocabulary': 259\}, got .* with \{'vocabulary': 258\}"):
        make_corpora(writer, 20_000, cache=cache)
    with np.load(cache) as arrays:
        old = {name: arrays[name] for name in arrays if name != "settings"}
    np.savez(cache, **old)
    with pytest.raises(ValueError, match=r"'text_chars': 'not noted'.*delete the file"):
        make_corpora(writer, 20_000, cache=cache)
