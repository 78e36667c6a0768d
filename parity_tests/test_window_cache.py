"""The cache of sink and window: what it hands out is attended to as all keys would be; cuts; a flat size."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache

from flux_mlx.attention import sparse_attention
from flux_mlx.spec import PatternConfig
from flux_mlx.window_cache import ROOM_TOKENS, DroppedKeysError, WindowKVCache

HEADS, D = 2, 8
patterns = st.builds(
    PatternConfig,
    block_size=st.sampled_from([1, 4, 8]),
    sink_tokens=st.integers(0, 17),
    window_tokens=st.integers(1, 30),
)


class Twins:
    """A cache of all keys and one of sink and window, fed alike."""

    def __init__(self, pattern: PatternConfig, more: int = 1, seed: int = 0):
        self.pattern, self.rng = pattern, np.random.default_rng(seed)
        self.all = KVCache()
        self.all.update_and_fetch(*self.draw(pattern.dense_tokens + more))
        self.window = WindowKVCache.of(copy.deepcopy(self.all), pattern)

    def draw(self, tokens: int) -> tuple[mx.array, mx.array]:
        shape = (1, HEADS, tokens, D)
        return tuple(mx.array(self.rng.standard_normal(shape).astype(np.float32)) for _ in range(2))

    def feed(self, tokens: int) -> None:
        """Append keys to both; the queries of these positions must see the same in both."""
        keys, values = self.draw(tokens)
        q = mx.concatenate(self.draw(tokens), axis=1)
        whole, kept = (cache.update_and_fetch(keys, values) for cache in (self.all, self.window))
        expected, found = (sparse_attention(q, *kv, self.pattern) for kv in (whole, kept))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert self.window.offset == self.all.offset

    def most_rows(self) -> int:
        """Rows that the buffers may have: sink, window, the block that is being filled, room."""
        return self.pattern.dense_tokens + self.pattern.block_size + ROOM_TOKENS


@given(
    pattern=patterns,
    more=st.integers(1, 40),
    calls=st.lists(st.one_of(st.integers(1, 20), st.sampled_from([150, 257, 300])), min_size=1, max_size=8),
)
def test_queries_see_the_same_as_among_all_keys(pattern, more, calls):
    twins = Twins(pattern, more)
    for tokens in calls:
        twins.feed(tokens)
        assert twins.window.keys.shape[2] <= twins.most_rows() + 20


@given(pattern=patterns, steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_cuts_that_are_possible_leave_the_same(pattern, steps):
    twins = Twins(pattern)
    for tokens, cut in steps:
        twins.feed(tokens)
        kept = min(cut, tokens)  # what a verification call takes back is always possible
        assert twins.window.can_trim(kept)
        if twins.window.can_trim(cut):
            assert twins.window.trim(cut) == twins.all.trim(cut) == cut
        else:
            before = copy.deepcopy(vars(twins.window))
            with pytest.raises(DroppedKeysError, match=rf"\[trim\] under the KV policy evict.*got {cut} of"):
                twins.window.trim(cut)
            assert vars(twins.window).keys() == before.keys()
            assert twins.window.offset == before["offset"]


def test_a_cut_over_the_edge_of_a_block_is_possible_once():
    pattern = PatternConfig(block_size=8, sink_tokens=8, window_tokens=16)
    twins = Twins(pattern, more=40)
    for _ in range(8 - twins.all.offset % 8 + 2):
        twins.feed(1)
    assert twins.window.offset % 8 == 2
    assert twins.window.trim(4) == twins.all.trim(4) == 4
    assert not twins.window.can_trim(8)
    for _ in range(20):
        twins.feed(1)


def test_decode_keeps_its_size_and_moves_rarely():
    pattern, moves = PatternConfig(block_size=8, sink_tokens=8, window_tokens=16), 0
    twins = Twins(pattern)
    size = twins.window.nbytes
    for _ in range(3 * ROOM_TOKENS):
        twins.window.update_and_fetch(*twins.draw(1))
        moves += twins.window._start == 0
        mx.eval(twins.window.state)
        assert twins.window.nbytes <= size + 8 * 2 * 4 * HEADS * D * pattern.block_size
    assert moves <= 3 * pattern.block_size + pattern.block_size


def test_what_stock_code_asks():
    twins = Twins(PatternConfig(block_size=8, sink_tokens=8, window_tokens=16), more=30)
    window = twins.window
    assert (window.size(), window.empty(), window.is_trimmable()) == (54, False, True)
    assert window.make_mask(1, return_array=False, window_size=None) is None
    assert window.make_mask(3, return_array=True, window_size=None).shape == (3, 57)
    other = copy.deepcopy(window)
    other.update_and_fetch(*twins.draw(5))
    assert window.offset == 54
    twins.feed(1)
