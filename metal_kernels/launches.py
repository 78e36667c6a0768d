"""From shapes to launches: checks, grids, output shapes and threadgroup memory. Sizes as in `catalog`."""

from __future__ import annotations

from metal_kernels import catalog
from metal_kernels.catalog import Launch

Shape = tuple[int, ...]

_MERGE_KEYS = 256  # visible keys that a split of a decode call should have at least
MAX_SPLITS = 32


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _groups(spec: catalog.KernelSpec, x: int, y: int, z: int) -> dict[str, Shape]:
    return {"grid": (x * spec.threads, y, z), "threadgroup": (spec.threads, 1, 1)}


def check_attention(who: str, q: Shape, k: Shape, v: Shape, dtype: str, kv_tokens: int | None) -> int:
    """S, or a ValueError if the kernels cannot compute attention of these shapes.

    Args:
        who: Name of the public function, for the message.
        q: `[B, HQ, L, D]`.
        k: `[B, HKV, capacity, D]`.
        v: As k.
        dtype: Name of the dtype of all three.
        kv_tokens: Keys in use, from L to capacity; None means all.
    """
    if dtype not in catalog.DTYPES:
        raise ValueError(f"[{who}] expected dtype {' or '.join(catalog.DTYPES)}, got {dtype}.")
    if not len(q) == len(k) == 4 or k != v or q[0] != k[0] or q[3] != k[3] or 0 in q + k:
        raise ValueError(
            f"[{who}] expected q [B, HQ, L, D] and k, v [B, HKV, S, D], none of them empty; got {q}, {k}, {v}."
        )
    if q[3] not in catalog.HEAD_DIMS:
        raise ValueError(f"[{who}] the Metal kernels have head dims {catalog.HEAD_DIMS}, got {q[3]}.")
    if q[1] % k[1]:
        raise ValueError(f"[{who}] k has {k[1]} heads, which does not divide q's {q[1]}.")
    kv_tokens = k[2] if kv_tokens is None else kv_tokens
    if not q[2] <= kv_tokens <= k[2]:
        raise ValueError(
            f"[{who}] expected L <= kv_tokens <= the keys in the buffer, got {q[2]}, {kv_tokens} and {k[2]}."
        )
    return kv_tokens


def prefill_tile(dtype: str, head_dim: int) -> tuple[int, int]:
    """(keys of a tile, bytes of threadgroup memory) of the prefill kernels: msl/prefill.h's PrefillTile."""
    item = catalog.ITEM_BYTES[dtype]
    keys = (8 if item == 4 else 16) if head_dim >= 256 else 16 if head_dim >= 128 else 32
    return keys, 2 * keys * (head_dim + 16 // item) * item


def _attention_outputs(q: Shape, dtype: str) -> dict[str, tuple]:
    return {"output_shapes": (q, q[:3]), "output_dtypes": (dtype, "float32")}


def prefill(q: Shape, dtype: str) -> Launch:
    """Launch of `catalog.PREFILL` for checked shapes."""
    batch, heads, q_tokens, head_dim = q
    return Launch(
        catalog.PREFILL,
        (("T", dtype), ("D", head_dim)),
        **_groups(catalog.PREFILL, _ceil_div(q_tokens, catalog.QUERY_ROWS), heads, batch),
        **_attention_outputs(q, dtype),
        threadgroup_bytes=prefill_tile(dtype, head_dim)[1],
    )


def prefill_table(q: Shape, dtype: str, block_rows: int, block_size: int) -> Launch:
    """Launch of `catalog.PREFILL_TABLE` for checked shapes and a table of `block_rows` query blocks."""
    batch, heads, _, head_dim = q
    tiles = block_rows * _ceil_div(block_size, catalog.QUERY_ROWS)
    return Launch(
        catalog.PREFILL_TABLE,
        (("T", dtype), ("D", head_dim)),
        **_groups(catalog.PREFILL_TABLE, tiles, heads, batch),
        **_attention_outputs(q, dtype),
        threadgroup_bytes=prefill_tile(dtype, head_dim)[1],
    )


def decode_splits(visible_tokens: int) -> int:
    """Pieces into which a decode call cuts its visible keys; 1 means a single launch."""
    return max(1, min(MAX_SPLITS, visible_tokens // _MERGE_KEYS))


def decode_rows(rows: int) -> int:
    """Rows of a decode threadgroup: `rows` share a KV head, in chunks of at most 4."""
    return 4 if rows > 2 else rows


def decode(q: Shape, kv_heads: int, dtype: str, splits: int) -> Launch:
    """Launch of `catalog.DECODE` (one split) or `catalog.DECODE_SPLIT` for checked shapes, L <= DECODE_QUERIES."""
    batch, heads, q_tokens, head_dim = q
    spec = catalog.DECODE if splits == 1 else catalog.DECODE_SPLIT
    rows = decode_rows(heads // kv_heads * q_tokens)
    chunks = _ceil_div(heads // kv_heads * q_tokens, rows)
    pieces = {
        "output_shapes": ((batch, heads, q_tokens, splits, head_dim), (batch, heads, q_tokens, splits, 2)),
        "output_dtypes": ("float32", "float32"),
    }
    return Launch(
        spec,
        (("T", dtype), ("D", head_dim), ("ROWS", rows), ("FINAL", splits == 1)),
        **_groups(spec, kv_heads * chunks, batch, splits),
        **(_attention_outputs(q, dtype) if splits == 1 else pieces),
        threadgroup_bytes=8 * (head_dim + 2) * 4,
    )


def decode_merge(q: Shape, dtype: str) -> Launch:
    """Launch of `catalog.DECODE_MERGE`."""
    return Launch(
        catalog.DECODE_MERGE,
        (("T", dtype), ("D", q[3])),
        **_groups(catalog.DECODE_MERGE, q[0] * q[1] * q[2], 1, 1),
        **_attention_outputs(q, dtype),
        threadgroup_bytes=0,
    )


def router_pool(queries: Shape, dtype: str, pool_tokens: int) -> Launch:
    """Launch of `catalog.ROUTER_POOL` for queries `[B, L, HQ, D]`."""
    batch, tokens, _, head_dim = queries
    parts = _ceil_div(2 * min(pool_tokens, tokens), catalog.POOL_SLOTS)
    return Launch(
        catalog.ROUTER_POOL,
        (("T", dtype),),
        **_groups(catalog.ROUTER_POOL, parts, batch, 1),
        output_shapes=((batch, parts, head_dim),),
        output_dtypes=("float32",),
        threadgroup_bytes=0,
    )


def router_decide(batch: int, head_dim: int, dtype: str) -> Launch:
    """Launch of `catalog.ROUTER_DECIDE`; `dtype` is that of the parameters."""
    return Launch(
        catalog.ROUTER_DECIDE,
        (("W", dtype), ("D", head_dim)),
        **_groups(catalog.ROUTER_DECIDE, 1, batch, 1),
        output_shapes=((batch, 2), (batch,)),
        output_dtypes=("float32", "int32"),
        threadgroup_bytes=11 * head_dim * 4,
    )


def block_mass(q: Shape, kv_tokens: int, dtype: str, block_size: int) -> Launch:
    """Launch of `catalog.BLOCK_MASS` for checked shapes."""
    batch, heads, q_tokens, _ = q
    columns = _ceil_div(kv_tokens, block_size)
    rows = columns - (kv_tokens - q_tokens) // block_size
    return Launch(
        catalog.BLOCK_MASS,
        (("T", dtype),),
        **_groups(catalog.BLOCK_MASS, _ceil_div(rows, catalog.MASS_BLOCKS), heads, batch),
        output_shapes=((batch, heads, rows, columns),),
        output_dtypes=("float32",),
        threadgroup_bytes=0,
    )
