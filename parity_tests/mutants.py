"""Wrong attention, one mistake each: the suite must fail every one of them by a property's name.

A mutant is the numpy backend with one line changed. `README.md` lists them with the properties that catch them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flux_mlx.spec import PatternConfig
from parity_tests.backends import NUMPY, Arrays, Backend, masked_backend, spec_mask
from parity_tests.strategies import Case
from parity_tests.tolerances import baseline_attention, round_to


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Args:
        mistake: In words.
        part: "attention", "router" or "blocks": whose properties must catch it.
        backend: The numpy backend with the mistake.
    """

    mistake: str
    part: str
    backend: Backend


MUTANTS: dict[str, Mutant] = {}


def add(part: str, mistake: str, backend: Backend) -> None:
    """Put a mutant on the list."""
    MUTANTS[mistake] = Mutant(mistake, part, replace(backend, name="mutant"))


def pattern_mutant(mistake: str, change: Callable[[PatternConfig], PatternConfig]) -> None:
    """A backend that reads the pattern's sizes wrong."""

    def mask_of(case: Case, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        pattern = None if case.pattern is None else change(case.pattern)
        return spec_mask(replace(case, pattern=pattern), q, k)

    add("attention", mistake, masked_backend("", mask_of))


def mask_mutant(mistake: str) -> Callable[[Callable], None]:
    """A backend with another rule in the pattern's place: rule(q_pos `[L, 1]`, k_pos `[1, S]`, pattern, case)."""

    def make(rule: Callable[[np.ndarray, np.ndarray, PatternConfig, Case], np.ndarray]) -> None:
        def mask_of(case: Case, q: np.ndarray, k: np.ndarray) -> np.ndarray:
            if case.pattern is None:
                return spec_mask(case, q, k)
            k_pos = np.arange(k.shape[2])[None, :]
            q_pos = np.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
            mask = rule(q_pos, k_pos, case.pattern, case)
            return mask | (~mask.any(-1, keepdims=True) & (k_pos == 0))  # a row sees something

        add("attention", mistake, masked_backend("", mask_of))

    return make


def streaming(q: np.ndarray, k: np.ndarray, p: PatternConfig) -> np.ndarray:
    """Sink or window, without the causal rule."""
    return (k // p.block_size < p.sink_blocks) | (k // p.block_size > q // p.block_size - p.window_blocks)


pattern_mutant("window one block wider", lambda p: replace(p, window_tokens=p.window_tokens + p.block_size))
pattern_mutant("window one block narrower", lambda p: replace(p, window_tokens=max(1, p.window_tokens - p.block_size)))
pattern_mutant("sink dropped", lambda p: replace(p, sink_tokens=0))
pattern_mutant("sink one block wider", lambda p: replace(p, sink_tokens=p.sink_tokens + p.block_size))
pattern_mutant(
    "sink rounded down to blocks", lambda p: replace(p, sink_tokens=p.sink_tokens - p.sink_tokens % p.block_size)
)
pattern_mutant("triangle's last queries one too few", lambda p: replace(p, last_tokens=max(0, p.last_tokens - 1)))
pattern_mutant("triangle computed as streaming", lambda p: replace(p, name="streaming"))


@mask_mutant("diagonal excluded")
def _diagonal_excluded(q, k, p, case):
    return (k < q) & streaming(q, k, p)


@mask_mutant("causal off by one: the next key is visible")
def _next_key_visible(q, k, p, case):
    return (k <= q + 1) & streaming(q, k, p)


@mask_mutant("query's block index rounded up")
def _block_index_rounded_up(q, k, p, case):
    return (k <= q) & streaming(-(-q // p.block_size) * p.block_size, k, p)


@mask_mutant("window not rounded to blocks")
def _window_not_rounded(q, k, p, case):
    return (k <= q) & ((k < p.sink_span) | (k > q - p.window_tokens))


@mask_mutant("sink visible to earlier queries")
def _sink_not_causal(q, k, p, case):
    return streaming(q, k, p) & ((k <= q) | (k < p.sink_span))


@mask_mutant("own block hidden")
def _own_block_hidden(q, k, p, case):
    return (k < q - q % p.block_size) & streaming(q, k, p)


@mask_mutant("query positions start at 0 after a prefix")
def _prefix_forgotten(q, k, p, case):
    return (k <= q) & streaming(q - q[0], k, p)


@mask_mutant("causal rule aligned to the first key")
def _upper_left(q, k, p, case):
    return (k <= q - q[0]) & streaming(q, k, p)


@mask_mutant("triangle's last queries counted from the last key")
def _last_from_the_keys(q, k, p, case):
    last = p.name == "triangle" and case.prompt_tokens is not None
    return (k <= q) & (streaming(q, k, p) | (last & (q >= k.size - p.last_tokens)))


@mask_mutant("triangle shows all to queries after the prompt")
def _last_without_end(q, k, p, case):
    last = p.name == "triangle" and case.prompt_tokens is not None
    return (k <= q) & (streaming(q, k, p) | (last & (q >= (case.prompt_tokens or 0) - p.last_tokens)))


@mask_mutant("triangle in chunked calls")
def _last_in_chunks(q, k, p, case):
    prompt = k.size if case.prompt_tokens is None else case.prompt_tokens
    last = (q >= prompt - p.last_tokens) & (q < prompt)
    return (k <= q) & (streaming(q, k, p) | ((p.name == "triangle") & last))


def call_mutant(mistake: str) -> Callable[[Callable], None]:
    """A backend that reads its tensors or its settings wrong: change(q, k, v, case) gives ((q, k, v), case)."""

    def make(change: Callable[..., tuple[Arrays, Case]]) -> None:
        add("attention", mistake, replace(NUMPY, attend=lambda qkv, case: NUMPY.attend(*change(*qkv, case))))

    return make


@call_mutant("query heads dealt to KV heads in turn")
def _interleaved_heads(q, k, v, case):
    heads = np.arange(q.shape[1]) % k.shape[1]
    return (q, k[:, heads], v[:, heads]), case


@call_mutant("scale left out")
def _no_scale(q, k, v, case):
    return (q, k, v), replace(case, scale=1.0)


@call_mutant("scale D**-0.5 whatever was asked")
def _own_scale(q, k, v, case):
    return (q, k, v), replace(case, scale=None)


@call_mutant("every sample reads the first one's keys")
def _first_sample(q, k, v, case):
    return (q, np.broadcast_to(k[:1], k.shape), v), case


@call_mutant("computed in float16")
def _half(q, k, v, case):
    return tuple(round_to(x, "float16") for x in (q, k, v)), replace(case, dtype="float16")


@call_mutant("values rounded to bfloat16")
def _rounded_values(q, k, v, case):
    return (q, k, round_to(v, "bfloat16")), case


def sums_mutant(mistake: str) -> Callable[[Callable], None]:
    """A backend with other arithmetic: attention(q, k, v, mask, scale, dtype) gives (out, lse)."""
    return lambda attention: add("attention", mistake, masked_backend("", spec_mask, attention))


def _scores(q, k, v, scale):
    groups = q.shape[1] // k.shape[1]
    return np.float32(scale) * (q @ np.repeat(k, groups, axis=1).swapaxes(-1, -2)), np.repeat(v, groups, axis=1)


@sums_mutant("hidden scores lowered by 20, not dropped")
def _soft_mask(q, k, v, mask, scale, dtype):
    scores, v = _scores(q, k, v, scale)
    scores = scores - np.where(mask, 0, np.float32(20))
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return round_to(weights / total @ v, dtype), (top + np.log(total))[..., 0]


@sums_mutant("exp without the maximum taken off")
def _no_maximum(q, k, v, mask, scale, dtype):
    scores, v = _scores(q, k, v, scale)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        weights = np.where(mask, np.exp(scores), np.float32(0))
        total = weights.sum(-1, keepdims=True)
        return round_to(weights / total @ v, dtype), np.log(total)[..., 0]


@sums_mutant("last row of a partial tile not written")
def _unwritten_row(q, k, v, mask, scale, dtype):
    out, lse = baseline_attention(q, k, v, mask, scale, dtype)
    if q.shape[2] % 8:
        out[:, :, -1] = np.nan
    return out, lse


@sums_mutant("lse in base 2")
def _lse_base_2(q, k, v, mask, scale, dtype):
    out, lse = baseline_attention(q, k, v, mask, scale, dtype)
    return out, lse / np.float32(np.log(2))


_calls = itertools.count()


@sums_mutant("another rounding in every call")
def _noisy(q, k, v, mask, scale, dtype):
    out, lse = baseline_attention(q, k, v, mask, scale, dtype)
    return out * np.float32(1 + 2**-23 * (next(_calls) % 2)), lse
