"""Mutation testing of the Metal kernels: each mutant is one wrong edit of their text, and a probe must notice it.

`python -m parity_tests.host_shim.mutants` writes the score to benchmarks/metal_mutants.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux_mlx import kernels, spec
from flux_mlx.spec import PatternConfig, Route
from metal_kernels import operations
from metal_kernels.catalog import Launch
from parity_tests.backends import Arrays, Backend, float32_mass
from parity_tests.host_shim.build import BuildError
from parity_tests.host_shim.mutations import MUTANTS, Mutant
from parity_tests.host_shim.run import HostError, HostRun, HostTimeoutError, as_array, source_of
from parity_tests.properties import within_budget
from parity_tests.strategies import Case
from parity_tests.tolerances import Reference


class StillbornError(Exception):
    """The mutant does not compile or changes nothing: the edit must be repaired."""


@dataclass(frozen=True)
class MutantRun:
    """A launcher that edits the text first, where the text has what the mutant edits."""

    mutant: Mutant | None
    host: HostRun
    edited: list[str] = field(default_factory=list)

    def __call__(self, launch: Launch, inputs: list) -> list[mx.array]:
        arrays = [as_array(value) for value in inputs]
        source = source_of(launch, arrays)
        if self.mutant is not None and self.mutant.old in source:
            source = self.mutant.apply(source)
            self.edited.append(launch.spec.name)
        return self.host.run_source(source, launch, arrays)


FINE = PatternConfig(block_size=7, sink_tokens=3, window_tokens=20)
COARSE = PatternConfig(block_size=16, sink_tokens=16, window_tokens=32)
TRIANGLE = PatternConfig(name="triangle", block_size=8, sink_tokens=8, window_tokens=16, last_tokens=11)

ATTENTION = (
    ("ahead", Case(2, 2, 2, 40, 107, 64, FINE, seed=1)),
    ("behind", Case(1, 1, 2, 70, 131, 64, None, values="huge scores", seed=2)),
    ("fair", Case(1, 2, 1, 90, 90, 64, TRIANGLE, prompt_tokens=90, seed=3)),
    ("shuffled", Case(1, 1, 1, 64, 64, 64, COARSE, scale=0.3, seed=4)),
    ("ahead", Case(2, 2, 3, 2, 107, 64, FINE, seed=5)),
    ("behind", Case(1, 1, 2, 1, 131, 64, None, values="huge scores", seed=6)),
    ("shuffled", Case(1, 1, 1, 8, 90, 64, TRIANGLE, prompt_tokens=85, seed=7)),
    # A tile whose last key is its row's next one; which starts one before the keys that all rows see; which ends with
    # the first key behind the sink.
    ("fair", Case(1, 1, 1, 40, 70, 64, None, seed=12)),
    ("fair", Case(1, 1, 1, 70, 200, 64, PatternConfig(block_size=11, sink_tokens=0, window_tokens=99), seed=13)),
    ("fair", Case(1, 1, 1, 60, 160, 64, PatternConfig(block_size=31, sink_tokens=31, window_tokens=93), seed=14)),
)


def _arrays(qkv: Arrays) -> list[mx.array]:
    return [mx.array(x) for x in qkv]


def _attention(mutant: Mutant | None, schedule: str, case: Case) -> list[str]:
    run = MutantRun(mutant, HostRun(schedule, seed=case.seed, timeout_s=20))

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        rule = operations.FULL_RULE if case.pattern is None else kernels.rule_of(case.pattern, case.prompt_tokens)
        route = (int(Route.FULL if case.pattern is None else Route.SPARSE),) * case.batch
        for splits in (1, 3) if case.q_tokens <= 8 else (1,):
            out, lse = operations.attention(
                run, *_arrays(qkv), dtype="float32", route=route, rule=rule, scale=case.score_scale, splits=splits
            )
            yield np.array(out), np.array(lse)

    for result in attend(case.tensors(), case):
        within_budget(Backend("mutant", lambda qkv, case, result=result: result), case)
    return run.edited


def _table(mutant: Mutant | None, schedule: str, case: Case) -> list[str]:
    run = MutantRun(mutant, HostRun(schedule, seed=case.seed, timeout_s=20))
    kept = spec.kept_blocks(case.pattern, case.q_tokens, case.kv_tokens)
    kept = np.broadcast_to(kept, (case.batch, case.q_heads, *kept.shape)).copy()
    table = spec.block_table(case.pattern.block_size, kept, case.q_tokens, case.kv_tokens)

    def attend(qkv: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
        out, lse = kernels.table_attention(*_arrays(qkv), table, run=run)
        return np.array(out), np.array(lse)

    within_budget(Backend("mutant", attend), case)
    hidden = np.random.default_rng(0).random(kept.shape) < 0.5
    _irregular_table(run, case, kept & ~hidden)
    return run.edited


def _irregular_table(run: MutantRun, case: Case, kept: np.ndarray) -> None:
    """A table with holes, some rows empty, different for each head."""
    q, k, v = case.tensors()
    table = spec.block_table(case.pattern.block_size, kept, case.q_tokens, case.kv_tokens)
    mask = spec.expand_blocks(kept, case.pattern.block_size, case.q_tokens, case.kv_tokens)
    expected = spec.masked_attention(q, k, v, mask, case.score_scale)
    out, lse = (np.array(x) for x in kernels.table_attention(*_arrays((q, k, v)), table, run=run))
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


def _routed(mutant: Mutant | None, schedule: str, case: Case) -> list[str]:
    run = MutantRun(mutant, HostRun(schedule, timeout_s=20))
    q, k, v = case.tensors()
    routes = [Route.FULL, Route.SPARSE, Route.UNSET][: case.batch]
    out, _ = kernels.routed_attention(*_arrays((q, k, v)), mx.array(routes, mx.int32), case.pattern, run=run)
    for row, route in enumerate(routes):
        one = [x[row : row + 1] for x in (q, k, v)]
        oracle = spec.sparse_attention(*one, case.pattern) if route is Route.SPARSE else spec.full_attention(*one)
        np.testing.assert_allclose(np.array(out[row : row + 1]), oracle[0], atol=1e-5)
    return run.edited


def _mass(mutant: Mutant | None, schedule: str, sizes: tuple[int, int, int, int]) -> list[str]:
    block, stride, q_tokens, kv_tokens = sizes
    run = MutantRun(mutant, HostRun(schedule, timeout_s=20))
    q, k, _ = Case(1, 1, 2, q_tokens, kv_tokens, 64, None, seed=block).tensors()
    pattern = PatternConfig(name="xattention", block_size=block, stride=stride)
    mass = np.array(kernels.block_mass(mx.array(q), mx.array(k), pattern, run=run))
    oracle, baseline = spec.block_mass(q, k, block, stride), float32_mass(q, k, "float32", pattern)
    Reference(oracle, baseline, "float32", 1e-5).check("mass", mass)
    return run.edited


def _router(mutant: Mutant | None, schedule: str, sizes: tuple[int, int]) -> list[str]:
    tokens, pool_tokens = sizes
    run = MutantRun(mutant, HostRun(schedule, timeout_s=20))
    rng = np.random.default_rng(tokens)
    queries = (rng.standard_normal((2, tokens, 3, 64)) + 0.3).astype(np.float32)
    shapes = spec.RouterConfig.parameter_shapes(64)
    weights = {name: rng.uniform(-0.3, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    expected = spec.route_logits(weights, spec.pool_queries(queries, pool_tokens))
    weights["head.4.bias"][1] += expected[0, 0] - expected[0, 1] + 0.01  # row 0 is FULL by a little
    expected = spec.route_logits(weights, spec.pool_queries(queries, pool_tokens))
    arrays = {name: mx.array(w) for name, w in weights.items()}
    logits, route = kernels.route_layer(mx.array(queries), arrays, pool_tokens, run=run)
    np.testing.assert_allclose(np.array(logits), expected, rtol=1e-5, atol=1e-5)
    if route.tolist() != spec.decide(expected):
        raise AssertionError(f"routes {route.tolist()}")
    return run.edited


PROBES: tuple[tuple[Callable[..., list[str]], str, object], ...] = (
    *((_attention, schedule, case) for schedule, case in ATTENTION),
    (_table, "ahead", Case(2, 1, 2, 40, 75, 64, COARSE, seed=8)),
    (_table, "behind", Case(1, 2, 2, 33, 70, 64, FINE, seed=9)),
    (_table, "behind", Case(1, 1, 2, 75, 115, 64, PatternConfig(block_size=40, sink_tokens=40, window_tokens=40))),
    (_table, "fair", Case(1, 1, 1, 40, 150, 64, PatternConfig(block_size=31, sink_tokens=31, window_tokens=31))),
    (_routed, "fair", Case(3, 1, 2, 20, 60, 64, FINE, seed=10)),
    (_routed, "fair", Case(3, 1, 2, 3, 60, 64, FINE, seed=11)),
    (_mass, "ahead", (16, 2, 70, 133)),
    (_mass, "behind", (24, 8, 31, 50)),
    (_mass, "ahead", (32, 2, 20, 75)),
    (_router, "ahead", (37, 10)),
    (_router, "behind", (9, 100)),
)


def verdict(mutant: Mutant | None) -> str:
    """ "killed by ...", "survived", or "timed out ...", which says nothing.

    Raises:
        StillbornError: The mutant does not compile, or no probe runs it.
    """
    reached = False
    for probe, schedule, sizes in PROBES:
        if mutant is not None and not mutant.concerns(probe.__name__):
            continue
        try:
            reached |= bool(probe(mutant, schedule, sizes))
        except BuildError as error:
            raise StillbornError(f"{mutant}: {error}") from None
        except HostTimeoutError:
            return f"timed out in {probe.__name__[1:]}, {schedule}"
        except (AssertionError, HostError) as error:
            return f"killed by {probe.__name__[1:]}, {schedule}: {' '.join(str(error).split())[:90]}"
    if mutant is not None and not reached:
        raise StillbornError(f"{mutant}: no probe runs the edited text")
    return "survived"


def score(mutants: tuple[Mutant, ...] = MUTANTS, workers: int = 2) -> dict[str, str]:
    """Verdict of each mutant, by its name. Raises RuntimeError if a probe fails on the unchanged kernels."""
    unchanged = verdict(None)
    if unchanged != "survived":
        raise RuntimeError(f"[score] expected every probe to pass on the unchanged kernels, got {unchanged}.")
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip((mutant.name for mutant in mutants), pool.map(verdict, mutants), strict=True))


def main() -> None:
    """Score every mutant and write the result."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/metal_mutants.json"))
    options = parser.parse_args()
    verdicts = score()
    killed, timed_out = (sum(v.startswith(word) for v in verdicts.values()) for word in ("killed", "timed out"))
    report = {
        "command": "python -m parity_tests.host_shim.mutants",
        "mutants": len(verdicts),
        "killed": killed,
        "timed_out": timed_out,
        "score": round(killed / len(verdicts), 4),
        "verdicts": [asdict(mutant) | {"verdict": verdicts[mutant.name]} for mutant in MUTANTS],
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
