"""Wrong routers and wrong choices of blocks: the rest of the list that `parity_tests.mutants` begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from flux_mlx import spec
from flux_mlx.spec import PatternConfig, Route
from flux_mlx.spec.router import silu
from parity_tests.backends import NUMPY, float32_logits, float32_mass
from parity_tests.mutants import MUTANTS, add

__all__ = ["MUTANTS"]  # the whole list


def router_mutant(mistake: str, **steps: Callable) -> None:
    """A router with other steps."""
    add("router", mistake, replace(NUMPY, router=replace(NUMPY.router, **steps)))


def pool_mutant(mistake: str) -> Callable[[Callable], None]:
    """A router that pools something else: the mean of picked(x `[B, L, HQ, D]`, P)."""

    def make(picked: Callable[[np.ndarray, int], np.ndarray]) -> None:
        router_mutant(mistake, pool_queries=lambda x, dtype, n: picked(x, n).mean((1, 2), dtype=np.float32))

    return make


@pool_mutant("an overlap of both ends counted once")
def _overlap_once(x, n):
    return x if x.shape[1] < 2 * n else np.concatenate([x[:, :n], x[:, -n:]], 1)


@pool_mutant("last token not pooled")
def _last_token_missing(x, n):
    return np.concatenate([x[:, :n], x[:, -n - 1 : -1]], 1)


@pool_mutant("all tokens pooled")
def _everything(x, n):
    return x


@pool_mutant("only the end pooled")
def _only_the_end(x, n):
    return x[:, -n:]


@pool_mutant("only the first head pooled")
def _first_head(x, n):
    return np.concatenate([x[:, :n, :1], x[:, -n:, :1]], 1)


@pool_mutant("pooled in float16")
def _half_pool(x, n):
    return np.concatenate([x[:, :n], x[:, -n:]], 1).astype(np.float16)


def _logits_with(activation: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def logits(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        for name in ("encoder.0", "encoder.2", "head.0", "head.2", "head.4"):
            x = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            x = x if name in ("encoder.2", "head.4") else activation(x)
        return x

    return logits


def _without_last_bias(weights: dict[str, np.ndarray], pooled: np.ndarray) -> np.ndarray:
    return float32_logits(weights, pooled) - weights["head.4.bias"]


def _full_at_a_tie(logits: np.ndarray) -> list[Route]:
    return [Route.SPARSE if sparse > full else Route.FULL for sparse, full in logits]


def _sparse_unless_larger(logits: np.ndarray) -> list[Route]:
    return [Route.FULL if full > sparse else Route.SPARSE for sparse, full in logits]


router_mutant("padding pooled", pool_rows=lambda x, dtype, n, lengths: NUMPY.router.pool_queries(x, dtype, n))
router_mutant("ReLU for SiLU", route_logits=_logits_with(lambda x: np.maximum(x, 0)))
router_mutant("SiLU of 1.7 x (GELU's approximation)", route_logits=_logits_with(lambda x: silu(1.702 * x) / 1.702))
router_mutant("last bias left out", route_logits=_without_last_bias)
router_mutant("logits swapped", route_logits=lambda weights, pooled: float32_logits(weights, pooled)[:, ::-1])
router_mutant("a tie goes to full attention", decide=_full_at_a_tie)
router_mutant("logits that are not numbers go to sparse attention", decide=_sparse_unless_larger)


def mass_mutant(mistake: str) -> Callable[[Callable], None]:
    """Block mass of other queries and keys: change(q, k, pattern) gives (q, k)."""

    def make(change: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
        def mass(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
            return float32_mass(*change(q, k, pattern), dtype, pattern)

        def select(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
            first = (k.shape[2] - q.shape[2]) // pattern.block_size
            return NUMPY.blocks.choose_blocks(mass(q, k, dtype, pattern), first, pattern)

        add("blocks", mistake, replace(NUMPY, blocks=replace(NUMPY.blocks, block_mass=mass, select_blocks=select)))

    return make


@mass_mutant("diagonals for antidiagonals")
def _diagonals(q, k, p):
    first, stride = k.shape[2] - q.shape[2], p.stride
    positions = np.arange(first, k.shape[2])
    turned = positions - positions % stride + stride - 1 - positions % stride
    inside = (turned >= first) & (turned < k.shape[2])
    return q[:, :, np.where(inside, turned, positions) - first], k


@mass_mutant("group scores not divided by the stride")
def _no_stride(q, k, p):
    return q * p.stride, k


@mass_mutant("group scores not divided by sqrt(D)")
def _no_root(q, k, p):
    return q * np.float32(q.shape[-1] ** 0.5), k


@mass_mutant("scoring deals query heads to KV heads in turn")
def _interleaved_scores(q, k, p):
    return q, k[:, np.arange(q.shape[1]) % k.shape[1]]


@mass_mutant("scored keys shifted by one token")
def _shifted(q, k, p):
    return q, np.roll(k, 1, axis=2)


def choice_mutant(mistake: str, **flaw: bool) -> None:
    """Another choice of blocks from the same mass."""

    def choose(mass: np.ndarray, first: int, pattern: PatternConfig) -> np.ndarray:
        kept = np.zeros(mass.shape, bool)
        for at in np.ndindex(mass.shape[:-1]):
            kept[(*at, _chosen(mass[at], first + at[-1], pattern, **flaw))] = True
        return kept

    def select(q: np.ndarray, k: np.ndarray, dtype: str, pattern: PatternConfig) -> np.ndarray:
        mass = spec.block_mass(q, k, pattern.block_size, pattern.stride)
        return choose(mass, (k.shape[2] - q.shape[2]) // pattern.block_size, pattern)

    add("blocks", mistake, replace(NUMPY, blocks=replace(NUMPY.blocks, choose_blocks=choose, select_blocks=select)))


def _chosen(
    mass: np.ndarray,
    m: int,
    pattern: PatternConfig,
    first: bool = True,
    diagonal: bool = True,
    low: bool = True,
    forced_counted: bool = True,
    one_more: bool = False,
) -> list[int]:
    """Blocks kept of row m, one after the other; each argument turned round is a mistake."""
    kept = sorted({*([0] if first else []), *([m] if diagonal else [])})
    forced = len(kept)
    for n in sorted(set(range(m + 1)) - set(kept), key=lambda n: (-mass[n], n if low else -n)):
        counted = kept if forced_counted else kept[forced:]
        if pattern.top_k_blocks is None:
            enough = mass[counted].sum() >= pattern.threshold * mass.sum()
        else:
            enough = len(counted) >= pattern.top_k_blocks
        if enough and not one_more:
            break
        one_more = one_more and not enough
        kept.append(n)
    return kept


choice_mutant("first block not always kept", first=False)
choice_mutant("diagonal block not always kept", diagonal=False)
choice_mutant("equal masses prefer the higher index", low=False)
choice_mutant("always-kept blocks not counted", forced_counted=False)
choice_mutant("one block more than needed", one_more=True)
