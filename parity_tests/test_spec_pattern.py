"""The pattern by position: hand-made rows, then the two rules written out as loops over single pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_mlx.spec import PatternConfig, block_table, kept_blocks, visible, visible_mask, visible_pairs

STREAMING = PatternConfig(block_size=4, sink_tokens=4, window_tokens=8)
TRIANGLE = PatternConfig(name="triangle", block_size=4, sink_tokens=4, window_tokens=8, last_tokens=3)


def seen_keys(pattern, q_pos, kv_tokens, prompt_tokens=None):
    return np.flatnonzero(visible(pattern, q_pos, np.arange(kv_tokens), prompt_tokens)).tolist()


def sees(pattern, q, k, prompt_tokens):
    """The rule for one pair, in whole numbers and words: what `visible` must say."""
    if k > q:
        return False
    if pattern.name == "triangle" and prompt_tokens is not None:
        last = range(prompt_tokens - pattern.last_tokens, prompt_tokens)
        if q in last:
            return True
    in_sink = any(k in range(b * pattern.block_size, (b + 1) * pattern.block_size) for b in range(pattern.sink_blocks))
    blocks_back = q // pattern.block_size - k // pattern.block_size
    return in_sink or blocks_back < pattern.window_blocks


@pytest.mark.parametrize(
    ("q_pos", "keys"),
    [
        (0, [0]),
        (3, [0, 1, 2, 3]),
        (8, list(range(9))),
        (11, list(range(12))),
        (12, [0, 1, 2, 3, *range(8, 13)]),
        (15, [0, 1, 2, 3, *range(8, 16)]),
        (16, [0, 1, 2, 3, *range(12, 17)]),
    ],
)
def test_streaming_rows_by_hand(q_pos, keys):
    assert seen_keys(STREAMING, q_pos, 20) == keys


def test_unrounded_window_counts_the_query():
    pattern = PatternConfig(block_size=1, sink_tokens=2, window_tokens=3)
    assert seen_keys(pattern, 9, 12) == [0, 1, 7, 8, 9]
    assert seen_keys(PatternConfig(block_size=1, sink_tokens=0, window_tokens=1), 9, 12) == [9]


def test_sizes_are_rounded_up_to_blocks():
    rounded = PatternConfig(block_size=4, sink_tokens=1, window_tokens=5)
    np.testing.assert_array_equal(visible_mask(rounded, 23, 23), visible_mask(STREAMING, 23, 23))


def test_triangle_shows_all_to_the_last_queries_of_the_prompt_alone():
    rows = [seen_keys(TRIANGLE, q, 24, prompt_tokens=20) for q in range(24)]
    streaming = [seen_keys(STREAMING, q, 24) for q in range(24)]
    assert rows[17:20] == [list(range(18)), list(range(19)), list(range(20))]
    assert rows[:17] == streaming[:17]
    assert rows[20:] == streaming[20:]


@pytest.mark.parametrize("pattern", [TRIANGLE, PatternConfig(name="xattention", block_size=4, stride=2)])
def test_without_a_known_prompt_every_pattern_is_streaming(pattern):
    streaming = PatternConfig(
        block_size=4, sink_tokens=pattern.sink_tokens, window_tokens=pattern.window_tokens, stride=2
    )
    np.testing.assert_array_equal(visible_mask(pattern, 9, 23), visible_mask(streaming, 9, 23))


@st.composite
def pattern_cases(draw):
    """(pattern, q_tokens, kv_tokens, prompt_tokens), small enough for a double loop."""
    pattern = PatternConfig(
        name=draw(st.sampled_from(["streaming", "triangle"])),
        block_size=draw(st.sampled_from([1, 2, 3, 5, 8])),
        sink_tokens=draw(st.integers(0, 12)),
        window_tokens=draw(st.integers(1, 40)),
        last_tokens=draw(st.integers(0, 9)),
    )
    kv_tokens = draw(st.integers(1, 33))
    q_tokens = draw(st.integers(1, kv_tokens))
    return pattern, q_tokens, kv_tokens, draw(st.none() | st.integers(1, kv_tokens + 2))


@given(case=pattern_cases())
def test_mask_is_the_rule_pair_by_pair(case):
    pattern, q_tokens, kv_tokens, prompt_tokens = case
    expected = [
        [sees(pattern, q, k, prompt_tokens) for k in range(kv_tokens)] for q in range(kv_tokens - q_tokens, kv_tokens)
    ]
    np.testing.assert_array_equal(visible_mask(pattern, q_tokens, kv_tokens, prompt_tokens), expected)


@given(case=pattern_cases())
def test_window_start_is_the_first_local_key(case):
    pattern, _, kv_tokens, _ = case
    for q in range(kv_tokens):
        local = [k for k in range(q + 1) if q // pattern.block_size - k // pattern.block_size < pattern.window_blocks]
        assert pattern.window_start(q) == local[0]


@given(case=pattern_cases())
def test_dense_means_that_nothing_causal_is_hidden(case):
    pattern, _, kv_tokens, _ = case
    nothing_hidden = np.array_equal(visible_mask(pattern, kv_tokens, kv_tokens), np.tri(kv_tokens, dtype=bool))
    assert pattern.is_dense(kv_tokens) == nothing_hidden
    assert pattern.is_dense(0)


@given(case=pattern_cases())
def test_pairs_are_the_visible_ones_counted(case):
    pattern, q_tokens, kv_tokens, prompt_tokens = case
    for prompt in (None, prompt_tokens):
        assert visible_pairs(pattern, q_tokens, kv_tokens, prompt) == visible_mask(*case[:3], prompt).sum()
    assert visible_pairs(None, q_tokens, kv_tokens) == sum(range(kv_tokens - q_tokens + 1, kv_tokens + 1))


@given(case=pattern_cases())
def test_kept_blocks_are_those_with_a_visible_pair(case):
    pattern, q_tokens, kv_tokens, _ = case
    kept = kept_blocks(pattern, q_tokens, kv_tokens)
    block, first = pattern.block_size, (kv_tokens - q_tokens) // pattern.block_size
    mask = visible_mask(pattern, kv_tokens - first * block, kv_tokens)
    for row, column in np.ndindex(kept.shape):
        tile = mask[row * block : (row + 1) * block, column * block : (column + 1) * block]
        assert kept[row, column] == tile.any()


@given(case=pattern_cases())
def test_block_table_rebuilds_the_mask(case):
    """Full blocks are visible whole, partial ones under the causal rule, and nothing else is visible."""
    pattern, q_tokens, kv_tokens, _ = case
    block = pattern.block_size
    table = block_table(block, kept_blocks(pattern, q_tokens, kv_tokens), q_tokens, kv_tokens)
    mask = visible_mask(pattern, q_tokens, kv_tokens)
    rebuilt = np.zeros_like(mask)
    for i, q in enumerate(range(kv_tokens - q_tokens, kv_tokens)):
        row = q // block - table.first_q_block
        for n in table.full_kv_indices[row, : table.full_kv_num_blocks[row]]:
            rebuilt[i, n * block : (n + 1) * block] = True
        for n in table.kv_indices[row, : table.kv_num_blocks[row]]:
            rebuilt[i, n * block : min((n + 1) * block, q + 1)] = True
    np.testing.assert_array_equal(rebuilt, mask)


@given(case=pattern_cases())
def test_block_table_is_packed_ascending_and_zero_filled(case):
    pattern, q_tokens, kv_tokens, _ = case
    table = block_table(pattern.block_size, kept_blocks(pattern, q_tokens, kv_tokens), q_tokens, kv_tokens)
    for counts, indices in (
        (table.kv_num_blocks, table.kv_indices),
        (table.full_kv_num_blocks, table.full_kv_indices),
    ):
        assert counts.dtype == indices.dtype == np.int32
        for count, row in zip(counts, indices, strict=True):
            assert (np.diff(row[:count]) > 0).all()
            assert not row[count:].any()


def test_block_table_per_head_and_above_the_diagonal():
    kept = np.ones((2, 3, 2, 4), bool)
    table = block_table(4, kept, q_tokens=7, kv_tokens=15)
    assert table.first_q_block == 2
    assert table.full_kv_num_blocks.tolist() == [[[2, 3]] * 3] * 2
    assert table.kv_indices[1, 2].tolist() == [[2, 0, 0, 0], [3, 0, 0, 0]]


def test_block_table_refuses_a_wrong_number_of_blocks():
    with pytest.raises(ValueError, match=r"kept must end in \(2, 4\), got \(4, 4\)"):
        block_table(4, np.ones((4, 4), bool), q_tokens=7, kv_tokens=15)
