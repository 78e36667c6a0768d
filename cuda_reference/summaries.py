"""Numbers of a cell from the scores of its samples: means, paired differences, bounds, routes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cuda_reference.data_prompts import Sample
from cuda_reference.scoring import Score
from flux_mlx.spec import PatternConfig, visible_pairs

RESAMPLES = 1000
Z_ONE_SIDED, Z_TWO_SIDED = 1.6448536269514722, 1.959963984540054  # 5 % above the first, 2.5 % above the second
DEPTH_BINS = 5


def summary(
    samples: Sequence[Sample], scores: Sequence[Score], base: Sequence[Score], pattern: PatternConfig | None = None
) -> dict[str, object]:
    """Means of a cell, and paired differences from the base policy on the same samples.

    Args:
        samples, scores, base: One of each for every sample.
        pattern: Of the sparse layers, to count visible pairs; None leaves the count out.

    Returns:
        nll, nll_ratio (of the means, to the base) with its 95 % bounds nll_ratio_low and nll_ratio_high, omega,
        omega_std, exact (share of answers that greedy decoding gives), exact_base; pairs: visible pairs as a share of
        those of full attention (not for xattention, whose pairs depend on the data). With candidates: accuracy,
        accuracy_base, accuracy_diff, its bounds accuracy_diff_low and accuracy_diff_high (2.5 and 97.5 %) and
        accuracy_diff_bound (one-sided, 5 %), by `difference_bounds`. With needles: by_depth. Bounds of nll_ratio are of
        a paired bootstrap over the samples.
    """
    nll, base_nll = (np.array([s.nll for s in part]) for part in (scores, base))
    omega = np.array([s.omega for s in scores])
    low, high = _ratio_bounds(nll, base_nll)
    found: dict[str, object] = {
        "samples": len(scores),
        "nll": float(nll.mean()),
        "nll_ratio": float(nll.mean() / base_nll.mean()),
        "nll_ratio_low": low,
        "nll_ratio_high": high,
        "omega": float(omega.mean()),
        "omega_std": float(omega.std()),
        "exact": float(np.mean([s.exact for s in scores])),
        "exact_base": float(np.mean([s.exact for s in base])),
    }
    if pattern is not None and pattern.name != "xattention":
        found["pairs"] = _pairs(samples, omega, pattern)
    if samples[0].candidates:
        right, base_right = (np.array([s.chosen == 0 for s in part], float) for part in (scores, base))
        found |= {"accuracy": float(right.mean()), "accuracy_base": float(base_right.mean())}
        found |= difference_bounds(right - base_right)
        if np.isfinite(samples[0].depth):
            found["by_depth"] = _by_depth(samples, right, base_right, nll, base_nll)
    return found


def difference_bounds(difference: np.ndarray) -> dict[str, float]:
    """Mean of paired differences in {-1, 0, 1} and its bounds: Tango's score interval (Stat. Med. 17, 1998, 891-908).

    Unlike a bootstrap it does not shrink to nothing where no pair differs: then it is z^2 / (n + z^2) wide.
    """
    counts = len(difference), int((difference > 0).sum()), int((difference < 0).sum())
    return {
        "accuracy_diff": float(difference.mean()),
        "accuracy_diff_low": _score_bound(*counts, Z_TWO_SIDED),
        "accuracy_diff_bound": _score_bound(*counts, Z_ONE_SIDED),
        "accuracy_diff_high": _score_bound(*counts, -Z_TWO_SIDED),
    }


def _score_bound(n: int, gained: int, lost: int, z: float) -> float:
    """The difference whose score statistic is `z`: the statistic falls from inf at -1 to -inf at 1."""
    low, high = -1.0, 1.0
    for _ in range(60):
        delta = (low + high) / 2
        b, c = (2 * n - gained + lost) * delta - gained - lost, -lost * delta * (1 - delta)
        share_lost = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)  # its likeliest value under this difference
        variance = n * (2 * share_lost + delta * (1 - delta))
        above = gained - lost - n * delta
        low, high = (delta, high) if above > z * math.sqrt(max(variance, 1e-300)) else (low, delta)
    return (low + high) / 2


def _ratio_bounds(nll: np.ndarray, base: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap bounds of mean(nll) / mean(base), resampling pairs."""
    rng, n = np.random.default_rng(seed), len(nll)
    chosen = (rng.integers(n, size=n) for _ in range(RESAMPLES))
    low, high = np.quantile([nll[rows].mean() / base[rows].mean() for rows in chosen], (0.025, 0.975))
    return float(low), float(high)


def _pairs(samples: Sequence[Sample], omega: np.ndarray, pattern: PatternConfig) -> float:
    """Visible (query, key) pairs of all layers as a share of those of full attention, mean over the samples."""
    sizes = [(len(s.tokens), s.prompt_tokens) for s in samples]
    shares = {(n, m): visible_pairs(pattern, n, n, m) / visible_pairs(None, n, n) for n, m in set(sizes)}
    each = [1.0 - o * (1.0 - shares[size]) for size, o in zip(sizes, omega, strict=True)]
    return float(np.mean(each))


def _by_depth(
    samples: Sequence[Sample], right: np.ndarray, base_right: np.ndarray, nll: np.ndarray, base_nll: np.ndarray
) -> list[dict[str, float]]:
    """The same by fifths of the text, from its start to its end."""
    bins = np.minimum((np.array([s.depth for s in samples]) * DEPTH_BINS).astype(int), DEPTH_BINS - 1)
    found = []
    for index in range(DEPTH_BINS):
        rows = bins == index
        if rows.any():
            found.append(
                {
                    "depth": (index + 0.5) / DEPTH_BINS,
                    "samples": int(rows.sum()),
                    "accuracy": float(right[rows].mean()),
                    "accuracy_base": float(base_right[rows].mean()),
                    "nll_ratio": float(nll[rows].mean() / base_nll[rows].mean()),
                }
            )
    return found


def route_statistics(scores: Sequence[Score], shown: int = 16) -> dict[str, object]:
    """Share of full routes by layer, their mean entropy in bits (0: every sample is routed alike), and some routes."""
    full = np.array([s.full for s in scores])
    return {
        "full_by_layer": [round(float(x), 4) for x in full.mean(0)],
        "entropy_bits": float(entropy_bits(full.mean(0)).mean()),
        "routes": ["".join("F" if f > 0.5 else "s" for f in s.full) for s in scores[:shown]],
    }


def entropy_bits(p: np.ndarray) -> np.ndarray:
    """Entropy of a decision that is full with probability p."""
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


def equal_routes(scores: Sequence[Score], others: Sequence[Score]) -> float:
    """Share of (sample, layer) routed alike."""
    ours, theirs = (np.array([s.full for s in part]) > 0.5 for part in (scores, others))
    return float((ours == theirs).mean())
