"""What the scripts for a GPU make of a sanitizer's words, and that their planted mistakes fit the kernels: no GPU."""

from __future__ import annotations

import dataclasses
import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import bench_triton_barriers as barriers  # noqa: E402
from benchmarks import bench_triton_sanitize as sanitize  # noqa: E402
from benchmarks import bench_triton_verify as verify  # noqa: E402
from cuda_reference import triton_hopper  # noqa: E402
from flux_mlx.spec import PatternConfig  # noqa: E402

LINES = barriers.KERNEL.read_text(encoding="utf-8").splitlines()
SPECIALIZE = next(i for i, line in enumerate(LINES, 1) if line.strip() == "gl.warp_specialize(")
KERNEL = next(i for i, line in enumerate(LINES, 1) if line.startswith("def prefill_kernel("))
CALL = next(i for i, line in enumerate(LINES, 1) if line.startswith("    _attend_tiles("))
STORE = next(i for i, line in enumerate(LINES, 1) if "q.store(" in line)


def race(first: int, second: int, file: str = "triton_hopper.py") -> str:
    """A report of racecheck between two lines, as it prints one."""
    return (
        f"========= Error: Race reported between Read access at prefill_kernel+0x2e0 in {file}:{first}\n"
        f"=========     and Write access at prefill_kernel+0x8320 in {file}:{second} [96 hazards]\n=========\n"
    )


def log(*found: str, errors: int | None = None) -> str:
    """A log of racecheck with these reports; `errors` is what its last line counts."""
    count = len(found) if errors is None else errors
    end = f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n"
    return "".join(("========= COMPUTE-SANITIZER\n", *found, "a line of the program\n", end))


def test_races_at_triton_s_dispatch_are_told_from_others():
    assert sanitize.summary("racecheck", log())["ok"]
    dispatch = sanitize.summary("racecheck", log(race(KERNEL, KERNEL), race(KERNEL, SPECIALIZE), race(KERNEL, CALL)))
    assert dispatch["ok"]
    assert dispatch["at_dispatch"] == 3
    ours = sanitize.summary("racecheck", log(race(KERNEL, SPECIALIZE), race(KERNEL, STORE)))
    assert not ours["ok"]
    assert len(ours["others"]) == 1
    assert f"triton_hopper.py:{STORE}" in ours["others"][0]
    assert not sanitize.summary("racecheck", log(race(KERNEL, KERNEL, "triton_xattention.py")))["ok"]


def test_a_log_that_is_cut_short_or_counts_more_is_not_ok():
    assert not sanitize.summary("racecheck", log().rsplit("=========", 1)[0])["ok"]
    assert not sanitize.summary("racecheck", log(errors=3))["ok"]


def test_any_other_report_is_not_ok():
    at = "========= {}\n=========     at {}\n=========\n========= ERROR SUMMARY: 1 errors\n"
    foreign = at.format("Invalid __global__ read of size 4 bytes", "ampere_dgemm_64x64_nn+0x1f0")
    ours = at.format("Barrier error detected", "merge_kernel+0x1f0 in triton_decode.py:84")
    assert not sanitize.summary("memcheck", foreign)["ok"]
    assert not sanitize.summary("synccheck", ours)["ok"]
    assert not sanitize.summary("memcheck", race(KERNEL, KERNEL))["ok"]


@pytest.mark.parametrize("mistake", ["", *barriers.MISTAKES])
def test_a_planted_mistake_is_one_line_less(mistake):
    changed = barriers.watched_source(mistake)
    assert len(changed.splitlines()) == len(LINES) - bool(mistake)
    assert barriers.WATCHED in changed
    compile(changed, "kernel", "exec")


def test_a_line_to_replace_that_is_gone_is_an_error(monkeypatch):
    monkeypatch.setitem(barriers.MISTAKES, "none", "no such line\n")
    with pytest.raises(ValueError, match="expected one 'no such line"):
        barriers.watched_source("none")


def test_a_kernel_with_a_mistake_takes_the_kernel_s_place(monkeypatch):
    monkeypatch.setitem(barriers.sys.modules, triton_hopper.__name__, triton_hopper)
    loaded = barriers.load_kernel(next(iter(barriers.MISTAKES)))
    assert barriers.sys.modules[triton_hopper.__name__] is loaded
    assert loaded.TILE == triton_hopper.TILE


@pytest.mark.parametrize(
    ("code", "output", "clean", "planted"),
    [
        (0, "", True, False),
        (1, "kernel.py:9: Assertion `Buffer being accessed has outstanding reads` failed", False, True),
        (None, "Deadlock detected: all active threads are waiting on mbarriers", False, True),
        (None, "", False, False),
        (1, "ModuleNotFoundError", False, False),
    ],
)
def test_verdicts(code, output, clean, planted):
    found = barriers.verdict(code, output)
    assert barriers.is_expected(barriers.Job("dense"), found) is clean
    assert barriers.is_expected(barriers.Job("dense", "some mistake"), found) is planted


def test_the_verifying_script_s_rows(monkeypatch):
    """One row of each kind through the interpreter: all well, and not well where a result changes or is wrong."""
    monkeypatch.setattr(verify, "DEVICE", "cpu")
    pattern = PatternConfig(block_size=16, sink_tokens=16, window_tokens=32)
    blocks = PatternConfig(name="xattention", block_size=16, stride=8, threshold=0.7)
    monkeypatch.setattr(verify, "Case", functools.partial(verify.Case, heads=(1, 1), dtype=torch.float32))
    case = verify.sparse_case("streaming", 20, 51, 64, pattern)
    rows = [
        verify.attention_row(case, repeats=2),
        verify.gradient_row((20, 30, 64), pattern, repeats=1),
        verify.selection_row((20, 30, 64), blocks, repeats=1),
    ]
    assert all(row["ok"] for row in rows), rows
    assert [row["equal_repeats"] for row in rows] == [2, 1, 1]
    results = iter([torch.zeros(3), torch.zeros(3), torch.ones(3)])
    assert verify.equal_repeats(lambda: (next(results),), 2) == 0
    wrong = dataclasses.replace(case, mask=verify.causal)
    assert not verify.attention_row(wrong, repeats=0)["ok"]
