"""Text that any machine with Python has: code, documentation and prose, split so that no paragraph is in two splits.

Sources: the standard library and the installed packages (their code; their long docstrings, read-me and text files as
prose), and the documentation under /usr/share. Nothing is downloaded and no text is written anywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("code", "prose")
SPLITS = {"train": 16, "valid": 1, "test": 3}  # shares, in twentieths, of the packages
PROSE_SUFFIXES = (".rst", ".md", ".txt", ".pod", ".html", ".gz")
LARGEST_FILE_BYTES, SMALLEST_TEXT_CHARS = 400_000, 400
SETTINGS = "settings"  # the array of a file of encoded text that tells what it was encoded with
PARAGRAPH_CHARS = 80  # shorter paragraphs (an import line, a heading) may repeat

_DOCSTRING = re.compile(r'("""|\'\'\')(.+?)\1', re.DOTALL)
_TAG = re.compile(r"<(script|style).*?</\1>|<[^>]+>", re.DOTALL)
_BLANK = re.compile(r"\n\s*\n+")


@dataclass(frozen=True)
class Document:
    """One text.

    Args:
        package: What it belongs to; all texts of a package are in one split.
        kind: One of `KINDS`.
        text: The text.
    """

    package: str
    kind: str
    text: str


def stable_hash(text: str) -> int:
    """The same 64-bit number for the same text on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def digest(*parts: bytes | np.ndarray) -> str:
    """A short hash of some data, the same on every machine."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return found.hexdigest()


def split_of(package: str) -> str:
    """The split that a package belongs to, by a hash of its name."""
    ticket = stable_hash(package) % sum(SPLITS.values())
    for split, share in SPLITS.items():
        if ticket < share:
            return split
        ticket -= share
    raise AssertionError("unreachable: the shares cover every ticket")


def default_roots() -> dict[str, Path]:
    """Folders that are read, by name; those that do not exist are left out."""
    paths = sysconfig.get_paths()
    roots = {"stdlib": Path(paths["stdlib"]), "site": Path(paths["purelib"])}
    roots |= {name: Path("/usr/share") / name for name in ("doc", "common-licenses", "perl", "perl5")}
    return {name: root for name, root in roots.items() if root.is_dir()}


def _files(name: str, root: Path) -> Iterator[tuple[str, str]]:
    """(package, path) of every file of one root that may hold text, in a fixed order."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in ("__pycache__", "site-packages", "test", "tests"))
        for file in sorted(files):
            path = os.path.join(folder, file)
            suffix = os.path.splitext(file)[1]
            if suffix == ".py" or suffix in PROSE_SUFFIXES or name == "common-licenses" or file == "METADATA":
                top = os.path.relpath(path, root).split(os.sep)[0]
                yield f"{name}/{top.split('-')[0].removesuffix('.py').lower()}", path


def _read(path: str) -> str:
    """Text of one file, "" for what is too large, unreadable or no text."""
    try:
        if os.path.getsize(path) > LARGEST_FILE_BYTES or os.path.islink(path):
            return ""
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rb") as file:
            text = file.read(LARGEST_FILE_BYTES).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
    return _TAG.sub("", text) if path.endswith(".html") else text


def _is_text(text: str) -> bool:
    """Whether `text` reads like something written: not a table of numbers, not minified."""
    lines = text.count("\n") + 1
    letters = sum(map(str.isalpha, text[:4000]))
    return len(text) >= SMALLEST_TEXT_CHARS and len(text) / lines < 200 and letters > 0.4 * min(len(text), 4000)


def read_documents(entry: tuple[str, str]) -> list[Document]:
    """The documents in one (package, path): a Python file gives its code and, apart from it, its long docstrings."""
    package, path = entry
    text = _read(path)
    if not path.endswith(".py"):
        found = [Document(package, "prose", text)]
    else:
        long = [part for _, part in _DOCSTRING.findall(text) if len(part) >= SMALLEST_TEXT_CHARS]
        for part in long:
            text = text.replace(part, "...")
        prose = "\n\n".join(_dedent(part) for part in long)
        found = [Document(package, "code", text), Document(package, "prose", prose)]
    return [document for document in found if _is_text(document.text)]


def _dedent(docstring: str) -> str:
    """A docstring without its indentation (its first line has none)."""
    lines = docstring.strip("\n").split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()), default=0)
    return "\n".join([lines[0].strip(), *(line[margin:].rstrip() for line in lines[1:])])


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop every paragraph that an earlier document had, whatever its split; short paragraphs may repeat."""
    seen: set[int] = set()
    for document in documents:
        kept = []
        for paragraph in _BLANK.split(document.text):
            plain = " ".join(paragraph.split())
            if len(plain) >= PARAGRAPH_CHARS:
                key = stable_hash(plain)
                if key in seen:
                    continue
                seen.add(key)
            kept.append(paragraph.rstrip())
        text = "\n\n".join(kept).strip("\n")
        if _is_text(text):
            yield Document(document.package, document.kind, text)


def collect(roots: dict[str, Path] | None = None, max_chars: int = 40_000_000, workers: int = 0) -> list[Document]:
    """Read the documents of `roots`: the same list for the same files, whatever `workers` is.

    Packages are taken in the order of a hash, files in that of their paths, until `max_chars` of each kind are found;
    no package gives more than a twentieth of them.

    Args:
        roots: Name to folder; None takes `default_roots()`.
        max_chars: Characters of each kind to keep.
        workers: Processes that read; 0 reads in this one.
    """
    roots = default_roots() if roots is None else roots
    entries = [entry for name, root in roots.items() for entry in _files(name, root)]
    entries.sort(key=lambda entry: (stable_hash(entry[0]), entry[1]))
    left = dict.fromkeys(KINDS, max_chars)
    of_package: Counter[tuple[str, str]] = Counter()
    documents = []
    for document in without_repeats(_read_all(entries, workers)):
        key = (document.package, document.kind)
        if left[document.kind] > 0 and of_package[key] < max_chars / sum(SPLITS.values()):
            left[document.kind] -= len(document.text)
            of_package[key] += len(document.text)
            documents.append(document)
        if max(left.values()) <= 0:
            break
    return documents


def _read_all(entries: list[tuple[str, str]], workers: int) -> Iterator[Document]:
    """The documents of all entries, in their order."""
    if workers == 0:
        for entry in entries:
            yield from read_documents(entry)
        return
    pool = ProcessPoolExecutor(workers)
    try:
        for first in range(0, len(entries), 4096):
            for found in pool.map(read_documents, entries[first : first + 4096], chunksize=32):
                yield from found
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Corpus:
    """Tokens of all documents of one kind and one split, joined.

    Args:
        tokens: int32 `[total]`.
        breaks: int64, ascending: positions of tokens that begin with a line end; something may be inserted before them.
        starts: int64, ascending: positions where documents start.
    """

    tokens: np.ndarray
    breaks: np.ndarray
    starts: np.ndarray

    def window(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens from a random line end on, wrapping at the end: (tokens, breaks in them).

        Raises:
            ValueError: The corpus is empty.
        """
        if not len(self.breaks):
            raise ValueError("[Corpus.window] expected a corpus with at least one line, got an empty one.")
        first = int(self.breaks[rng.integers(len(self.breaks))])
        tokens = np.take(self.tokens, np.arange(first, first + count), mode="wrap")
        breaks, size = self.breaks, len(self.tokens)
        if first + count > size:
            breaks = np.concatenate([breaks + lap * size for lap in range(2 + count // size)])
        low, high = np.searchsorted(breaks, (first, first + count))
        return tokens, breaks[low:high] - first


def build_corpora(
    documents: Sequence[Document], encode_batch: Callable[[list[str]], list[list[int]]], newline_ids: np.ndarray
) -> dict[tuple[str, str], Corpus]:
    """Encode documents: (kind, split) to `Corpus`.

    Args:
        documents: From `collect`.
        encode_batch: Texts to token ids, without special tokens.
        newline_ids: Token ids whose text begins with a line end.
    """
    parts: dict[tuple[str, str], list[np.ndarray]] = {(kind, split): [] for kind in KINDS for split in SPLITS}
    for first in range(0, len(documents), 512):
        batch = documents[first : first + 512]
        for document, ids in zip(batch, encode_batch(["\n\n" + d.text for d in batch]), strict=True):
            parts[document.kind, split_of(document.package)].append(np.asarray(ids, np.int32))
    return {key: _join(arrays, newline_ids) for key, arrays in parts.items()}


def _join(arrays: list[np.ndarray], newline_ids: np.ndarray) -> Corpus:
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    starts = np.cumsum([0, *(len(a) for a in arrays)])[:-1].astype(np.int64)
    return Corpus(tokens, np.flatnonzero(np.isin(tokens, newline_ids)), starts)


def save_corpora(path: Path, corpora: dict[tuple[str, str], Corpus], settings: Mapping[str, Any]) -> None:
    """Write encoded text as one .npz file, whole or not at all; `settings`, JSON, tell what it was encoded with."""
    arrays = {f"{kind}/{split}/{f.name}": getattr(c, f.name) for (kind, split), c in corpora.items() for f in fields(c)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        np.savez(file, **arrays, **{SETTINGS: json.dumps(settings)})
    os.replace(part, path)


def load_corpora(path: Path, settings: Mapping[str, Any]) -> dict[tuple[str, str], Corpus]:
    """Inverse of `save_corpora`.

    Raises:
        ValueError: Not such a file, or one of other settings.
    """
    try:
        with np.load(path) as arrays:
            found = json.loads(str(arrays[SETTINGS])) if SETTINGS in arrays else {}
            corpora = {
                (kind, split): Corpus(*(arrays[f"{kind}/{split}/{f.name}"] for f in fields(Corpus)))
                for kind in KINDS
                for split in SPLITS
            }
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"[load_corpora] expected a file of save_corpora, got {path}: {error}") from None
    ours = {name: value for name, value in settings.items() if found.get(name) != value}
    if ours:
        theirs = {name: found.get(name, "not noted") for name in ours}
        raise ValueError(
            f"[load_corpora] expected text encoded with {ours}, got {path} with {theirs}; delete the file, or name "
            "another."
        )
    return corpora
