"""The design of Flux Attention in numpy: the definition that MLX, Torch, Triton and Metal are tested against."""

from flux_mlx.spec.attention import full_attention, masked_attention, sparse_attention
from flux_mlx.spec.config import FluxConfig, PatternConfig, Route, RouterConfig, parse_route
from flux_mlx.spec.pattern import BlockTable, block_table, kept_blocks, visible, visible_mask, visible_pairs
from flux_mlx.spec.router import decide, init_weights, p_full, pool_queries, route_logits
from flux_mlx.spec.xattention import block_mass, choose_blocks, expand_blocks, group_scores, select_blocks

__all__ = [
    "BlockTable",
    "FluxConfig",
    "PatternConfig",
    "Route",
    "RouterConfig",
    "block_mass",
    "block_table",
    "choose_blocks",
    "decide",
    "expand_blocks",
    "full_attention",
    "group_scores",
    "init_weights",
    "kept_blocks",
    "masked_attention",
    "p_full",
    "parse_route",
    "pool_queries",
    "route_logits",
    "select_blocks",
    "sparse_attention",
    "visible",
    "visible_mask",
    "visible_pairs",
]
