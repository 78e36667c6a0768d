"""The Hopper kernel's hand-over of shared memory under many schedules: no hazard, and one if a line is missing."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from cuda_reference import triton_hopper
from parity_tests.hopper_model import HazardError, run_kernel

SOURCE = Path(triton_hopper.__file__).read_text(encoding="utf-8")
ORDERING = re.compile(r"mbarrier\.(wait|arrive|expect)\(|store_wait\(|warpgroup_mma_wait\(|fence_async_shared\(")
BINDING = re.compile(r"( +.* = )warpgroup_mma_wait\(\d, deps=\[(.*?)\]\).*")
FIRST, LAST = (SOURCE[: SOURCE.index(name)].count("\n") for name in ("def _producer(", "def _barriers("))
LINES = [i for i, line in enumerate(SOURCE.splitlines()) if FIRST < i < LAST and ORDERING.search(line)]
SCHEDULES = 60
LENGTHS = ((300, 700), (400, 400))  # several row tiles for the block; a first tile before row 0, and none


def kernel_without(line: int | None, folder: Path) -> ModuleType:
    """A copy of the kernel's module, less one line (a name that the line binds is bound without waiting)."""
    lines = SOURCE.splitlines()
    if line is not None:
        bound = BINDING.match(lines[line])
        lines[line] = bound.expand(r"\1\2") if bound else ""
    path = folder / "hopper_copy.py"
    path.write_text("\n".join(lines), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lengths", LENGTHS)
def test_no_schedule_has_a_hazard(lengths, tmp_path, monkeypatch):
    kernel = kernel_without(None, tmp_path)
    for seed in range(SCHEDULES):
        with monkeypatch.context() as patched:
            machine = run_kernel(kernel, patched.setattr, *lengths, seed)
        fetched = {name: [copy for copy in machine.fetched if copy[0] == name] for name in "qkv"}
        for group, reads in machine.reads.items():
            for name in "kv":
                assert [read for read in reads if read[0] == name] == fetched[name]
            own = fetched["q"][int(group[-1]) :: 2]
            assert [read for read, _ in itertools.groupby(read for read in reads if read[0] == "q")] == own


@pytest.mark.parametrize("line", LINES, ids=lambda i: f"{i + 1}: {SOURCE.splitlines()[i].strip()}")
def test_every_line_that_orders_is_needed(line, tmp_path, monkeypatch):
    kernel = kernel_without(line, tmp_path)
    with pytest.raises(HazardError):  # noqa: PT012 (one of the schedules shows it)
        for seed, lengths in itertools.product(range(SCHEDULES), LENGTHS):
            with monkeypatch.context() as patched:
                run_kernel(kernel, patched.setattr, *lengths, seed)
