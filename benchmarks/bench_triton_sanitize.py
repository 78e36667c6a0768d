"""compute-sanitizer over every Triton kernel at small sizes: memcheck, racecheck and synccheck at once.

Not initcheck: what counts as written for it is what kernels under its watch have written, so it cannot be kept to
these kernels, and over all of Torch's it does not end within three minutes.

Run on a GPU from the repository root: python -m benchmarks.bench_triton_sanitize
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "cuda_reference"
TOOLS = ("memcheck", "racecheck", "synccheck")
TIMEOUT_S = 185
ACCESS = re.compile(r" at (\w+)\+0x[0-9a-f]+ in (triton_\w+\.py):(\d+)")
DISPATCH = ("def ", "_attend_tiles(", "gl.warp_specialize(")  # what the lines of Triton's own accesses start with
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) ")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record` and print it."""
    text = json.dumps(record, indent=1) + "\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
    sys.stdout.write(text)


def reports(log: str) -> list[str]:
    """The error reports of a tool's log, the lines of each joined."""
    blocks, lines = [], [line.removeprefix("=========").strip() for line in log.splitlines() if line.startswith("====")]
    for line in lines:
        if not line or "SUMMARY" in line or line == "COMPUTE-SANITIZER":
            blocks.append("")
        elif not line.startswith(("Saved host backtrace", "Host Frame")):
            blocks[-1:] = [f"{blocks[-1]} {line}".strip()] if blocks else [line]
    return [block for block in blocks if block]


def is_dispatch(report: str) -> bool:
    """Whether a race is one between the accesses by which Triton starts and ends specialised warps.

    These stand at the lines of DISPATCH in the Hopper kernel, where nothing of ours touches shared memory; a barrier of
    the whole block lies between them (cuda_reference/README.md).
    """
    accesses = ACCESS.findall(report)
    return bool(accesses) and all(_starts_warps(file, int(number)) for _, file, number in accesses)


def _starts_warps(file: str, number: int) -> bool:
    lines = (SOURCES / "triton_hopper.py").read_text(encoding="utf-8").splitlines()
    return file == "triton_hopper.py" and lines[number - 1].strip().startswith(DISPATCH)


def summary(tool: str, log: str) -> dict[str, Any]:
    """Verdict on one tool's log.

    It is ok if the tool ended and reported nothing but, in racecheck, Triton's dispatch.
    """
    found, ended = reports(log), SUMMARY.findall(log)
    dispatch = [report for report in found if tool == "racecheck" and is_dispatch(report)]
    others = [report for report in found if report not in dispatch]
    ok = bool(ended) and not others and int(ended[-1]) == len(dispatch)
    return {"tool": tool, "ended": bool(ended), "at_dispatch": len(dispatch), "others": others, "ok": ok}


def main() -> None:
    """Run all tools at once; exit code 1 if one reports what is not explained, or did not end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the JSON")
    parser.add_argument("--only", default="", help="a word of the names of bench_triton_verify's cases")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        logs = {tool: Path(folder) / f"{tool}.log" for tool in TOOLS}
        running = {tool: _start(tool, logs[tool], Path(folder), options.only) for tool in TOOLS}
        for tool, process in running.items():
            code = process.wait()
            row = summary(tool, logs[tool].read_text(encoding="utf-8", errors="replace"))
            rows.append(row | {"exit_code": code, "ok": row["ok"] and code == 0})
    command = "python -m benchmarks.bench_triton_sanitize" + (f" --only {options.only}" if options.only else "")
    write_json(options.out / "bench_triton_sanitize.json", {"command": command, "rows": rows})
    raise SystemExit(0 if all(row["ok"] for row in rows) else 1)


def _start(tool: str, log: Path, folder: Path, only: str) -> subprocess.Popen:
    """A tool over the small cases, what both print going to `log`."""
    (folder / tool).mkdir()
    small = [sys.executable, "-m", "benchmarks.bench_triton_verify", "--small", "--only", only]
    small += ["--out", str(folder / tool)]
    command = ["timeout", str(TIMEOUT_S), "compute-sanitizer", "--tool", tool, "--target-processes", "application-only"]
    with log.open("w") as file:
        return subprocess.Popen([*command, *small], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    main()
