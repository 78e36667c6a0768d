"""XAttention's choice of blocks: the formula read off token by token, and the smallest set found by trying them all."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_mlx.spec import PatternConfig, block_mass, choose_blocks, expand_blocks, group_scores, select_blocks


def token(x, b, h, position, first):
    """Token at an absolute position, zero outside the ones at hand."""
    inside = first <= position < first + x.shape[2]
    return x[b, h, position - first] if inside else np.zeros(x.shape[-1])


def loop_score(q, k, b, h, i, j, stride):
    """G[i, j] for absolute groups i and j, by the formula."""
    first, kv_head = k.shape[2] - q.shape[2], h // (q.shape[1] // k.shape[1])
    total = sum(
        token(q, b, h, i * stride + stride - 1 - t, first) @ token(k, b, kv_head, j * stride + t, 0)
        for t in range(stride)
    )
    return total / (math.sqrt(q.shape[-1]) * stride)


def loop_mass(q, k, b, h, block_size, stride):
    """A[m, n] of one head, a dict over absolute blocks, one softmax row at a time."""
    mass = {}
    for i in range((k.shape[2] - q.shape[2]) // stride, -(-k.shape[2] // stride)):
        row = [math.exp(loop_score(q, k, b, h, i, j, stride)) for j in range(i + 1)]
        for j, weight in enumerate(row):
            at = i * stride // block_size, j * stride // block_size
            mass[at] = mass.get(at, 0.0) + weight / sum(row)
    return mass


@st.composite
def score_cases(draw):
    """(q, k, block_size, stride) with any offset, tails that do not fill a group, and grouped heads."""
    stride = draw(st.sampled_from([1, 2, 3]))
    block_size = stride * draw(st.integers(1, 3))
    kv_tokens = draw(st.integers(1, 19))
    q_tokens = draw(st.integers(1, kv_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    q = rng.standard_normal((1, 4, q_tokens, 3)) * 2
    return q, rng.standard_normal((1, 2, kv_tokens, 3)) * 2, block_size, stride


@given(case=score_cases())
def test_group_scores_by_the_formula(case):
    q, k, _, stride = case
    scores = group_scores(q, k, stride)
    first = (k.shape[2] - q.shape[2]) // stride
    assert scores.shape[2:] == (-(-k.shape[2] // stride) - first, -(-k.shape[2] // stride))
    for h, i, j in itertools.product(range(4), range(scores.shape[2]), range(scores.shape[3])):
        assert scores[0, h, i, j] == pytest.approx(loop_score(q, k, 0, h, first + i, j, stride), abs=1e-12)


@given(case=score_cases())
def test_block_mass_by_the_formula(case):
    q, k, block_size, stride = case
    mass = block_mass(q, k, block_size, stride)
    first = (k.shape[2] - q.shape[2]) // block_size
    for h in range(4):
        expected = loop_mass(q, k, 0, h, block_size, stride)
        for r, n in itertools.product(range(mass.shape[2]), range(mass.shape[3])):
            assert mass[0, h, r, n] == pytest.approx(expected.get((first + r, n), 0.0), abs=1e-12)


def smallest_sets(mass, m, threshold):
    """(size, best mass) of the smallest sets that hold 0 and m, lie at or below m and reach the threshold."""
    others = [n for n in range(m + 1) if n not in (0, m)]
    total = math.fsum(mass)
    for size in range(len(others) + 1):
        sets = [{0, m, *extra} for extra in itertools.combinations(others, size)]
        best = max(math.fsum(mass[n] for n in kept) for kept in sets)
        if best >= threshold * total - 1e-12 or size == len(others):
            return len({0, m}) + size, best
    raise AssertionError("unreachable: the loop ends with every block")


@given(seed=st.integers(0, 9999), first=st.integers(0, 4), threshold=st.sampled_from([0.1, 0.5, 0.9, 0.97]))
def test_the_kept_set_is_the_smallest_that_reaches_the_threshold(seed, first, threshold):
    rows = 3
    mass = np.random.default_rng(seed).gamma(0.3, size=(rows, first + rows))
    mass = np.where(np.arange(first + rows) <= first + np.arange(rows)[:, None], mass, 0.0)
    kept = choose_blocks(mass, first, threshold, None)
    for r in range(rows):
        chosen = set(np.flatnonzero(kept[r]).tolist())
        size, best = smallest_sets(mass[r], first + r, threshold)
        assert {0, first + r} <= chosen <= set(range(first + r + 1))
        assert (len(chosen), math.fsum(mass[r][sorted(chosen)])) == (size, pytest.approx(best))


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.5, [0, 4]), (0.55, [0, 1, 4]), (0.7, [0, 1, 3, 4]), (0.9, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4])],
)
def test_threshold_by_hand(threshold, kept):
    mass = np.array([[0.125, 0.1875, 0.125, 0.1875, 0.375]])
    assert np.flatnonzero(choose_blocks(mass, 4, threshold, None)[0]).tolist() == kept


def test_top_k_counts_the_forced_blocks_and_never_drops_them():
    mass = np.array([[0.1, 0.4, 0.2, 0.3, 0.0, 0.0]])
    kept = [np.flatnonzero(choose_blocks(mass, 4, 0.9, k)[0]).tolist() for k in (1, 2, 3, 4, 9)]
    assert kept == [[0, 4], [0, 4], [0, 1, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]


def test_equal_masses_prefer_the_lower_index():
    mass = np.full((1, 6), 1.0)
    assert np.flatnonzero(choose_blocks(mass, 5, 0.6, None)[0]).tolist() == [0, 1, 2, 5]


def test_a_key_that_every_group_looks_at_keeps_its_block():
    q = np.ones((1, 1, 64, 4))
    k = np.zeros((1, 1, 64, 4))
    k[0, 0, 24:32] = 40.0
    pattern = PatternConfig(name="xattention", block_size=8, stride=4)
    kept = select_blocks(q, k, pattern)[0, 0]
    assert [np.flatnonzero(row).tolist() for row in kept[4:]] == [[0, 3, m] for m in range(4, 8)]


@given(case=score_cases())
def test_expanded_blocks_are_causal_inside(case):
    q, k, block_size, stride = case
    pattern = PatternConfig(name="xattention", block_size=block_size, stride=stride, threshold=0.6)
    kept = select_blocks(q, k, pattern)
    q_tokens, kv_tokens = q.shape[2], k.shape[2]
    mask = expand_blocks(kept, block_size, q_tokens, kv_tokens)
    first = (kv_tokens - q_tokens) // block_size
    for h, i, j in itertools.product(range(4), range(q_tokens), range(kv_tokens)):
        q_pos = kv_tokens - q_tokens + i
        assert mask[0, h, i, j] == (j <= q_pos and kept[0, h, q_pos // block_size - first, j // block_size])
