"""Every kernel at every dtype and head dim, with input shapes: what is compiled and checked without running."""

from __future__ import annotations

from flux_mlx.spec import RouterConfig
from metal_kernels import catalog, launches
from metal_kernels.catalog import Launch

INT, FLOAT = ((), "int32"), ((), "float32")


def variants(dtype: str, head_dim: int) -> list[tuple[Launch, list[tuple[tuple[int, ...], str]]]]:
    """One launch of every kernel, with its inputs' shapes and dtypes."""
    q, few, k = (2, 6, 70, head_dim), (2, 6, 3, head_dim), (2, 2, 133, head_dim)
    qkv = [(q, dtype), (k, dtype), (k, dtype), ((2,), "int32")]
    rest = [((5,), "int32"), INT, FLOAT]
    table = [((1, 1, 6), "int32"), ((1, 1, 6, 9), "int32")] * 2
    pieces = [((*few[:3], 2, head_dim), "float32"), ((*few[:3], 2, 2), "float32")]
    shapes = RouterConfig.parameter_shapes(head_dim)
    parameters = [(shapes[name], dtype) for name in catalog.ROUTER_PARAMETERS]
    return [
        (launches.prefill(q, dtype), qkv + rest),
        (launches.prefill_table(q, dtype, 6, 16), qkv + table + [INT, INT, FLOAT]),
        (launches.decode(few, 2, dtype, 1), [(few, dtype), *qkv[1:], *rest]),
        (launches.decode(few, 2, dtype, 2), [(few, dtype), *qkv[1:], *rest]),
        (launches.decode_merge(few, dtype), pieces),
        (launches.router_pool((2, 70, 6, head_dim), dtype, 10), [((2, 70, 6, head_dim), dtype), INT]),
        (launches.router_decide(2, head_dim, dtype), [((2, 3, head_dim), "float32"), FLOAT, *parameters]),
        (launches.block_mass(q, 133, dtype, 16), [(q, dtype), (k, dtype), INT, INT]),
    ]


ALL = {
    f"{launch.spec.name}-{dtype}-{head_dim}": (launch, inputs)
    for dtype in catalog.DTYPES
    for head_dim in catalog.HEAD_DIMS
    for launch, inputs in variants(dtype, head_dim)
}
