"""Read GGUF files: metadata, tensor directory, tensors as float32. Every length is checked before it is used.

The numbers of the format and the dequantisers are those of the `gguf` package. Its `GGUFReader` is not used: it makes
two arrays for each string and an array for each number, so that one changed length costs it gigabytes.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

MAGIC = gguf.GGUF_MAGIC.to_bytes(4, "little")
VERSIONS = (2, 3)
MAX_ARRAY_ITEMS = 1 << 22  # vocabularies have up to 2**18 tokens, merge lists up to 2**20
MAX_STRING_BYTES = 1 << 24
MAX_DIMS = 4

_Value = gguf.GGUFValueType
_SCALARS = {
    _Value.UINT8: "u1", _Value.INT8: "i1", _Value.UINT16: "<u2", _Value.INT16: "<i2", _Value.UINT32: "<u4",
    _Value.INT32: "<i4", _Value.UINT64: "<u8", _Value.INT64: "<i8", _Value.FLOAT32: "<f4", _Value.FLOAT64: "<f8",
    _Value.BOOL: "?",
}  # fmt: skip
_SMALLEST_KEY_BYTES = 8 + 4 + 1  # length of the name, type, one byte of value
_SMALLEST_TENSOR_BYTES = 8 + 4 + 4 + 8  # length of the name, number of axes, type, offset


class GGUFError(ValueError):
    """A GGUF file that is damaged, or that holds what flux_mlx does not read. The message names file and reason."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Args:
        name: GGUF name, as "blk.0.attn_q.weight".
        quant_type: Storage type.
        shape: Sizes, slowest axis first (the file stores them the other way round).
        start: Byte position in the file.
        size_bytes: Stored size.
    """

    name: str
    quant_type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class _Cursor:
    """Reads forward through the bytes of a file and never past their end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.left():
            raise GGUFError(f"{what} needs {count} bytes at byte {self.position}, but {self.left()} are left")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        count = self.number("<Q", what)
        if count > MAX_STRING_BYTES:
            raise GGUFError(f"{what} claims {count} bytes, more than {MAX_STRING_BYTES}")
        try:
            return self.take(count, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"{what} is not UTF-8: {error.reason}") from None

    def count(self, smallest_bytes: int, what: str) -> int:
        """Read a count of things of at least `smallest_bytes` each."""
        count = self.number("<Q", what)
        if count > self.left() // smallest_bytes:
            raise GGUFError(f"{count} {what} claimed, but {self.left()} bytes are left in the file")
        return count


def _read_value(cursor: _Cursor, code: int, key: str) -> Any:
    """One metadata value: number, bool, string, list of strings, or numpy array of numbers."""
    if code == _Value.STRING:
        return cursor.string(key)
    if code == _Value.ARRAY:
        return _read_array(cursor, key)
    if code not in _SCALARS:
        raise GGUFError(f"{key} has value type {code}, which GGUF does not define")
    dtype = np.dtype(_SCALARS[_Value(code)])
    return np.frombuffer(cursor.take(dtype.itemsize, key), dtype)[0].item()


def _read_array(cursor: _Cursor, key: str) -> Any:
    code = cursor.number("<I", key)
    if code != _Value.STRING and code not in _SCALARS:
        raise GGUFError(f"{key} is an array of value type {code}; expected strings or numbers")
    dtype = None if code == _Value.STRING else np.dtype(_SCALARS[_Value(code)])
    count = cursor.count(dtype.itemsize if dtype else 8, f"items of {key}")
    if count > MAX_ARRAY_ITEMS:
        raise GGUFError(f"{key} claims {count} items, more than {MAX_ARRAY_ITEMS}")
    if dtype is None:
        return [cursor.string(key) for _ in range(count)]
    return np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"name of metadata key {index}")
        if key in metadata:
            raise GGUFError(f"metadata key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, cursor.number("<I", key), key)
    return metadata


def _read_tensor_info(cursor: _Cursor, index: int) -> TensorInfo:
    """One entry of the tensor directory; `start` is still relative to the data section."""
    name = cursor.string(f"name of tensor {index}")
    dims = cursor.number("<I", name)
    if not 1 <= dims <= MAX_DIMS:
        raise GGUFError(f"tensor {name!r} has {dims} axes; expected 1 to {MAX_DIMS}")
    shape = tuple(cursor.number("<Q", name) for _ in range(dims))[::-1]
    code, start = cursor.number("<I", name), cursor.number("<Q", name)
    try:
        quant_type = gguf.GGMLQuantizationType(code)
    except ValueError:
        raise GGUFError(f"tensor {name!r} has type {code}, which the gguf package does not know") from None
    block_items, block_bytes = gguf.GGML_QUANT_SIZES[quant_type]
    items = 1
    for size in shape:
        items *= size
    if items == 0 or shape[-1] % block_items:
        raise GGUFError(f"tensor {name!r} of type {quant_type.name} has shape {list(shape)}: no rows of whole blocks")
    return TensorInfo(name, quant_type, shape, start, items // block_items * block_bytes)


def _read_directory(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
    """The tensor directory, with absolute positions; extents lie in the file and do not overlap."""
    found = [_read_tensor_info(cursor, index) for index in range(count)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise GGUFError(f"general.alignment must be a power of two, got {alignment!r}")
    base = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end = base
    for info in sorted(found, key=lambda info: info.start):
        start = base + info.start
        if info.name in tensors:
            raise GGUFError(f"tensor {info.name!r} occurs twice")
        if info.start % alignment or start < end:
            raise GGUFError(f"tensor {info.name!r} starts at {info.start}, inside another tensor or unaligned")
        end = start + info.size_bytes
        if end > len(cursor.data):
            raise GGUFError(f"tensor {info.name!r} ends at byte {end}, but the file has {len(cursor.data)}: truncated?")
        tensors[info.name] = TensorInfo(info.name, info.quant_type, info.shape, start, info.size_bytes)
    return tensors


class GGUFFile:
    """A GGUF file, version 2 or 3, little endian. The header is read at once, tensors when asked for.

    Args:
        path: The file.

    Attributes:
        metadata: Key to number, bool, string, list of strings, or numpy array of numbers.
        tensors: GGUF name to `TensorInfo`.

    Raises:
        FileNotFoundError: There is no such file.
        GGUFError: The file is truncated or damaged, or has tensors of a type that `gguf` cannot dequantise.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"[gguf] no such file: {self.path}")
        with open(self.path, "rb") as file:
            if self.path.stat().st_size < 24:
                raise GGUFError(f"[gguf] {self.path}: shorter than the 24 bytes of a GGUF header")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header()
        except GGUFError as error:
            raise GGUFError(f"[gguf] {self.path}: {error}") from None

    def _read_header(self) -> None:
        cursor = _Cursor(self._data)
        magic = cursor.take(4, "magic")
        if magic != MAGIC:
            raise GGUFError(f"expected a file that starts with {MAGIC!r}, got {magic!r}")
        version = cursor.number("<I", "version")
        if version not in VERSIONS:
            raise GGUFError(f"expected little-endian GGUF of version 2 or 3, got version {version}")
        tensor_count = cursor.count(_SMALLEST_TENSOR_BYTES, "tensors")
        key_count = cursor.count(_SMALLEST_KEY_BYTES, "metadata keys")
        self.metadata = _read_metadata(cursor, key_count)
        self.tensors = _read_directory(cursor, tensor_count, self.metadata)
        for info in {info.quant_type: info for info in self.tensors.values()}.values():
            self._dequantize(info, np.zeros((1, gguf.GGML_QUANT_SIZES[info.quant_type][1]), np.uint8))

    @staticmethod
    def _dequantize(info: TensorInfo, data: np.ndarray) -> np.ndarray:
        try:
            with np.errstate(all="ignore"):  # values that are not finite are reported by `tensor`
                return gguf.dequantize(data, info.quant_type)
        except NotImplementedError:
            raise GGUFError(
                f"tensor {info.name!r} has type {info.quant_type.name}, which gguf cannot dequantise"
            ) from None

    def tensor(self, name: str) -> np.ndarray:
        """Tensor `name`, dequantised: float32, `tensors[name].shape`.

        Raises:
            GGUFError: No such tensor, or values that are not finite.
        """
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(f"[gguf] {self.path}: no tensor {name!r}")
        stored = np.frombuffer(self._data, np.uint8, info.size_bytes, info.start)
        rows = stored.reshape(*info.shape[:-1], -1)
        values = self._dequantize(info, rows).reshape(info.shape).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise GGUFError(f"[gguf] {self.path}: tensor {name!r} has values that are not finite")
        return values
