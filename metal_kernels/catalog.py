"""The Metal kernels: one record each, from which the launcher, the tests and the reader are fed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

MSL = Path(__file__).parent / "msl"

DTYPES = ("float32", "float16", "bfloat16")
HEAD_DIMS = (64, 80, 96, 128, 256)
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

QUERY_ROWS = 32  # queries of a prefill threadgroup
ROUTE_SPARSE = 2  # flux_mlx.spec.Route.SPARSE; every other code computes full attention
DECODE_QUERIES = 8  # most queries of a decode call
POOL_SLOTS = 8  # pooled tokens of a router_pool threadgroup
MASS_BLOCKS = 4  # query blocks of a block_mass threadgroup


@cache
def _text(name: str) -> str:
    return (MSL / name).read_text()


@dataclass(frozen=True)
class Buffer:
    """One argument of a kernel.

    Args:
        name: Name in the Metal text. MLX adds NAME_shape and NAME_strides where the body mentions them.
        dtype: "T" or "W" (template types) or an MLX dtype name.
        shape: Axes, for the reader; "scalar" for a 0-d argument.
        is_result: Another kernel's output, so dense.
    """

    name: str
    dtype: str
    shape: str
    is_result: bool = False


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    Args:
        name: Kernel name; its body is `msl/<name>.metal`, or that of `body_of`.
        summary: What it computes.
        headers: Files of `msl/` that hold its functions, in the order of inclusion.
        buffers: Inputs, in order.
        results: Outputs, in order.
        threads: Threads of a threadgroup.
        grid: Threadgroups along x, y, z, for the reader.
    """

    name: str
    summary: str
    headers: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    results: tuple[Buffer, ...]
    threads: int
    grid: str
    body_of: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(buffer.name for buffer in self.buffers)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(buffer.name for buffer in self.results)

    def takes_strides(self, name: str) -> bool:
        """Whether input `name` may have any strides; the other inputs are read as dense, in row-major order."""
        return f"{name}_strides" in self.body()

    def must_be_made_dense(self, name: str) -> bool:
        """Whether input `name` is read as dense and may come with any strides."""
        return not self.takes_strides(name) and not any(b.is_result for b in self.buffers if b.name == name)

    def header(self) -> str:
        """Metal text of the functions."""
        return "".join(_text(name) for name in self.headers)

    def body(self) -> str:
        """Metal text of the kernel's body: a call of those functions."""
        return _text(f"{self.body_of or self.name}.metal")


_QUERIES = Buffer("q", "T", "[B, HQ, L, D]")
_KEYS = Buffer("k", "T", "[B, HKV, capacity, D]")
_VALUES = Buffer("v", "T", "[B, HKV, capacity, D]")
_ROUTE = Buffer("route", "int32", "[B], codes of flux_mlx.spec.Route")
_RULE = Buffer("rule", "int32", "[5]: block_size, sink_blocks, window_blocks, dense_from, dense_to")
_LENGTH = Buffer("kv_tokens", "int32", "scalar")
_SCALE = Buffer("scale", "float32", "scalar")
_OUT = Buffer("out", "T", "[B, HQ, L, D]")
_LSE = Buffer("lse", "float32", "[B, HQ, L], natural log")

_PREFILL_HEADERS = ("pattern.h", "tensors.h", "prefill.h")
_DECODE_HEADERS = (*_PREFILL_HEADERS, "decode.h")

PREFILL = KernelSpec(
    "prefill",
    "full, streaming or triangle attention of a prompt, the rule computed in place",
    _PREFILL_HEADERS,
    (_QUERIES, _KEYS, _VALUES, _ROUTE, _RULE, _LENGTH, _SCALE),
    (_OUT, _LSE),
    threads=128,
    grid="(ceil(L / 32), HQ, B)",
)
PREFILL_TABLE = KernelSpec(
    "prefill_table",
    "block-sparse attention of a prompt by a block table (flux_mlx.spec.BlockTable), or full attention",
    _PREFILL_HEADERS,
    (
        _QUERIES,
        _KEYS,
        _VALUES,
        _ROUTE,
        Buffer("counts", "int32", "[TB, TH, M], TB 1 or B, TH 1 or HQ"),
        Buffer("indices", "int32", "[TB, TH, M, N]"),
        Buffer("full_counts", "int32", "[TB, TH, M]"),
        Buffer("full_indices", "int32", "[TB, TH, M, N]"),
        Buffer("block_size", "int32", "scalar"),
        _LENGTH,
        _SCALE,
    ),
    (_OUT, _LSE),
    threads=128,
    grid="(M * ceil(block_size / 32), HQ, B)",
)
DECODE = KernelSpec(
    "decode",
    "attention of 1 to 8 new queries, sink and window read in place",
    _DECODE_HEADERS,
    (_QUERIES, _KEYS, _VALUES, _ROUTE, _RULE, _LENGTH, _SCALE),
    (_OUT, Buffer("stats", "float32", "[B, HQ, L], the lse")),
    threads=256,
    grid="(HKV * ceil(HQ / HKV * L / ROWS), B, 1)",
)
DECODE_SPLIT = KernelSpec(
    "decode_split",
    "the same over pieces of the visible keys, for decode_merge",
    _DECODE_HEADERS,
    DECODE.buffers,
    (Buffer("out", "float32", "[B, HQ, L, splits, D]"), Buffer("stats", "float32", "[B, HQ, L, splits, 2]")),
    threads=256,
    grid="(HKV * ceil(HQ / HKV * L / ROWS), B, splits)",
    body_of="decode",
)
DECODE_MERGE = KernelSpec(
    "decode_merge",
    "the pieces of decode_split combined",
    _DECODE_HEADERS,
    (
        Buffer("pieces", "float32", "[B, HQ, L, splits, D]", is_result=True),
        Buffer("stats", "float32", "[B, HQ, L, splits, 2]", is_result=True),
    ),
    (_OUT, _LSE),
    threads=32,
    grid="(B * HQ * L, 1, 1)",
)
ROUTER_POOL = KernelSpec(
    "router_pool",
    "sums of the queries at both ends of a prompt, over tokens and heads",
    ("pattern.h", "router.h"),
    (Buffer("queries", "T", "[B, L, HQ, D]"), Buffer("pool_tokens", "int32", "scalar")),
    (Buffer("sums", "float32", "[B, parts, D]"),),
    threads=128,
    grid="(parts, B, 1), parts = ceil(2 * min(pool_tokens, L) / 8)",
)

# The router's parameters in the order of evaluation; "." is "_" in Metal names.
ROUTER_PARAMETERS = tuple(
    f"{layer}.{part}"
    for layer in ("encoder.0", "encoder.2", "head.0", "head.2", "head.4")
    for part in ("weight", "bias")
)
ROUTER_DECIDE = KernelSpec(
    "router_decide",
    "the mean, context encoder and router head: logits and route code",
    ("pattern.h", "router.h"),
    (
        Buffer("sums", "float32", "[B, parts, D]", is_result=True),
        Buffer("count", "float32", "scalar: pooled tokens times heads"),
        *(
            Buffer(name.replace(".", "_"), "W", "flux_mlx.spec.RouterConfig.parameter_shapes")
            for name in ROUTER_PARAMETERS
        ),
    ),
    (Buffer("logits", "float32", "[B, 2]"), Buffer("route", "int32", "[B]")),
    threads=1024,
    grid="(1, B, 1)",
)
BLOCK_MASS = KernelSpec(
    "block_mass",
    "XAttention's mass of each key block for each query block",
    ("pattern.h", "tensors.h", "block_mass.h"),
    (_QUERIES, _KEYS, Buffer("block_size", "int32", "scalar"), Buffer("stride", "int32", "scalar")),
    (Buffer("mass", "float32", "[B, HQ, M, N]"),),
    threads=128,
    grid="(ceil(M / 4), HQ, B)",
)

KERNELS = {
    spec.name: spec
    for spec in (
        PREFILL,
        PREFILL_TABLE,
        DECODE,
        DECODE_SPLIT,
        DECODE_MERGE,
        ROUTER_POOL,
        ROUTER_DECIDE,
        BLOCK_MASS,
    )
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: what MLX needs besides the arrays.

    Args:
        spec: The kernel.
        template: Template arguments in order: dtype names, ints and bools.
        grid: Threads along x, y, z.
        threadgroup: Threads of a threadgroup along x, y, z.
        output_shapes: Shape of each output.
        output_dtypes: MLX dtype name of each output.
        threadgroup_bytes: Threadgroup memory that the body declares.
    """

    spec: KernelSpec
    template: tuple[tuple[str, str | int | bool], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[str, ...]
    threadgroup_bytes: int
