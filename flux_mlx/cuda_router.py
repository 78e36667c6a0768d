"""The layer router's CUDA kernels as functions of MLX arrays: three launches where operations take about two dozen.

`mean_over_heads` makes the rows that a cache keeps of a prompt, one a pooled token; `decide` is everything behind them.
Nothing here waits for the device. `run` prepares a launch, as in `flux_mlx.cuda_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import mlx.core as mx

from flux_mlx import cuda_catalog, cuda_kernels
from flux_mlx.cuda_catalog import Device, Launch
from flux_mlx.cuda_kernels import Run, cuda_run, rows_on_device, ticket_slots
from flux_mlx.kernels import dtype_name
from flux_mlx.spec import RouterConfig
from metal_kernels.catalog import ROUTER_PARAMETERS

Counts = tuple[tuple[int, int], ...]  # of each batch row: pooled tokens at the prompt's start, and at its end


def refusal(dtype: str, head_dim: int) -> str:
    """Why the kernels do not pool queries of this dtype and head dim on this device; "" if they do."""
    if dtype not in cuda_catalog.ROUTER_DTYPES:
        return f"expected queries of dtype {' or '.join(cuda_catalog.ROUTER_DTYPES)}, got {dtype}"
    if head_dim % 4 or not 4 <= head_dim <= cuda_catalog.ROUTER_CHANNELS:
        return f"expected D a multiple of 4 up to {cuda_catalog.ROUTER_CHANNELS}, got {head_dim}"
    if cuda_catalog.find(dtype, 0, 0, cuda_kernels.device(), "router_pool") is None:
        return f"no compiled kernel for compute capability {cuda_kernels.device().major}"
    return ""


def _check(dtype: str, head_dim: int) -> None:
    if problem := refusal(dtype, head_dim):
        raise ValueError(f"[cuda_router] {problem}.")


def mean_over_heads(queries: mx.array, *, run: Run = cuda_run) -> mx.array:
    """float32 `[T, D]`, the mean over the heads of queries `[T, HQ, D]`.

    Raises:
        ValueError: A shape or dtype that the kernels do not take.
        RuntimeError: No CUDA device.
    """
    if queries.ndim != 3 or 0 in queries.shape:
        raise ValueError(f"[cuda_router] expected queries [T, HQ, D], got shape {queries.shape}.")
    dtype = dtype_name(queries)
    _check(dtype, queries.shape[2])
    return run(_pool_launch(cuda_kernels.device(), dtype, tuple(queries.shape)))([queries], ())[0]


def decide(
    prefix: mx.array, recent: mx.array, counts: Counts, parameters: Sequence[mx.array], *, run: Run = cuda_run
) -> tuple[mx.array, mx.array]:
    """The router from the pooled rows of a cache on: their mean, the network, the decision.

    Args:
        prefix: float32 `[B, P, D]`; of row b the first `counts[b][0]` count.
        recent: float32 `[B, P, D]`; of row b the last `counts[b][1]` count.
        counts: B pairs, 0 to P each.
        parameters: The router's, float32, in the order of `metal_kernels.catalog.ROUTER_PARAMETERS`.

    Returns:
        (int32 `[B]`, codes of `flux_mlx.spec.Route`; logits float32 `[B, 2]`).

    Raises:
        ValueError: Shapes or dtypes that the kernels do not take.
        RuntimeError: No CUDA device.
    """
    B, P, D = prefix.shape
    _check("float32", D)
    is_float32 = prefix.dtype == recent.dtype == mx.float32
    fits = recent.shape == prefix.shape and len(counts) == B and all(0 <= n <= P for pair in counts for n in pair)
    if not (is_float32 and fits):
        raise ValueError(
            f"[cuda_router] expected float32 prefix and recent [B, P, D] and B pairs of counts up to P, got "
            f"{prefix.dtype} {prefix.shape}, {recent.dtype} {recent.shape} and {counts}."
        )
    _check_parameters(parameters, D)
    first_weight, first_bias, second_weight, *rest = parameters
    encode, head = _network_launches(cuda_kernels.device(), tuple(prefix.shape))
    encoder = (first_weight, first_bias, second_weight)
    if len(set(counts)) == 1:
        (encoded,) = run(encode)([prefix, recent, *encoder], counts[0])
    else:  # row by row: the kernel takes counts by value, and of an array's place in memory MLX promises nothing
        encode, _ = _network_launches(cuda_kernels.device(), (1, P, D))
        rows = zip(prefix[:, None], recent[:, None], counts, strict=True)
        encoded = mx.concatenate([run(encode)([*ends, *encoder], its)[0] for *ends, its in rows])
    tickets, slots = ticket_slots(B)
    route, logits, _ = run(head)([encoded, *rest, tickets], (next(slots),))
    return route[:B], logits[:B]  # in place


def _check_parameters(parameters: Sequence[mx.array], head_dim: int) -> None:
    expected, got = _parameter_shapes(head_dim), [x.shape for x in parameters]
    if got != expected or any(x.dtype != mx.float32 for x in parameters):
        raise ValueError(f"[cuda_router] expected float32 parameters of shapes {expected}, got {got}.")


@cache
def _parameter_shapes(head_dim: int) -> list[tuple[int, ...]]:
    shapes = RouterConfig.parameter_shapes(head_dim)
    return [shapes[name] for name in ROUTER_PARAMETERS]


@lru_cache
def _pool_launch(where: Device, dtype: str, queries: tuple[int, ...]) -> Launch:
    """A block a token."""
    tokens, heads, channels = queries
    kernel = cuda_catalog.find(dtype, 0, 0, where, "router_pool")
    arguments = (("heads", heads), ("channels", channels))
    return Launch(kernel, (tokens, 1, 1), ((tokens, channels),), ("float32",), arguments)


@lru_cache
def _network_launches(where: Device, rows: tuple[int, ...]) -> tuple[Launch, Launch]:
    """A block for so many units of the encoder's first layer, and of the head's first; a line of them a batch row."""
    B, P, D = rows
    units = cuda_catalog.ROUTER_UNITS
    encode, decide_ = (
        cuda_catalog.find("float32", 0, 0, where, family) for family in ("router_encode", "router_decide")
    )
    encoder_blocks, head_blocks = 8 * D // units, 4 * D // units
    return (
        Launch(
            encode,
            (encoder_blocks, B, 1),
            ((B, encoder_blocks, 2 * D),),
            ("float32",),
            (("pool_tokens", P), ("channels", D)),
        ),
        Launch(
            decide_,
            (head_blocks, B, 1),
            ((rows_on_device(B, 4),), (rows_on_device(B, 8), 2), (B, head_blocks, D)),
            ("int32", "float32", "float32"),
            (("encoder_blocks", encoder_blocks), ("channels", D)),
        ),
    )
