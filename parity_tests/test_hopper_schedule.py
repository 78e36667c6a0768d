"""The Hopper kernel's copying warp, run as Python: which tiles it fetches, for which rows, by which route.

Gluon has no interpreter, but the warp's program is scalar: with its few primitives replaced it runs as it stands.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from cuda_reference import triton_hopper
from flux_mlx.spec import PatternConfig, Route, visible_mask

TILE = triton_hopper.TILE
B, HQ, HKV = 3, 4, 2
ROUTES = (Route.SPARSE, Route.FULL, Route.UNSET)


class Pointer:
    """An array in device memory, read at one index."""

    def __init__(self, values, index: int = 0) -> None:
        self.values, self.index = values, index

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.values, self.index + offset)


class Buffers:
    """Shared-memory buffers or barriers: only which one it is counts."""

    def index(self, slot: int) -> int:
        return slot


def _desc(name: str, heads: int, tokens: int, rows: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, shape=[B, heads, tokens, 64], block_type=SimpleNamespace(nbytes=rows * 128))


def _primitives(program: int, programs: int) -> SimpleNamespace:
    return SimpleNamespace(
        program_id=lambda axis: program,
        num_programs=lambda axis: programs,
        load=lambda pointer: pointer.values[pointer.index],
        where=lambda condition, a, b: a if condition else b,
        cdiv=lambda a, b: -(-a // b),
        minimum=min,
        maximum=max,
        static_range=range,
    )


def fetched(monkeypatch, pattern: PatternConfig, L: int, S: int, section: int, programs: int) -> list[tuple]:
    """(tensor, coordinates) of every copy of all blocks, in order within a block."""
    copies: list[tuple] = []
    for name in ("_row_tiles", "_tile", "_key_tiles"):
        monkeypatch.setattr(triton_hopper, name, getattr(triton_hopper, name).fn)
    monkeypatch.setattr(triton_hopper, "ROUTE_SPARSE", int(Route.SPARSE))
    monkeypatch.setattr(triton_hopper, "mbarrier", SimpleNamespace(wait=lambda *_: None, expect=lambda *_: None))
    monkeypatch.setattr(triton_hopper, "tma_load", lambda desc, at, *_: copies.append((desc.name, tuple(at))))
    descs = (_desc("q", HQ, L, 64), _desc("k", HKV, S, TILE), _desc("v", HKV, S, TILE), _desc("out", HQ, L, 64))
    route = Pointer([int(code) for code in ROUTES])
    sizes = (section, pattern.block_size, pattern.window_blocks, pattern.sink_span, 1.0)
    for program in range(programs):
        monkeypatch.setattr(triton_hopper, "gl", _primitives(program, programs))
        triton_hopper._producer.fn(
            descs, (Buffers(),) * 3, (Buffers(),) * 6, (route, route, 0), sizes, TILES="route", STAGES=2
        )
    return copies


def tiles_of(copies: list[tuple]) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
    """(b, query head, first row of a row tile) to its key tiles as (KV head, first key); values go with their keys."""
    found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    while copies:
        (name, (b, head, row, _)), second = copies.pop(0), copies.pop(0)
        assert (name, second) == ("q", ("q", (b, head, row + 64, 0)))
        keys = found.setdefault((b, head, row), [])
        assert not keys, "no row tile twice"
        while copies and copies[0][0] == "k":
            key, value = copies.pop(0)[1], copies.pop(0)
            assert value == ("v", key)
            assert key[0] == b
            keys.append((key[1], key[2]))
    return found


@pytest.mark.parametrize(("L", "S"), [(700, 1100), (1100, 1100), (9, 1025), (129, 640)])
@pytest.mark.parametrize(("block", "sink", "window"), [(128, 1, 2), (128, 0, 1), (256, 1, 1), (128, 2, 3)])
def test_the_tiles_are_those_that_some_row_sees(monkeypatch, L, S, block, sink, window):
    pattern = PatternConfig(block_size=block, sink_tokens=sink * block, window_tokens=window * block)
    dense = np.tril(np.ones((S, S), bool))
    seen = {Route.SPARSE: visible_mask(pattern, S, S), Route.FULL: dense, Route.UNSET: dense}
    found = tiles_of(fetched(monkeypatch, pattern, L, S, section=2, programs=5))
    first_tile = (S - L) // TILE
    row_tiles = range(first_tile, -(-S // TILE))
    assert set(found) == {(b, h, t * TILE - (S - L)) for b in range(B) for h in range(HQ) for t in row_tiles}
    for (b, head, row), keys in found.items():
        first = row + S - L
        rows = seen[ROUTES[b]][first : first + TILE]
        wanted = {(head // (HQ // HKV), key) for key in range(0, S, TILE) if rows[:, key : key + TILE].any()}
        assert len(keys) == len(set(keys))
        assert set(keys) == wanted
        assert keys[0][1] == first, "the diagonal tile, the only masked one, comes first"
        for _, key in keys[1:]:
            assert rows[:, key : key + TILE].all(), "the others need no mask"


@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("section", [2, 4, 12])
def test_any_grid_and_section_does_the_same_work(monkeypatch, programs, section):
    pattern = PatternConfig(block_size=128, sink_tokens=128, window_tokens=256)
    with monkeypatch.context() as patched:
        plain = tiles_of(fetched(patched, pattern, 300, 700, section=12, programs=2))
    assert tiles_of(fetched(monkeypatch, pattern, 300, 700, section, programs)) == plain
