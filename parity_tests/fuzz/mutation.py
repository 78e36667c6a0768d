"""Mutations of bytes, some of which know JSON and binary headers."""

from __future__ import annotations

import random
import re

EDGES = (0, 1, 7, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WORDS = (
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'"x"',
    b"-1",
    b"1e999",
    b"1.5",
    b"0",
    b"NaN",
    b'"\\ud800"',
    b"99999999999",
)
_VALUE = re.compile(rb'-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|true|false|null|"[^"\\]{0,40}"')


def mutate(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    """One to four random changes, most of them in the first `header_bytes`."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(_CHANGES)(data, rng, header_bytes) if data else rng.randbytes(16)
    return data


def _at(data: bytes, rng: random.Random, header_bytes: int) -> int:
    return rng.randrange(min(len(data), header_bytes) if rng.random() < 0.8 else len(data))


def _flip(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    at = _at(data, rng, header_bytes)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _overwrite_integer(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    at, size = _at(data, rng, header_bytes), rng.choice((1, 2, 4, 8))
    value = (rng.choice(EDGES) % (1 << 8 * size)).to_bytes(size, "little")
    return data[:at] + value + data[at + size :]


def _replace_value(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    """A JSON value in place of another, without a change of length if there is room."""
    found = list(_VALUE.finditer(data, 0, header_bytes))
    if not found:
        return _flip(data, rng, header_bytes)
    start, stop = rng.choice(found).span()
    word = rng.choice((*WORDS, str(rng.choice(EDGES)).encode()))
    return data[:start] + (word.ljust(stop - start) if rng.random() < 0.5 else word) + data[stop:]


def _delete(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    at = _at(data, rng, header_bytes)
    return data[:at] + data[at + rng.choice((1, 2, 8, 64)) :]


def _insert(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    at = _at(data, rng, header_bytes)
    return data[:at] + rng.choice((rng.randbytes(rng.choice((1, 8))), rng.choice(WORDS))) + data[at:]


def _repeat(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    at, other = _at(data, rng, header_bytes), _at(data, rng, header_bytes)
    return data[:at] + data[other : other + rng.choice((4, 16, 100))] + data[at:]


def _cut(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    return data[: _at(data, rng, header_bytes)]


_CHANGES = (_flip, _flip, _overwrite_integer, _replace_value, _replace_value, _delete, _insert, _repeat, _cut)
