"""Attention of one layer inside MLX: sparse prefill beside dense times its share of pairs, decode over many lengths.

    python -m benchmarks.mlx_sparse_layer --lengths 32K 128K --decode-lengths 4K 32K 128K 512K --json FILE

Both run chunk by chunk over mlx-lm's growing cache, as in a model; the sparse calls take whatever path the policy of
`flux_mlx.attention` takes on this device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from benchmarks.mlx_common import parse, parser, pattern_of, save
from flux_mlx.benchmark import length
from flux_mlx.benchmark_models import SHAPES, default_dtype
from flux_mlx.benchmark_parts import (
    AttentionShape,
    decode_seconds,
    dense,
    prefill_seconds,
    sparse,
    sparse_decode,
    visible_share,
)
from flux_mlx.spec import PatternConfig, visible_pairs

KEY_BYTES = 36 << 30  # room for 16 caches of 512K keys, so that every length goes round among as many


def attention_shape(name: str) -> AttentionShape:
    """Sizes of a shape's attention."""
    config = SHAPES[name]
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    return AttentionShape(config["num_hidden_layers"], *heads, config["head_dim"], getattr(mx, default_dtype()))


def prefill_row(shape: AttentionShape, pattern: PatternConfig, tokens: int, step: int) -> dict[str, Any]:
    """Dense, sparse and ideal of one prompt."""
    times = prefill_seconds(shape, tokens, step, {"dense": dense, "sparse": sparse(pattern, tokens)})
    share = visible_share(pattern, tokens - 1, tokens - 1)
    flops = 4 * shape.q_heads * shape.head_dim * visible_pairs(None, tokens - 1, tokens - 1)
    return {
        "operation": "prefill",
        "tokens": tokens,
        "dense_s": times["dense"],
        "sparse_s": times["sparse"],
        "ideal_s": times["dense"] * share,
        "visible_share": share,
        "fraction_of_ideal": times["dense"] * share / times["sparse"],
        "dense_tflops": flops / times["dense"] / 1e12,
        "sparse_tflops": flops * share / times["sparse"] / 1e12,
    }


def decode_row(shape: AttentionShape, pattern: PatternConfig, tokens: int) -> dict[str, Any]:
    """One query over `tokens` keys."""
    attends = {"dense": dense, "sparse": sparse_decode(pattern)}
    times = decode_seconds(shape, tokens, attends, KEY_BYTES)
    return {"operation": "decode", "tokens": tokens, "dense_s": times["dense"], "sparse_s": times["sparse"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    made = parser(__doc__, (32768, 131072))
    made.add_argument("--decode-lengths", type=length, nargs="+", default=[4096, 32768, 131072, 524288])
    args = parse(made, argv)
    shape, pattern = attention_shape(args.shape), pattern_of(args)
    rows = [prefill_row(shape, pattern, tokens, args.prefill_step_size) for tokens in args.lengths]
    decode = [decode_row(shape, pattern, tokens) for tokens in sorted(args.decode_lengths)]
    ratio = decode[-1]["sparse_s"] / decode[0]["sparse_s"]
    save(args, "mlx_sparse_layer", rows + decode, sparse_decode_longest_over_shortest=ratio)


if __name__ == "__main__":
    main()
