"""The Hopper kernel's barriers under Triton's concurrency sanitizer, and planted mistakes that it must report.

That sanitizer follows tile copies and tensor-core reads from barrier to barrier; racecheck follows neither. Two things
of Triton 3.6 shape what runs here. A check that fails ends in a call of the driver that needs more registers than the
copying warp has, and the process would end with "illegal instruction" and no word of the check: the kernel runs with
WATCHED registers instead of its own. And a barrier of the copy engine vouches for all that its warp had copied before:
a wait for values whose next keys are waited for cannot be missed (Triton changed that after 3.6), so the wait left out
is that for a row's last values.

Run on a Hopper GPU from the repository root: python -m benchmarks.bench_triton_barriers
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchmarks.bench_triton_sanitize import write_json

ROOT = Path(__file__).parents[1]
KERNEL = ROOT / "cuda_reference" / "triton_hopper.py"
REPORTS = re.compile(r"Buffer being accessed|pending access|Deadlock detected|Barrier arrive underflow")
LARGEST_ERROR = 1e-2

OWN = "        [240, 24],\n"  # registers of a thread of the second group and of the copying warp
WATCHED = "        [216, 72],\n"  # both have 504 with the first group's, which are what the others leave

# Lines of the kernel's source that a mistake leaves out. Each stands there once.
MISTAKES = {
    "keys are overwritten before they are read": "            mbarrier.wait(k_empty.index(slot), phase)\n",
    "keys are read before they are there": "        mbarrier.wait(k_ready.index(slot), step // STAGES & 1)\n",
    "the last values are read before they are there": "    mbarrier.wait(v_ready.index(slot), step // STAGES & 1)\n",
    "queries are overwritten before the output has left": "        tma.store_wait(0)\n",
}
CALLS = ("dense", "streaming", "block-sparse", "dense, head dim 128")


@dataclass(frozen=True)
class Job:
    """One process: a call, with a mistake in the kernel or without."""

    call: str
    mistake: str = ""

    def command(self) -> list[str]:
        """What runs it."""
        script = [sys.executable, "-m", "benchmarks.bench_triton_barriers"]
        return [*script, "--call", self.call, "--mistake", self.mistake]


JOBS = (*(Job(call) for call in CALLS), *(Job("dense", mistake) for mistake in MISTAKES))


def watched_source(mistake: str) -> str:
    """The kernel's source with WATCHED registers, and with one mistake unless its name is empty.

    Raises ValueError unless what is replaced is there once.
    """
    source = KERNEL.read_text(encoding="utf-8")
    for old, new in ((OWN, WATCHED), *(((MISTAKES[mistake], ""),) if mistake else ())):
        if source.count(old) != 1:
            raise ValueError(f"[watched_source] expected one {old!r}, got {source.count(old)}.")
        source = source.replace(old, new)
    return source


def verdict(code: int | None, output: str) -> str:
    """ "clean", "reported: ..." or what went wrong, of a process that ended with `code` (None: it did not end)."""
    found = REPORTS.search(output)
    if found:
        return f"reported: {found[0]}"
    return "clean" if code == 0 else "no end" if code is None else f"exit code {code}: {output[-300:]}"


def is_expected(job: Job, found: str) -> bool:
    """Whether the verdict is what it should be."""
    return found.startswith("reported") if job.mistake else found == "clean"


def load_kernel(mistake: str) -> ModuleType:
    """`cuda_reference.triton_hopper` from a file of `watched_source`, in place of the package's own."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(watched_source(mistake))
    spec = importlib.util.spec_from_file_location("cuda_reference.triton_hopper", file.name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_call(call: str) -> float:
    """Run one call on the GPU; its relative error against float64. The dense one deals three row tiles to a program."""
    import torch
    import triton

    from benchmarks.bench_triton_verify import block_case, full_case, sampled_error, sparse_case
    from flux_mlx.spec import PatternConfig

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device="cuda", dtype=torch.int8))
    near = PatternConfig(sink_tokens=128, window_tokens=256)
    cases = {
        "dense": full_case(call, 700, 911, 64, heads=(32, 4)),
        "dense, head dim 128": full_case(call, 700, 911, 128, heads=(32, 4)),
        "streaming": sparse_case(call, 700, 911, 64, near, heads=(32, 4)),
        "block-sparse": block_case(call, 700, 911, 64, 128, fast=True),
    }
    error, _ = sampled_error(cases[call])
    torch.cuda.synchronize()
    return error


def run_jobs(timeout_s: float) -> list[dict[str, object]]:
    """Run all jobs at once, each in a process of its own, and kill what is left after `timeout_s`."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TRITON_INSTRUMENTATION_MODE": "consan", "CUDA_LAUNCH_BLOCKING": "1", "TRITON_CACHE_DIR": cache,
        }  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running = [(job, subprocess.Popen(job.command(), cwd=ROOT, env=environment, **pipes)) for job in JOBS]
        deadline = time.monotonic() + timeout_s
        rows = []
        for job, process in running:
            found = verdict(*_finish(process, deadline))
            rows.append({"call": job.call, "mistake": job.mistake, "verdict": found, "ok": is_expected(job, found)})
    return rows


def _finish(process: subprocess.Popen, deadline: float) -> tuple[int | None, str]:
    """(exit code, output) of a process; the code is None if it had to be killed."""
    try:
        output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[0]
    return process.returncode, output


def main() -> None:
    """Run all jobs, or one; exit code 1 if a verdict is not the expected one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--call", choices=CALLS, help="this call only, in this process")
    parser.add_argument("--mistake", default="", choices=("", *MISTAKES))
    parser.add_argument("--timeout-s", type=float, default=180.0, help="when processes are killed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the JSON")
    options = parser.parse_args()
    if options.call:
        load_kernel(options.mistake)
        raise SystemExit(0 if run_call(options.call) < LARGEST_ERROR else 1)
    rows = run_jobs(options.timeout_s)
    record = {"command": "python -m benchmarks.bench_triton_barriers", "rows": rows}
    write_json(options.out / "bench_triton_barriers.json", record)
    raise SystemExit(0 if all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
