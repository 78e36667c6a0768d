"""Numbers of a cell from the scores of its samples: means, paired differences, bounds, routes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuda_reference.data_prompts import Sample
from cuda_reference.scoring import Score
from flux_mlx.spec import PatternConfig, visible_pairs

RESAMPLES = 4000
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
        accuracy_diff_bound (one-sided, 5 %). With needles: by_depth. Bounds are of a paired bootstrap over the samples.
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


def difference_bounds(difference: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of paired differences in {-1, 0, 1} and its bootstrap bounds.

    A resample of the samples is a multinomial draw of how often each of the three values occurs.
    """
    n = len(difference)
    shares = [float((difference == value).mean()) for value in (-1, 1)]
    draws = np.random.default_rng(seed).multinomial(n, [*shares, max(0.0, 1.0 - sum(shares))], RESAMPLES)
    low, bound, high = np.quantile((draws[:, 1] - draws[:, 0]) / n, (0.025, 0.05, 0.975))
    return {
        "accuracy_diff": float(difference.mean()),
        "accuracy_diff_low": float(low),
        "accuracy_diff_bound": float(bound),
        "accuracy_diff_high": float(high),
    }


def _ratio_bounds(nll: np.ndarray, base: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap bounds of mean(nll) / mean(base), resampling pairs."""
    rng, n = np.random.default_rng(seed), len(nll)
    chosen = (rng.integers(n, size=n) for _ in range(RESAMPLES // 4))
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
