"""The CUDA kernels and how they are launched: compiled ones from `data/cuda/manifest.json`, decode from source.

Prefill is Triton's, compiled by `cuda_reference.export_ptx`; decode is CUDA C++ that MLX compiles on first use, because
only such kernels are told the strides of a cache. Nothing here needs MLX or a GPU.
"""

from __future__ import annotations

import json
import lzma
import struct
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from flux_mlx.spec import PatternConfig

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
DECODE_TOKENS = 8  # longest call that is decoded
MAX_SPLITS = 128  # kMaxSplits of decode.cuh
LOG2_E = 1.4426950408889634

_TILE_TOKENS = 128  # rows and keys of the Hopper kernel's tiles
_SPLIT_KEYS = 32  # keys that a decode block of head dim 128 takes at once
_DECODE_THREADS = 128
_WANTED_SPLITS = 64  # at most
_MAX_ROWS = 8  # of a decode block
_BLOCKS_PER_MULTIPROCESSOR = 2
_INT32_LIMIT = 1 << 31

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """What launches depend on.

    Args:
        major, minor: Compute capability.
        multiprocessors: Their number.
        l2_bytes: Size of the L2 cache.
    """

    major: int
    minor: int
    multiprocessors: int
    l2_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: a record of the manifest.

    Args:
        name: Name of the entry, and of the file.
        family: "hopper" or "portable".
        dtype: Of q, k, v and out.
        head_dim: D.
        block_size: The pattern's block size has to be this one; 0: any multiple of 128.
        suffix: "cubin" (machine code of one architecture) or "ptx".
        architecture: That of the machine code; of PTX the oldest that takes it.
        inputs, outputs: Pointer parameters in order; the output "scratch" is there if `scratch_bytes` is not 0.
        scalars: (name, "int32" or "float32") of the parameters behind them, in order.
        rows: Query rows of a tile.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
        scratch_bytes: Global scratch of a block.
    """

    name: str
    family: str
    dtype: str
    head_dim: int
    block_size: int
    suffix: str
    architecture: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scalars: tuple[tuple[str, str], ...]
    rows: int
    threads: int
    shared_bytes: int
    scratch_bytes: int

    def runs_on(self, device: Device) -> bool:
        """Whether `device` can load it: machine code needs its own architecture, PTX at least its own."""
        own = (int(self.architecture[3]), int(self.architecture[4]))
        return (device.major, device.minor) == own if self.suffix == "cubin" else (device.major, device.minor) >= own

    def takes(self, block_size: int) -> bool:
        """Whether it computes patterns of this block size."""
        return block_size == self.block_size if self.block_size else block_size % _TILE_TOKENS == 0


@dataclass(frozen=True)
class Source:
    """A kernel that MLX compiles: its body is `data/cuda/<name>.cu`, its functions are in `decode.cuh`."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def header(self) -> str:
        """CUDA text of the functions."""
        return _data("decode.cuh").decode()

    def body(self) -> str:
        """CUDA text of the kernel's body."""
        return _data(f"{self.name}.cu").decode()


@dataclass(frozen=True)
class Launch:
    """One launch, but for its input arrays.

    Args:
        kernel: What is launched.
        blocks: Blocks along x, y, z.
        threads: Of a block.
        output_shapes, output_dtypes: In the kernel's order.
        arguments: (name, value): the scalars of a compiled kernel; the template arguments of a source one, where a
            string is a dtype's name.
    """

    kernel: Compiled | Source
    blocks: tuple[int, int, int]
    threads: int
    output_shapes: tuple[Shape, ...]
    output_dtypes: tuple[str, ...]
    arguments: tuple[tuple[str, Any], ...]


DECODE_SPLIT = Source("decode_split", ("q", "k", "v", "route"), ("pieces", "stats"))
DECODE_MERGE = Source("decode_merge", ("pieces", "stats"), ("out", "lse"))


def _data(name: str) -> bytes:
    return (resources.files("flux_mlx") / "data" / "cuda" / name).read_bytes()


@cache
def compiled_kernels() -> tuple[Compiled, ...]:
    """All of the manifest."""
    records = json.loads(_data("manifest.json"))["kernels"]
    fields = Compiled.__dataclass_fields__
    as_tuples = [{name: _frozen(value) for name, value in record.items() if name in fields} for record in records]
    return tuple(Compiled(**record) for record in as_tuples)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


@cache
def code(kernel: Compiled) -> bytes:
    """Its machine code or PTX."""
    return lzma.decompress(_data(f"{kernel.name}.{kernel.suffix}.xz"))


@lru_cache
def find(dtype: str, head_dim: int, block_size: int, device: Device, family: str | None = None) -> Compiled | None:
    """The first compiled kernel (of `family`, if named) that can compute such a call on `device`; None if none can."""
    for kernel in compiled_kernels():
        fits = kernel.dtype == dtype and kernel.head_dim == head_dim and kernel.takes(block_size)
        if fits and kernel.runs_on(device) and family in (None, kernel.family):
            return kernel
    return None


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def as_float32(value: float) -> float:
    """The nearest value that float32 holds: MLX takes no other float as a scalar."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def as_int32(value: int) -> int:
    """`value`.

    Raises:
        ValueError: int32 does not hold it: MLX takes no other int as a scalar.
    """
    if not -_INT32_LIMIT <= value < _INT32_LIMIT:
        raise ValueError(f"[cuda_catalog] expected a scalar that int32 holds, got {value}.")
    return value


_SCALARS = {"int32": as_int32, "float32": as_float32}


def fits_int32(q: Shape, k: Shape) -> bool:
    """Whether the strides of the portable kernel, which are int32, can hold these shapes."""
    (B, HQ, L, D), (_, HKV, capacity, _) = q, k
    per_row = max(HQ * L, HKV * capacity) if B > 1 else capacity
    return per_row * D < _INT32_LIMIT


def _section(device: Device, q: Shape, k: Shape, live_tokens: int) -> int:
    """Query heads whose live keys and values fit in three quarters of the L2 cache together; whole KV heads."""
    kv_heads = k[0] * k[1]
    fit = max(1, device.l2_bytes * 3 // 4 // (live_tokens * k[3] * 4))
    return _ceil_div(kv_heads, _ceil_div(kv_heads, fit)) * (q[1] // k[1])


def prefill(
    kernel: Compiled, device: Device, q: Shape, k: Shape, kv_tokens: int, pattern: PatternConfig, scale: float, *,
    may_be_full: bool,
) -> Launch:  # fmt: skip
    """Launch of a compiled kernel.

    Args:
        q: `[B, HQ, L, D]`; the kernel reads q and writes out as dense `[B, L, HQ, D]`.
        k: `[B, HKV, capacity, D]`.
        kv_tokens: S.
        pattern: Sink and window of SPARSE rows.
        may_be_full: Whether a row's route may be other than SPARSE.
    """
    (B, HQ, L, D), (HKV, capacity) = q, k[1:3]
    live = kv_tokens if may_be_full else min(kv_tokens, pattern.window_span + pattern.sink_span)
    values = {
        "B": B, "HQ": HQ, "HKV": HKV, "L": L, "S": kv_tokens, "capacity": capacity, "GROUP": HQ // HKV,
        "section": _section(device, q, k, live), "block_size": pattern.block_size,
        "window_blocks": pattern.window_blocks, "sink_span": pattern.sink_span, "qk_scale": scale * LOG2_E,
        "q_b": L * HQ * D if B > 1 else 0, "q_h": D, "q_t": HQ * D,
        "k_b": HKV * capacity * D if B > 1 else 0, "k_h": capacity * D, "k_t": D,
    }  # fmt: skip
    if kernel.family == "hopper":
        row_tiles = _ceil_div(kv_tokens, _TILE_TOKENS) - (kv_tokens - L) // _TILE_TOKENS
        blocks = (min(device.multiprocessors, row_tiles * B * HQ), 1, 1)
    else:
        blocks = (B * HQ, _ceil_div(L, kernel.rows), 1)
    shapes = {"out": (B, L, HQ, D), "lse": (B, HQ, L), "scratch": (blocks[0] * kernel.scratch_bytes // 4,)}
    dtypes = {"out": kernel.dtype, "lse": "float32", "scratch": "uint32"}
    return Launch(
        kernel,
        blocks,
        kernel.threads,
        tuple(shapes[name] for name in kernel.outputs),
        tuple(dtypes[name] for name in kernel.outputs),
        tuple((name, _SCALARS[kind](values[name])) for name, kind in kernel.scalars),
    )


@lru_cache
def decode_splits(device: Device, q: Shape, kv_heads: int, visible_tokens: int) -> int:
    """Pieces that the visible keys of a decode call are cut into: two blocks a multiprocessor, at least a step each."""
    B, HQ, L, D = q
    rows = HQ // kv_heads * L
    blocks = B * kv_heads * _ceil_div(rows, decode_rows(rows))
    wanted = max(1, min(_WANTED_SPLITS, _BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors // blocks))
    step = _SPLIT_KEYS * 128 // D
    piece = _ceil_div(_ceil_div(visible_tokens, wanted), step) * step
    return _ceil_div(visible_tokens, piece)


def decode_rows(query_rows: int) -> int:
    """Rows of a decode block: the next power of two, 8 at most."""
    return min(_MAX_ROWS, 1 << (query_rows - 1).bit_length())


@lru_cache
def decode(
    q: Shape, kv_heads: int, dtype: str, pattern: PatternConfig, scale: float, splits: int
) -> tuple[Launch, Launch]:
    """Launches of split and merge; q as in `prefill`. The same at every length of the cache."""
    B, HQ, L, D = q
    rows = decode_rows(HQ // kv_heads * L)
    (scale_bits,) = struct.unpack("<i", struct.pack("<f", scale))
    sizes = {"D": D, "ROWS": rows, "BLOCK": pattern.block_size, "SINK": pattern.sink_span}
    sizes |= {"WINDOW": pattern.window_blocks, "SCALE_BITS": scale_bits}
    blocks = (kv_heads * _ceil_div(HQ // kv_heads * L, rows), B, splits)
    pieces = ((B, HQ, L, splits, D), (B, HQ, L, splits, 2))
    dtypes = ("float32", "float32")
    split = Launch(DECODE_SPLIT, blocks, _DECODE_THREADS, pieces, dtypes, (("T", dtype), *sizes.items()))
    outputs = ((B, L, HQ, D), (B, HQ, L)), (dtype, "float32")
    return split, Launch(DECODE_MERGE, (B * HQ * L, 1, 1), D, *outputs, (("T", dtype), ("D", D)))
