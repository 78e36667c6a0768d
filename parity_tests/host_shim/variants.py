"""Every kernel at every dtype and head dim, and each address space of its inputs: what is compiled without running."""

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


def corners(dtype: str, head_dim: int) -> dict[str, tuple[Launch, list[tuple[tuple[int, ...], str]]]]:
    """Launches whose inputs lie in the other address space: MLX makes one of fewer than 8 elements `constant`."""
    launched = {launch.spec.name: (launch, inputs) for launch, inputs in variants(dtype, head_dim)}
    found = {}
    for name in ("prefill", "prefill_table", "decode", "decode_split"):
        launch, inputs = launched[name]
        found[f"{name}-long_route"] = launch, [*inputs[:3], ((9,), "int32"), *inputs[4:]]
    launch, inputs = launched["prefill_table"]
    for name, lines in {"short_table": (1, 1, 2), "long_table": (1, 6, 6)}.items():
        table = [(lines, "int32"), ((*lines, lines[2]), "int32")] * 2
        found[f"prefill_table-{name}"] = launch, [*inputs[:4], *table, *inputs[8:]]
    one = (1, 1, 1, head_dim)
    pieces = [((1, 1, 1, 3, head_dim), "float32"), ((1, 1, 1, 3, 2), "float32")]
    return found | {"decode_merge-few_stats": (launches.decode_merge(one, dtype), pieces)}


CORNER_HEAD_DIM = 80
ALL = {
    f"{launch.spec.name}-{dtype}-{head_dim}": (launch, inputs)
    for dtype in catalog.DTYPES
    for head_dim in catalog.HEAD_DIMS
    for launch, inputs in variants(dtype, head_dim)
} | {
    f"{name}-{dtype}-{CORNER_HEAD_DIM}": variant
    for dtype in catalog.DTYPES
    for name, variant in corners(dtype, CORNER_HEAD_DIM).items()
}
