"""The compiled CUDA kernels in `data/cuda` and how they are launched. Nothing here needs MLX or a GPU.

Prefill is Triton's, compiled by `cuda_reference.export_ptx`; decode and the layer router are CUDA C++, by
`cuda_reference.export_decode` and `cuda_reference.export_router`.
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
DECODE_ROWS = 8  # kRows of decode.cu: query rows of a block
DECODE_SLOTS = 1024  # calls that may be under way at once; MLX's graphs hold a tenth
ROUTER_DTYPES = ("bfloat16", "float16", "float32")  # of the queries that the router pools
ROUTER_UNITS = 16  # kUnits of router.cuh: units of a layer that a block computes
ROUTER_CHANNELS = 256  # largest D; a smaller one has to be a multiple of 4
LOG2_E = 1.4426950408889634

_MANIFESTS = ("manifest.json", "manifest_decode.json", "manifest_router.json")
_OF_PREFILL = ("hopper", "portable")
_TILE_TOKENS = 128  # rows and keys of the Hopper kernel's tiles
_DECODE_KEYS = 144  # keys that a decode block takes at once: 16 a warp
_MAX_SPLITS = 64
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
        family: "hopper" or "portable" prefill, "decode", or a step of the router: "router_pool", "router_encode",
            "router_decide".
        dtype: Of q, k, v and out; of the queries that are pooled.
        head_dim: D; 0: any that the router has.
        block_size: The pattern's block size has to be this one; 0: any multiple of 128; decode takes every one.
        suffix: "cubin" (machine code of one architecture) or "ptx".
        architecture: That of the machine code; of PTX the oldest that takes it.
        inputs, outputs: Pointer parameters in order; the output "scratch" is there if `scratch_bytes` is not 0.
        scalars: (name, "int32" or "float32") of the parameters behind them, in order.
        rows: Query rows of a tile or block; tokens or units of one of the router's.
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
        if self.family == "decode":
            return True
        return block_size == self.block_size if self.block_size else block_size % _TILE_TOKENS == 0


@dataclass(frozen=True)
class Launch:
    """One launch, but for its input arrays and late scalars.

    Args:
        kernel: What is launched.
        blocks: Blocks along x, y, z.
        output_shapes, output_dtypes: In the kernel's order.
        arguments: (name, value) of the first scalars; those behind them, which change from call to call, come late.
    """

    kernel: Compiled
    blocks: tuple[int, int, int]
    output_shapes: tuple[Shape, ...]
    output_dtypes: tuple[str, ...]
    arguments: tuple[tuple[str, int | float], ...]


def _data(name: str) -> bytes:
    return (resources.files("flux_mlx") / "data" / "cuda" / name).read_bytes()


@cache
def compiled_kernels() -> tuple[Compiled, ...]:
    """All of the manifests."""
    records = [record for name in _MANIFESTS for record in json.loads(_data(name))["kernels"]]
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
    """The first kernel of `family` that can compute such a call on `device`; None if none can. None: any of prefill."""
    for kernel in compiled_kernels():
        is_asked = kernel.family == family or (family is None and kernel.family in _OF_PREFILL)
        fits = kernel.dtype == dtype and kernel.head_dim == head_dim and kernel.takes(block_size)
        if is_asked and fits and kernel.runs_on(device):
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
        tuple(shapes[name] for name in kernel.outputs),
        tuple(dtypes[name] for name in kernel.outputs),
        _arguments(kernel, values),
    )


def _arguments(kernel: Compiled, values: dict[str, Any]) -> tuple[tuple[str, int | float], ...]:
    """The kernel's scalars among `values`, in its order, as MLX takes them."""
    return tuple((name, _SCALARS[kind](values[name])) for name, kind in kernel.scalars if name in values)


def decode_groups(q: Shape, kv_heads: int) -> int:
    """Groups of up to 8 query rows that share a KV head; each takes tickets of its own."""
    B, HQ, L, _ = q
    return B * kv_heads * _ceil_div(HQ // kv_heads * L, DECODE_ROWS)


def decode_splits(device: Device, groups: int, visible_tokens: int) -> int:
    """Pieces of the visible keys: a block a multiprocessor, but none takes less than its warps do at once."""
    return min(_MAX_SPLITS, max(1, device.multiprocessors // groups), _ceil_div(visible_tokens, _DECODE_KEYS))


@lru_cache
def decode(
    kernel: Compiled, device: Device, q: Shape, k: Shape, pattern: PatternConfig, scale: float, visible_tokens: int,
    route_of_all: int,
) -> Launch:  # fmt: skip
    """Launch of the decode kernel; `kv_tokens` and `slot` are its late scalars.

    Args:
        q: `[B, HQ, L, D]`; the kernel reads q and writes out as dense `[B, L, HQ, D]`.
        k: `[B, HKV, capacity, D]`.
        pattern: Sink and window of SPARSE rows.
        visible_tokens: Keys that the queries of a row see at most.
        route_of_all: Code of the route of all rows; 0: each has its own, which the kernel reads.
    """
    (B, HQ, L, D), (HKV, capacity) = q, k[1:3]
    groups = decode_groups(q, HKV)
    splits = decode_splits(device, groups, visible_tokens)
    values = {
        "kv_heads": HKV, "group": HQ // HKV, "q_tokens": L, "capacity": capacity, "block_size": pattern.block_size,
        "window_blocks": pattern.window_blocks, "sink_span": pattern.sink_span,
        "route_of_all": route_of_all, "scale": scale,
    }  # fmt: skip
    work = lse_offset(q, HKV, splits) + B * HQ * L
    return Launch(
        kernel,
        (splits, groups // B, B),
        ((B, L, HQ * D), (_ceil_div(work, 4) * 4,)),
        (kernel.dtype, "float32"),
        _arguments(kernel, values),
    )


def lse_offset(q: Shape, kv_heads: int, splits: int) -> int:
    """Where lse `[B, HQ, L]` begins in a decode launch's second output, in elements: behind the parts of all splits."""
    return decode_groups(q, kv_heads) * splits * DECODE_ROWS * (q[3] + 2)
