"""Every tolerance of the suite, in one place: an error budget measured against the oracle, not a guessed number.

Oracle: `flux_mlx.spec` in float64. Baseline: the same maths at the dtype (`baseline_attention`). Candidate: the backend
under test. All three read the same quantised inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

DTYPES = ("float32", "float16", "bfloat16")
BUDGET_FACTOR = 2.0  # a candidate may be this much worse than the baseline,
BUDGET_ULPS = 2.0  # plus this many units in the last place of the largest oracle value
RMS_RATIO = {"float32": 1e-5, "float16": 0.005, "bfloat16": 0.005}
MODEL_ATOL = 2e-5  # float32 logits of order 1 of a tiny model, the same maths cut into other calls
NEAR_TIE = 1e-4  # decisions with a smaller margin are reported, not compared
MANTISSA_BITS = {"float32": 23, "float16": 10, "bfloat16": 7}


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` rounded to the nearest value of `dtype` (ties to even), as float32."""
    x = np.asarray(x, np.float32)
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def ulp(x: np.ndarray, dtype: str) -> float:
    """Unit in the last place of `dtype` at the largest finite magnitude of `x`."""
    magnitude = np.abs(x[np.isfinite(x)]).max(initial=0.0)
    exponent = np.floor(np.log2(magnitude)) if magnitude > 0 else -14
    return float(2.0 ** (max(exponent, -14) - MANTISSA_BITS[dtype]))


def baseline_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    scale: float,
    dtype: str,
    score_dtype: str = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """`spec.masked_attention` at the dtype: products and sums in float32, weights and result rounded to `dtype`.

    Args:
        score_dtype: dtype that the scores are rounded to.

    Returns:
        (out `[B, HQ, L, D]`, lse `[B, HQ, L]`), float32. Every row must see a key.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = round_to(np.float32(scale) * (q @ k.swapaxes(-1, -2)), score_dtype)
    scores = np.where(mask, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = round_to(round_to(weights / total, dtype) @ v, dtype)
    return out, (top + np.log(total))[..., 0]


def score_slack(q: np.ndarray, k: np.ndarray, scale: float, score_dtype: str) -> float:
    """2 ulp of the largest score that these norms allow: two right ways to sum one score differ by about that.

    The baseline shows one way, and with few keys it can be right by luck. An error e of the scores moves the lse by e
    and an output by at most e times the standard deviation of the values under the attention weights.
    """
    largest = scale * np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    return BUDGET_ULPS * ulp(np.array(largest), score_dtype)


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@dataclass(frozen=True)
class Reference:
    """What a result is judged by.

    Args:
        oracle: float64.
        baseline: The same result at the dtype.
        dtype: dtype of the result.
        slack: Error allowed besides (`score_slack`).
    """

    oracle: np.ndarray
    baseline: np.ndarray
    dtype: str
    slack: float = 0.0

    @property
    def budget(self) -> float:
        """Largest error that a candidate may have anywhere."""
        return BUDGET_FACTOR * float(np.abs(self.baseline - self.oracle).max()) + self.room

    @property
    def room(self) -> float:
        """What is allowed besides the baseline's own error."""
        return BUDGET_ULPS * ulp(self.oracle, self.dtype) + self.slack

    def check(self, what: str, candidate: np.ndarray, part: Any = ...) -> None:
        """Fail unless max|candidate - oracle| <= 2 max|baseline - oracle| + 2 ulp + slack, and the RMS is small too.

        The RMS error may reach `RMS_RATIO[dtype]` of the oracle's RMS, or the same budget over the baseline's own RMS
        error where the inputs are so hard that the baseline misses the ratio.

        Args:
            what: Name of the result, for the message.
            candidate: Any real dtype, the shape of `oracle[part]`.
            part: Index of the part of the result that `candidate` is.
        """
        oracle = self.oracle[part]
        if candidate.shape != oracle.shape:
            raise AssertionError(f"{what}: expected shape {oracle.shape}, got {candidate.shape}.")
        error = np.abs(candidate - oracle)
        if not error.max() <= self.budget:
            at = tuple(map(int, np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)))
            raise AssertionError(f"{what}: error {error.max():.3g} at {at}, over the budget {self.budget:.3g}.")
        size = rms(self.oracle)
        limit = max(RMS_RATIO[self.dtype] * size, BUDGET_FACTOR * rms(self.baseline - self.oracle) + self.room)
        if not rms(error) <= limit:
            raise AssertionError(
                f"{what}: RMS error {rms(error):.3g}, over {limit:.3g} (RMS of the oracle {size:.3g})."
            )


def network_reference(oracle: np.ndarray, baseline: np.ndarray) -> Reference:
    """Reference for float32 results of a whole network.

    Rounding grows over the layers, and a baseline of few numbers may show little of it, all the more if it shares
    rotary tables and the order of every sum with the oracle: `RMS_RATIO` of the largest value is allowed besides.
    """
    return Reference(oracle, baseline, "float32", slack=RMS_RATIO["float32"] * float(np.abs(oracle).max()))
