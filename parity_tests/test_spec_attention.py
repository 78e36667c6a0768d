"""The oracle against a loop over single keys, and against cases whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_mlx.spec import (
    PatternConfig,
    full_attention,
    masked_attention,
    select_blocks,
    sparse_attention,
    visible,
    visible_mask,
)


def loop_attention(q, k, v, sees, scale):
    """Attention one key at a time in Python floats. sees(batch, head, row, key) -> bool."""
    batch, q_heads, q_tokens, head_dim = q.shape
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    group = q_heads // k.shape[1]
    for b, h, i in np.ndindex(batch, q_heads, q_tokens):
        keys = [j for j in range(k.shape[2]) if sees(b, h, i, j)]
        scores = [scale * math.fsum(q[b, h, i] * k[b, h // group, j]) for j in keys]
        if not keys:
            continue
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        lse[b, h, i] = top + math.log(math.fsum(weights))
        for d in range(head_dim):
            parts = [w * v[b, h // group, j, d] for w, j in zip(weights, keys, strict=True)]
            out[b, h, i, d] = math.fsum(parts) / math.fsum(weights)
    return out, lse


@st.composite
def attention_cases(draw):
    kv_tokens = draw(st.integers(1, 14))
    q_tokens = draw(st.integers(1, kv_tokens))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, head_dim = draw(st.integers(1, 2)), 5
    q = rng.standard_normal((batch, kv_heads * group, q_tokens, head_dim))
    k, v = rng.standard_normal((2, batch, kv_heads, kv_tokens, head_dim))
    pattern = PatternConfig(
        name=draw(st.sampled_from(["streaming", "triangle"])),
        block_size=draw(st.sampled_from([1, 2, 3])),
        sink_tokens=draw(st.integers(0, 4)),
        window_tokens=draw(st.integers(1, 7)),
        last_tokens=draw(st.integers(0, 3)),
    )
    return q, k, v, pattern, draw(st.none() | st.just(kv_tokens))


@given(case=attention_cases(), scale=st.sampled_from([None, 0.3]))
def test_sparse_is_the_loop(case, scale):
    q, k, v, pattern, prompt_tokens = case
    first = k.shape[2] - q.shape[2]

    def sees(b, h, i, j):
        return bool(visible(pattern, first + i, j, prompt_tokens))

    expected = loop_attention(q, k, v, sees, 5**-0.5 if scale is None else scale)
    actual = sparse_attention(q, k, v, pattern, prompt_tokens=prompt_tokens, scale=scale)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-12, atol=1e-13)


@given(case=attention_cases())
def test_full_is_the_loop(case):
    q, k, v, _, _ = case
    first = k.shape[2] - q.shape[2]
    expected = loop_attention(q, k, v, lambda b, h, i, j: j <= first + i, 0.7)
    actual = full_attention(q, k, v, scale=0.7)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-12, atol=1e-13)


def test_xattention_masks_by_the_kept_blocks_of_each_head():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, h, t, 4)) * 3 for h, t in ((4, 9), (2, 21), (2, 21)))
    pattern = PatternConfig(name="xattention", block_size=4, stride=2, threshold=0.5)
    kept = select_blocks(q, k, pattern)
    assert len({kept[0, h].tobytes() for h in range(4)}) > 1

    def sees(b, h, i, j):
        q_pos = 21 - 9 + i
        return j <= q_pos and kept[b, h, q_pos // 4 - 3, j // 4]

    expected = loop_attention(q, k, v, sees, 0.5)
    out, lse = sparse_attention(q, k, v, pattern, prompt_tokens=21)
    np.testing.assert_allclose(out, expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-12, atol=1e-13)


def test_equal_keys_give_the_mean_of_the_visible_values():
    v = np.arange(12.0).reshape(1, 1, 12, 1)
    pattern = PatternConfig(block_size=2, sink_tokens=2, window_tokens=4)
    out, lse = sparse_attention(np.ones((1, 1, 1, 1)), np.zeros((1, 1, 12, 1)), v, pattern)
    assert out.item() == pytest.approx((0 + 1 + 8 + 9 + 10 + 11) / 6)
    assert lse.item() == pytest.approx(math.log(6))


def test_a_row_that_sees_nothing_is_zero_with_lse_minus_infinity():
    x = np.ones((1, 1, 2, 3))
    mask = np.array([[False, False], [True, False]])
    out, lse = masked_attention(x, x, x, mask, 1.0)
    assert out.tolist() == [[[[0, 0, 0], [1, 1, 1]]]]
    assert lse[0, 0].tolist() == [-np.inf, 3.0]


def test_huge_scores_do_not_overflow():
    q = np.full((1, 1, 1, 2), 1e3)
    k = np.stack([np.full(2, 1e3), np.full(2, 0.9e3)])[None, None]
    out, lse = full_attention(q, k, np.array([[1.0, 2.0], [3.0, 4.0]])[None, None], scale=1.0)
    assert out.tolist() == [[[[1.0, 2.0]]]]
    assert lse.item() == 2e6


def test_default_scale_is_the_inverse_root_of_the_head_dim():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 1, 6, 16))
    np.testing.assert_array_equal(full_attention(q, k, v)[0], full_attention(q, k, v, scale=0.25)[0])


def test_query_head_reads_its_own_kv_head():
    v = np.zeros((1, 2, 1, 3))
    v[0, 1] = 1.0
    out, _ = full_attention(np.ones((1, 6, 1, 3)), np.ones((1, 2, 1, 3)), v)
    assert out[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_streaming_that_is_dense_is_full_attention():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 1, 2, 12, 4))
    pattern = PatternConfig(block_size=4, sink_tokens=4, window_tokens=8)
    assert pattern.is_dense(12)
    np.testing.assert_array_equal(visible_mask(pattern, 12, 12), np.tri(12, dtype=bool))
    np.testing.assert_array_equal(sparse_attention(q, k, v, pattern)[0], full_attention(q, k, v)[0])
