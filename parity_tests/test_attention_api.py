"""The public attention functions of MLX: what they refuse, and that a named implementation is never replaced."""

from __future__ import annotations

import mlx.core as mx
import pytest

from flux_mlx.attention import full_attention, sparse_attention
from flux_mlx.spec import PatternConfig

PATTERN = PatternConfig(block_size=8, sink_tokens=8, window_tokens=16)


def arrays(q=(1, 4, 3, 64), k=(1, 2, 50, 64), v=None, dtype=mx.float32):
    return mx.zeros(q, dtype), mx.zeros(k, dtype), mx.zeros(k if v is None else v, dtype)


@pytest.mark.parametrize("attend", [full_attention, lambda *qkv, **how: sparse_attention(*qkv, PATTERN, **how)])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (4, 3, 64)}, r"q must be \[B, H, L, D\], got shape \(4, 3, 64\)"),
        ({"q": (1, 5, 3, 64)}, "k has 2 heads, which does not divide q's 5"),
        ({"q": (1, 4, 51, 64)}, "got L 51 and S 50"),
        ({"q": (2, 4, 3, 64)}, r"q \(2, 4, 3, 64\) and k \(1, 2, 50, 64\) must share B and D"),
        ({"q": (1, 4, 3, 32)}, "must share B and D"),
        ({"v": (1, 2, 49, 64)}, r"k and v must share \[B, HKV, S\], got \(1, 2, 50, 64\) and \(1, 2, 49, 64\)"),
        ({"dtype": mx.int32}, "must share a float dtype"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(attend, shapes, message):
    with pytest.raises(ValueError, match=message):
        attend(*arrays(**shapes))


def test_unknown_implementations_are_refused():
    known = r"\['ops', 'metal', 'cuda', 'cuda-portable'\]"
    with pytest.raises(ValueError, match=rf"\[full_attention\] impl must be one of {known} or None, got 'triton'"):
        full_attention(*arrays(), impl="triton")
    with pytest.raises(ValueError, match=r"\[sparse_attention\] impl must be one of"):
        sparse_attention(*arrays(), PATTERN, impl="fast")


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_metal_by_name_is_never_replaced():
    for attend in (full_attention, lambda *qkv, **how: sparse_attention(*qkv, PATTERN, **how)):
        with pytest.raises(RuntimeError, match='impl="metal" needs a Metal device'):
            attend(*arrays(), impl="metal")
