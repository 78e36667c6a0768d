"""SHA-256 of files and of tensors: one changed byte anywhere is seen.

A stamped safetensors file knows its own: the metadata holds the digest of the whole file, taken with zeros in the
digest's own place. Other readers see a plain safetensors file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

BLANK = {"flux_file_sha256": "0" * 64, "flux_stamped": "yes"}
"""Metadata to write a file with, before `stamp`."""

MAX_HEADER_BYTES = 16 << 20
_PLACE = re.compile(rb'"(?:0\.)?flux_file_sha256":"([0-9a-f]{64})"')
_SIGNS = (b"flux_file_sha256", b"flux_stamped")


def digest_tensors(tensors: Mapping[str, mx.array]) -> str:
    """SHA-256 over names, shapes, dtypes and every byte of tensors; their order does not count.

    A core takes a tensor each, and reads it where it lies: nothing is copied if the tensor is contiguous in memory.
    """
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = [pool.submit(hashlib.sha256, _bytes(tensors[name])) for name in names]
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        value = tensors[name]
        total.update(f"{name} {list(value.shape)} {value.dtype} {digest.result().hexdigest()}\n".encode())
    return total.hexdigest()


def _bytes(value: mx.array) -> memoryview:
    """The bytes of an array, row by row."""
    return memoryview(mx.contiguous(value).reshape(-1).view(mx.uint8))


def stamp(path: Path) -> None:
    """Put the digest into a file that was written with `BLANK` in its metadata."""
    digest, place = _digest(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def is_stamped(path: Path) -> bool:
    """Whether a file has a stamp, be the file damaged. Without one, `check_stamp` has nothing to say of it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    return any(sign in start for sign in _SIGNS)


def check_stamp(path: Path) -> None:
    """Compare a stamped file with its stamp.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No whole stamp, or a byte has changed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"[check_stamp] no such file: {path}")
    digest, place = _digest(path)
    stored = _header(path)[place : place + 64].decode()
    if digest != stored:
        raise ValueError(f"[check_stamp] {path} was changed: expected SHA-256 {stored}, got {digest}.")


def _header(path: Path) -> bytes:
    """Length field and header of a safetensors file."""
    with path.open("rb") as file:
        field = file.read(8)
        length = int.from_bytes(field, "little")
        if len(field) < 8 or length > min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError(f"[check_stamp] {path} is no whole safetensors file.")
        return field + file.read(length)


def _digest(path: Path) -> tuple[str, int]:
    """SHA-256 of a file with zeros in the digest's place, and that place in bytes."""
    header = _header(path)
    places = list(_PLACE.finditer(header))
    if len(places) != 1:
        raise ValueError(f"[check_stamp] {path} has no fingerprint: expected a file saved by flux_mlx.")
    start, stop = places[0].span(1)
    digest = hashlib.sha256(header[:start] + BLANK["flux_file_sha256"].encode() + header[stop:])
    with path.open("rb") as file:
        file.seek(len(header))
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest(), start
