"""The Metal kernels as functions of MLX arrays. Which calls should use them is said by `flux_mlx.kernel_policy`.

Layout `[B, H, L, D]`; keys are positions 0..S-1, queries the last L of them. Sliced views are read in place. `run` is
the launcher; the default needs a Metal device, the tests pass one that executes the kernels on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from flux_mlx import xattention
from flux_mlx.spec import BlockTable, PatternConfig, Route
from metal_kernels import operations
from metal_kernels.catalog import KernelSpec, Launch
from metal_kernels.operations import FULL_RULE, Rule, Run

MAX_SCORE_BYTES = 1 << 30  # of xattention's group scores, [B, HQ, L / stride, S / stride] float32

CONSTANT_BELOW_ELEMENTS = 8  # MLX passes smaller inputs in Metal's constant address space


def is_available() -> bool:
    """Whether this process has a Metal device."""
    return mx.metal.is_available()


def dtype_name(x: mx.array) -> str:
    """ "float32" for mx.float32, and so on."""
    return str(x.dtype).rpartition(".")[2]


@cache
def _compiled(spec: KernelSpec, name: str) -> Any:
    return mx.fast.metal_kernel(
        name=name,
        input_names=list(spec.inputs),
        output_names=list(spec.outputs),
        header=spec.header(),
        source=spec.body(),
        ensure_row_contiguous=False,
    )


def _as_kernel_reads(spec: KernelSpec, name: str, value: Any) -> Any:
    """Input `name` as MLX takes it: tuples as int32 vectors, arrays dense unless the kernel reads their strides."""
    if isinstance(value, tuple):
        return mx.array(value, mx.int32)
    return mx.contiguous(value) if isinstance(value, mx.array) and spec.must_be_made_dense(name) else value


def kernel_inputs(launch: Launch, inputs: list[Any]) -> list[Any]:
    """The inputs as MLX takes them and as the kernel reads them, in the kernel's order."""
    spec = launch.spec
    return [_as_kernel_reads(spec, name, value) for name, value in zip(spec.inputs, inputs, strict=True)]


def kernel_name(launch: Launch, inputs: list[Any]) -> str:
    """The kernel's name with the inputs that MLX makes `constant`, by their position.

    MLX keeps one text for each name and drops the compiled one when another comes: texts that differ by an address
    space need names of their own, or calls of alternating shapes would compile each time.
    """
    small = [str(i) for i, x in enumerate(inputs) if isinstance(x, mx.array) and x.size < CONSTANT_BELOW_ELEMENTS]
    return "_".join([launch.spec.name, *small])


def metal_run(launch: Launch, inputs: list[Any]) -> list[mx.array]:
    """Launch a kernel on the Metal device.

    Raises:
        RuntimeError: There is no Metal device.
    """
    if not is_available():
        raise RuntimeError(f'[{launch.spec.name}] impl="metal" needs a Metal device, and this machine has none.')
    inputs = kernel_inputs(launch, inputs)
    return _compiled(launch.spec, kernel_name(launch, inputs))(
        inputs=inputs,
        template=[(name, getattr(mx, v) if isinstance(v, str) else v) for name, v in launch.template],
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=list(launch.output_shapes),
        output_dtypes=[getattr(mx, name) for name in launch.output_dtypes],
    )


def rule_of(pattern: PatternConfig, prompt_tokens: int | None) -> Rule:
    """What SPARSE queries see by position; xattention stands for its decode, streaming."""
    dense = (0, 0)
    if pattern.name == "triangle" and prompt_tokens is not None:
        dense = (max(0, prompt_tokens - pattern.last_tokens), prompt_tokens)
    return Rule(pattern.block_size, pattern.sink_blocks, pattern.window_blocks, dense)


def _scale(q: mx.array, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def full_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    kv_tokens: int | None = None,
    run: Run = metal_run,
) -> tuple[mx.array, mx.array]:
    """Causal attention.

    Args:
        q: `[B, HQ, L, D]`, float32, float16 or bfloat16; D one of `catalog.HEAD_DIMS`.
        k: `[B, HKV, capacity, D]`, the dtype of q.
        v: As k.
        scale: Multiplier of the scores, D**-0.5 by default.
        kv_tokens: S: keys in use; all of the buffer by default.
        run: Launcher.

    Returns:
        (out `[B, HQ, L, D]`, lse float32 `[B, HQ, L]`, natural log).

    Raises:
        ValueError: Shapes, dtypes or lengths that the kernels do not take.
        RuntimeError: No Metal device.
    """
    route = (int(Route.FULL),) * q.shape[0]
    return _attend(q, k, v, route, FULL_RULE, scale, kv_tokens, run)


def sparse_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    pattern: PatternConfig,
    *,
    prompt_tokens: int | None = None,
    scale: float | None = None,
    kv_tokens: int | None = None,
    splits: int | None = None,
    run: Run = metal_run,
) -> tuple[mx.array, mx.array]:
    """Causal attention restricted to `pattern` (`flux_mlx.spec.visible`), skipping what is hidden.

    Args:
        pattern: Which keys a query sees.
        prompt_tokens: Length of the whole prompt in exact prefill; None (chunked calls, decode) means streaming.
        splits: Pieces of a call of up to 8 queries; chosen from the visible keys by default.
        The others, the results and the errors as in `full_attention`.
    """
    route = (int(Route.SPARSE),) * q.shape[0]
    sizes = {"prompt_tokens": prompt_tokens, "scale": scale, "kv_tokens": kv_tokens, "splits": splits}
    return routed_attention(q, k, v, route, pattern, **sizes, run=run)


def routed_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    route: mx.array | tuple[int, ...],
    pattern: PatternConfig,
    *,
    prompt_tokens: int | None = None,
    scale: float | None = None,
    kv_tokens: int | None = None,
    splits: int | None = None,
    run: Run = metal_run,
) -> tuple[mx.array, mx.array]:
    """Full or sparse attention by the route of each batch row, read by the kernel: no host synchronisation.

    Args:
        route: int32 `[B]`, codes of `flux_mlx.spec.Route` (`route_layer` makes them on the device), or a tuple.
        The others, the results and the errors as in `sparse_attention`.
    """
    if pattern.name != "xattention" or prompt_tokens is None:
        return _attend(q, k, v, route, rule_of(pattern, prompt_tokens), scale, kv_tokens, run, splits)
    if kv_tokens is not None:
        k, v = k[:, :, :kv_tokens], v[:, :, :kv_tokens]
    mass = _cheapest_mass(q, k, pattern, run)
    first = (k.shape[2] - q.shape[2]) // pattern.block_size
    kept = xattention.choose_blocks(mass, first, pattern.threshold, pattern.top_k_blocks)
    table = _pack(kept, first)
    return operations.table_attention(
        run, q, k, v, table, pattern.block_size, dtype=_shared_dtype(q, k, v), route=route, scale=_scale(q, scale)
    )


def _cheapest_mass(q: mx.array, k: mx.array, pattern: PatternConfig, run: Run) -> mx.array:
    """Block mass by operations while their group scores are small, else by the kernel: more reading, nothing stored.

    The arithmetic is in metal_kernels/README.md.
    """
    groups = -(-q.shape[2] // pattern.stride) * -(-k.shape[2] // pattern.stride)
    if q.shape[0] * q.shape[1] * groups * 4 <= MAX_SCORE_BYTES:
        return xattention.block_mass(q, k, pattern.block_size, pattern.stride)
    return block_mass(q, k, pattern, run=run)


def _attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    route: mx.array | tuple[int, ...],
    rule: Rule,
    scale: float | None,
    kv_tokens: int | None,
    run: Run,
    splits: int | None = None,
) -> tuple[mx.array, mx.array]:
    dtype = _shared_dtype(q, k, v)
    sizes = {"scale": _scale(q, scale), "kv_tokens": kv_tokens, "splits": splits}
    return operations.attention(run, q, k, v, dtype=dtype, route=route, rule=rule, **sizes)


def _shared_dtype(q: mx.array, k: mx.array, v: mx.array) -> str:
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"[attention] q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    return dtype_name(q)


def _pack(kept: mx.array, first_q_block: int) -> list[mx.array]:
    """bool `[B, HQ, M, N]` to counts and indices of the diagonal blocks, then of the others."""
    rows, columns = first_q_block + mx.arange(kept.shape[-2])[:, None], mx.arange(kept.shape[-1])
    diagonal = kept & (columns == rows)
    parts = []
    for part in (diagonal, kept & ~diagonal):
        parts += [part.sum(-1).astype(mx.int32), mx.argsort(~part, axis=-1).astype(mx.int32)]
    return parts


def table_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    table: BlockTable,
    *,
    scale: float | None = None,
    kv_tokens: int | None = None,
    run: Run = metal_run,
) -> tuple[mx.array, mx.array]:
    """Block-sparse attention by a table of leading axes `[1 or B, 1 or HQ]`.

    Raises:
        ValueError: Also if a count or an index of the table is out of range.
        The others, the results and the errors as in `full_attention`.
    """
    parts = (table.kv_num_blocks, table.kv_indices, table.full_kv_num_blocks, table.full_kv_indices)
    for name, part in (("counts", parts[0]), ("indices", parts[1]), ("counts", parts[2]), ("indices", parts[3])):
        most = parts[1].shape[-1] - (name == "indices")
        if part.size and not (np.min(part) >= 0 and np.max(part) <= most):
            raise ValueError(
                f"[table_attention] expected {name} from 0 to {most}, got {np.min(part)} to {np.max(part)}."
            )
    first = ((k.shape[2] if kv_tokens is None else kv_tokens) - q.shape[2]) // table.block_size
    if table.first_q_block != first:
        raise ValueError(f"[table_attention] expected first_q_block {first}, got {table.first_q_block}.")
    return operations.table_attention(
        run,
        q,
        k,
        v,
        [mx.array(part, mx.int32) for part in parts],
        table.block_size,
        dtype=_shared_dtype(q, k, v),
        route=(int(Route.SPARSE),) * q.shape[0],
        scale=_scale(q, scale),
        kv_tokens=kv_tokens,
    )


def route_layer(
    queries: mx.array, weights: Mapping[str, mx.array], pool_tokens: int, *, run: Run = metal_run
) -> tuple[mx.array, mx.array]:
    """The layer router, its decision left on the device.

    Args:
        queries: `[B, L, HQ, D]` of `prompt[:-1]`, after q_proj (and q_norm), before RoPE.
        weights: One layer's parameters, named and shaped as `RouterConfig.parameter_shapes` says, of one float dtype.
        pool_tokens: P.

    Returns:
        (logits float32 `[B, 2]`, route int32 `[B]`, codes of `Route`).

    Raises:
        ValueError: Shapes or dtypes that the kernels do not take.
        RuntimeError: No Metal device.
    """
    weight_dtype = dtype_name(next(iter(weights.values())))
    return operations.route_logits(
        run, queries, weights, pool_tokens, dtype=dtype_name(queries), weight_dtype=weight_dtype
    )


def block_mass(q: mx.array, k: mx.array, pattern: PatternConfig, *, run: Run = metal_run) -> mx.array:
    """XAttention's block mass, float32 `[B, HQ, M, N]` (`flux_mlx.spec.block_mass`). Errors as in `full_attention`."""
    dtype = _shared_dtype(q, k, k)
    return operations.block_mass(run, q, k, pattern.block_size, pattern.stride, dtype=dtype)
