"""The text of benchmark prompts: a file of the user's, or the manual that comes with every Python."""

from __future__ import annotations

import importlib
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

WORDS = re.compile(r"\w+|[^\w\s]|\s+")


def read_text(prompt: str | None) -> tuple[str, str]:
    """(text, what it is).

    Args:
        prompt: Path of a UTF-8 file, "-" for stdin, or None for the manual's topics (`pydoc_data`, 0.5 MB of English).

    Raises:
        FileNotFoundError: No such file, or no manual in this Python.
        ValueError: The text is empty or not UTF-8.
    """
    if prompt is None:
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError:
            raise FileNotFoundError("[read_text] this Python comes without its manual; name a --prompt file.") from None
        return "\n".join(topics.values()), f"topics of the Python {sys.version_info[0]}.{sys.version_info[1]} manual"
    try:
        text = sys.stdin.read() if prompt == "-" else Path(prompt).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[read_text] {prompt} must be UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"[read_text] expected text in {prompt}, got none.")
    return text, "stdin" if prompt == "-" else Path(prompt).name


def word_ids(text: str, vocabulary: int) -> list[int]:
    """Token ids for a model that has no tokenizer: a checksum of every word, mark and gap, below `vocabulary`."""
    return [zlib.crc32(word.encode()) % vocabulary for word in WORDS.findall(text)]


class Prompts:
    """Prompts of any length out of one text, repeated from its start where it is too short.

    Args:
        text: The text.
        encode: From text to token ids.

    Raises:
        ValueError: The text has no token.
    """

    def __init__(self, text: str, encode: Callable[[str], list[int]]):
        self.ids = encode(text)
        if not self.ids:
            raise ValueError("[Prompts] the text has no token.")

    def repeats(self, tokens: int, rows: int = 1) -> float:
        """How often the text is used up by `rows` prompts of `tokens`; above 1 it repeats."""
        return tokens * rows / len(self.ids)

    def prompt(self, tokens: int, row: int = 0) -> list[int]:
        """Token ids of row `row`: each row goes on where the one before it stopped."""
        start = row * tokens % len(self.ids)
        tiled = self.ids[start:] + self.ids * (tokens // len(self.ids) + 1)
        return tiled[:tokens]
