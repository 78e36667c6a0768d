"""The kernels as operations: checks, then one or two launches.

Arrays are whatever `run(launch, inputs)` takes and returns, with `.shape`; scalars are Python numbers, short int32
vectors tuples. `flux_mlx.kernels` runs them on a Metal device, the tests on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metal_kernels import catalog, launches
from metal_kernels.catalog import Launch

Array = Any
Run = Callable[[Launch, list[Any]], Sequence[Array]]

NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """Streaming or triangle visibility as the kernels take it.

    Args:
        block_size: Tokens of a block.
        sink_blocks: Blocks of the sink.
        window_blocks: Blocks of the window, the query's own counted.
        dense: Queries at positions [dense[0], dense[1]) see every earlier key.

    Raises:
        ValueError: A value is out of range.
    """

    block_size: int
    sink_blocks: int
    window_blocks: int
    dense: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        words = self.words()
        if min(words) < 0 or max(words) > NO_LIMIT or self.block_size < 1 or self.window_blocks < 1:
            raise ValueError(f"[Rule] expected sizes from 1 (sink and dense from 0) to {NO_LIMIT}, got {self}.")

    def words(self) -> tuple[int, ...]:
        """The kernels' `rule` buffer."""
        return (self.block_size, self.sink_blocks, self.window_blocks, *self.dense)

    def visible_tokens(self, q_tokens: int, kv_tokens: int) -> int:
        """Keys that a decode call of SPARSE rows reads: all of them if one of its queries is dense."""
        first = kv_tokens - q_tokens
        if first < self.dense[1] and kv_tokens > self.dense[0]:
            return kv_tokens
        begin = max(0, first // self.block_size - self.window_blocks + 1) * self.block_size
        return kv_tokens - begin + min(begin, self.sink_blocks * self.block_size)


FULL_RULE = Rule(1, 0, 1, (0, NO_LIMIT))


def attention(
    run: Run,
    q: Array,
    k: Array,
    v: Array,
    *,
    dtype: str,
    route: Array | tuple[int, ...],
    rule: Rule,
    scale: float,
    kv_tokens: int | None = None,
    splits: int | None = None,
) -> tuple[Array, Array]:
    """Full, streaming or triangle attention, by route: calls of up to 8 queries by the decode kernels.

    Args:
        run: Launcher.
        q: `[B, HQ, L, D]`.
        k: `[B, HKV, capacity, D]`, sliced views welcome.
        v: As k.
        dtype: Dtype name of q, k and v.
        route: int32 `[B]` codes (SPARSE follows `rule`, any other is full), on the device or as a tuple.
        rule: What SPARSE rows see.
        scale: Multiplier of the scores.
        kv_tokens: S: keys in use; all of the buffer by default.
        splits: Pieces of a decode call; chosen from the visible keys by default.

    Returns:
        (out `[B, HQ, L, D]` of `dtype`, lse float32 `[B, HQ, L]`).

    Raises:
        ValueError: Shapes or lengths that do not fit together.
    """
    shape = tuple(q.shape)
    kv_tokens = launches.check_attention("attention", shape, tuple(k.shape), tuple(v.shape), dtype, kv_tokens)
    _check_route("attention", route, shape[0])
    if splits is not None and not 1 <= splits <= launches.MAX_SPLITS:
        raise ValueError(f"[attention] expected splits from 1 to {launches.MAX_SPLITS}, got {splits}.")
    inputs = [q, k, v, route, rule.words(), kv_tokens, float(scale)]
    if shape[2] > catalog.DECODE_QUERIES:
        out, lse = run(launches.prefill(shape, dtype), inputs)
        return out, lse
    splits = decode_splits(route, rule, shape[2], kv_tokens) if splits is None else splits
    first, second = run(launches.decode(shape, k.shape[1], dtype, splits), inputs)
    if splits > 1:
        first, second = run(launches.decode_merge(shape, dtype), [first, second])
    return first, second


def decode_splits(route: Array | tuple[int, ...], rule: Rule, q_tokens: int, kv_tokens: int) -> int:
    """Pieces of a decode call. A row that is full, or whose route only the device knows, may read every key."""
    all_sparse = isinstance(route, tuple) and set(route) == {catalog.ROUTE_SPARSE}
    return launches.decode_splits(rule.visible_tokens(q_tokens, kv_tokens) if all_sparse else kv_tokens)


def table_attention(
    run: Run,
    q: Array,
    k: Array,
    v: Array,
    table: Sequence[Array],
    block_size: int,
    *,
    dtype: str,
    route: Array | tuple[int, ...],
    scale: float,
    kv_tokens: int | None = None,
) -> tuple[Array, Array]:
    """Block-sparse attention by a block table.

    Args:
        table: counts, indices, full_counts, full_indices as in `flux_mlx.spec.BlockTable`, int32, of shapes
            `[TB, TH, M]` and `[TB, TH, M, N]`, TB 1 or B, TH 1 or HQ. The kernel reads within its bounds whatever it
            says; `flux_mlx.kernels` refuses entries out of range.
        block_size: Tokens of a block.
        The others as in `attention`.
    """
    who = "table_attention"
    shape = tuple(q.shape)
    kv_tokens = launches.check_attention(who, shape, tuple(k.shape), tuple(v.shape), dtype, kv_tokens)
    _check_route(who, route, shape[0])
    rows = check_table_shapes(who, [tuple(part.shape) for part in table], shape, kv_tokens, block_size)
    inputs = [q, k, v, route, *table, block_size, kv_tokens, float(scale)]
    out, lse = run(launches.prefill_table(shape, dtype, rows, min(block_size, kv_tokens)), inputs)
    return out, lse


def _check_route(who: str, route: Array | tuple[int, ...], batch: int) -> None:
    shape = (len(route),) if isinstance(route, tuple) else tuple(route.shape)
    if shape != (batch,):
        raise ValueError(f"[{who}] expected a route of shape {(batch,)}, got {shape}.")


def check_table_shapes(
    who: str, table: Sequence[tuple[int, ...]], q: tuple[int, ...], kv_tokens: int, block_size: int
) -> int:
    """The table's query blocks M. Raises ValueError unless its four shapes fit q, the keys and the block size."""
    if not 1 <= block_size <= NO_LIMIT:
        raise ValueError(f"[{who}] expected a block size of 1 or more, got {block_size}.")
    columns = -(-kv_tokens // block_size)
    rows = columns - (kv_tokens - q[2]) // block_size
    lines = tuple(table[0])
    heads_fit = len(lines) == 3 and lines[0] in (1, q[0]) and lines[1] in (1, q[1])
    if not heads_fit or lines[2] != rows or list(table) != [lines, (*lines, columns)] * 2:
        raise ValueError(
            f"[{who}] expected counts [1 or {q[0]}, 1 or {q[1]}, {rows}] and indices [..., {columns}] twice, "
            f"got {[tuple(part) for part in table]}."
        )
    return rows


def route_logits(
    run: Run,
    queries: Array,
    weights: Mapping[str, Array],
    pool_tokens: int,
    *,
    dtype: str,
    weight_dtype: str,
) -> tuple[Array, Array]:
    """Router of one layer.

    Args:
        queries: `[B, L, HQ, D]`, after q_proj (and q_norm), before RoPE, of the tokens to pool.
        weights: The parameters named in `catalog.ROUTER_PARAMETERS`.
        pool_tokens: P, 1 or more.

    Returns:
        (logits float32 `[B, 2]`, route int32 `[B]`).

    Raises:
        ValueError: Shapes or dtypes that the kernels do not take.
    """
    shape = tuple(queries.shape)
    if len(shape) != 4 or 0 in shape or pool_tokens < 1:
        raise ValueError(
            f"[route_logits] expected queries [B, L, HQ, D] and pool_tokens >= 1, got {shape}, {pool_tokens}."
        )
    if dtype not in catalog.DTYPES or weight_dtype not in catalog.DTYPES:
        raise ValueError(f"[route_logits] expected dtypes of {catalog.DTYPES}, got {dtype} and {weight_dtype}.")
    batch, tokens, heads, head_dim = shape
    if head_dim not in catalog.HEAD_DIMS:
        raise ValueError(f"[route_logits] the Metal kernels have head dims {catalog.HEAD_DIMS}, got {head_dim}.")
    parameters = [weights[name] for name in catalog.ROUTER_PARAMETERS]
    _check_parameters([tuple(p.shape) for p in parameters], head_dim)
    (sums,) = run(launches.router_pool(shape, dtype, pool_tokens), [queries, pool_tokens])
    count = float(2 * min(pool_tokens, tokens) * heads)
    logits, route = run(launches.router_decide(batch, head_dim, weight_dtype), [sums, count, *parameters])
    return logits, route


def _check_parameters(shapes: list[tuple[int, ...]], d: int) -> None:
    sizes = ((8 * d, d), (2 * d, 8 * d), (4 * d, 2 * d), (d, 4 * d), (2, d))
    expected = [shape for size in sizes for shape in (size, size[:1])]
    if shapes != expected:
        raise ValueError(f"[route_logits] expected parameters of shapes {expected}, got {shapes}.")


def block_mass(run: Run, q: Array, k: Array, block_size: int, stride: int, *, dtype: str) -> Array:
    """XAttention's block mass, float32 `[B, HQ, M, N]` (see `flux_mlx.spec.block_mass`).

    Raises:
        ValueError: Shapes that do not fit together, or a stride that does not divide the block size.
    """
    shape = tuple(q.shape)
    kv_tokens = launches.check_attention("block_mass", shape, tuple(k.shape), tuple(k.shape), dtype, None)
    if stride < 1 or block_size < stride or block_size % stride:
        raise ValueError(f"[block_mass] stride must divide block_size, got {stride} and {block_size}.")
    (mass,) = run(launches.block_mass(shape, kv_tokens, dtype, block_size), [q, k, block_size, stride])
    return mass
