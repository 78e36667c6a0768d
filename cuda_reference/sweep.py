"""`python -m cuda_reference.sweep`: many training and evaluation jobs over the GPUs of one machine.

A job is a command that writes one file. The jobs of a TOML list run in its order, each on one GPU, as soon as the jobs
whose files it needs are done. A job that fails or runs too long is noted in sweep.json, and those that need its file
are left out; all others go on. Jobs whose file exists are done, unless sweep.json says that they ended otherwise: the
same command given again goes on where an earlier one stopped.

    [[job]]
    out = "seed0/routers.safetensors"           # in the folder of the sweep
    minutes = 4.0                               # killed after this time
    needs = ["single.json"]                     # files of other jobs
    command = ["-m", "cuda_reference.train", "--out", "seed0", "--set", "start.single={single.json:masks/9}"]

With `shards = 4` an entry is four jobs: in `out` and in the command `{shard}` is 0 to 3 and `{shards}` is 4.
`{FILE.json:a/b}` in a command is the value at that place of a JSON file in the folder; `{model}`, `{text}` and
`{workers}` are the command line's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cuda_reference.console import ends_in_one_line
from cuda_reference.evaluate import write_json

STATE_NAME, DONE = "sweep.json", "done"
_VALUE = re.compile(r"\{([\w./-]+\.json):([\w./-]+)\}")
POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        out: File that it writes, in the folder of the sweep.
        command: Arguments of Python, with placeholders.
        minutes: Time limit.
        needs: Files of other jobs.
        gpus: GPUs that it holds at one time; the sweep's number is the most.
    """

    out: str
    command: tuple[str, ...]
    minutes: float = 5.0
    needs: tuple[str, ...] = ()
    gpus: int = 1

    @property
    def name(self) -> str:
        """A name for the log: the file, without folders."""
        return self.out.replace("/", "_").rpartition(".")[0]


def load_jobs(path: Path) -> list[Job]:
    """Read a job list.

    Raises:
        ValueError: Not a job list, a file written by two jobs, or one that no job before writes.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        jobs = [part for job in raw["job"] for part in _shards(**job)]
    except (ValueError, KeyError, TypeError) as error:  # also of bytes that are no text, and of text that is no TOML
        raise ValueError(f"[sweep] {path} is no job list: {error}") from None
    written: set[str] = set()
    for job in jobs:
        if job.out in written or not set(job.needs) <= written:
            missing = sorted(set(job.needs) - written)
            raise ValueError(
                f"[sweep] {path}: {job.out} is written twice, or needs {missing}, which no job before writes."
            )
        written.add(job.out)
    return jobs


def _shards(
    *, out: str, command: Sequence[str], shards: int = 1, needs: Sequence[str] = (), **limits: Any
) -> list[Job]:
    """The job of one entry of the list; with `shards`, that many, each with its number in place of {shard}."""
    if not (isinstance(shards, int) and shards >= 1):
        raise TypeError(f"shards must be a whole number of at least 1, got {shards!r}")

    def numbered(word: str, n: int) -> str:
        return word.replace("{shard}", str(n)).replace("{shards}", str(shards))

    return [
        Job(numbered(out, n), tuple(numbered(word, n) for word in command), needs=tuple(needs), **limits)
        for n in range(shards)
    ]


def filled(argument: str, folder: Path, words: Mapping[str, str]) -> str:
    """A command's argument with its placeholders replaced.

    Raises:
        ValueError: A JSON file has no such value.
    """

    def value(match: re.Match[str]) -> str:
        found: Any = json.loads((folder / match[1]).read_text(encoding="utf-8"))
        for key in match[2].split("/"):
            if not isinstance(found, dict) or key not in found:
                raise ValueError(f"[sweep] {match[1]} has no value at {match[2]}.")
            found = found[key]
        return json.dumps(found)

    argument = _VALUE.sub(value, argument)
    for word, text in words.items():
        argument = argument.replace("{" + word + "}", text)
    return argument


class Sweep:
    """Runs jobs over GPUs.

    Args:
        jobs: In order.
        folder: Where the jobs run and write.
        gpus: Their number; 0 runs one job at a time on the CPU.
        words: Placeholders and their texts.
        report: Called with a line of text when a job starts or ends.
    """

    def __init__(
        self, jobs: Sequence[Job], folder: Path, gpus: int, words: Mapping[str, str], report: Callable[[str], None]
    ):
        self.jobs, self.folder, self.words, self.report = list(jobs), folder, words, report
        self.slots = list(range(max(1, gpus)))
        self.has_gpus = gpus > 0
        self.state: dict[str, dict[str, Any]] = _earlier_state(folder / STATE_NAME)
        self._running: dict[Job, tuple[subprocess.Popen, float, list[int]]] = {}
        self._start = time.monotonic()

    def run(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Run what can be run; after `seconds` no job starts, and those under way are stopped. Returns the state."""
        waiting = [job for job in self.jobs if not self._is_done(job.out)]
        self.state = {out: entry for out, entry in self.state.items() if self._is_done(out)}
        for job in [job for job in waiting if job.gpus > len(self.slots)]:
            self._end(job, f"left out: it needs {job.gpus} GPUs, there are {len(self.slots)}", 0.0, [])
            waiting.remove(job)
        try:
            while waiting or self._running:
                late = time.monotonic() - self._start > seconds
                self._collect(late)
                if late:
                    break
                waiting = self._start_some(waiting)
                if waiting and not self._running:
                    self._leave_out(waiting)
                    break
                time.sleep(POLL_S)
        finally:
            self._stop_all()
        return self.state

    def _start_some(self, waiting: list[Job]) -> list[Job]:
        """Start what is ready, in order; returns what still waits. A job of many GPUs holds up those behind it."""
        left = list(waiting)
        for job in waiting:
            if not all(map(self._is_done, job.needs)):
                continue
            if len(self.slots) < job.gpus:
                break
            self._launch(job)
            left.remove(job)
        return left

    def _is_done(self, out: str) -> bool:
        """Whether a job's file is there, and neither half written nor what a failed job left."""
        runs = any(job.out == out for job in self._running)
        failed = self.state.get(out, {"outcome": DONE})["outcome"] != DONE
        return (self.folder / out).exists() and not runs and not failed

    def _launch(self, job: Job) -> None:
        mine, self.slots = self.slots[: job.gpus], self.slots[job.gpus :]
        self.report(f"{job.name}: starts on {mine}")
        log = open(self.folder / f"{job.name}.log", "w")  # noqa: SIM115
        environment = dict(os.environ)
        if self.has_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        try:
            command = [sys.executable, *(filled(part, self.folder, self.words) for part in job.command)]
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        except (OSError, ValueError) as error:
            log.write(f"{error}\n")
            self._end(job, f"not started: {error}", 0.0, mine)
            return
        finally:
            log.close()
        self._running[job] = process, time.monotonic(), mine

    def _collect(self, late: bool) -> None:
        """Note the jobs that ended; stop those over their time, and all if it is late."""
        for job, (process, start, mine) in list(self._running.items()):
            taken = time.monotonic() - start
            if process.poll() is None and (late or taken > 60 * job.minutes):
                _kill(process)
                outcome = "stopped: the sweep's time was over" if late else "stopped: over its time"
            elif process.poll() is None:
                continue
            elif process.returncode:
                outcome = f"failed: exit status {process.returncode}"
            elif not (self.folder / job.out).exists():
                outcome = f"failed: it did not write {job.out}"
            else:
                outcome = DONE
            del self._running[job]
            self._end(job, outcome, taken, mine)

    def _end(self, job: Job, outcome: str, seconds: float, slots: list[int]) -> None:
        self.slots = sorted(self.slots + slots)
        self.state[job.out] = {"outcome": outcome, "seconds": round(seconds, 1)}
        self.report(f"{job.name}: {outcome} after {seconds:.0f} s")
        write_json(self.folder / STATE_NAME, self.state)

    def _leave_out(self, waiting: list[Job]) -> None:
        for job in waiting:
            missing = [need for need in job.needs if not self._is_done(need)]
            self._end(job, f"left out: {missing} are missing", 0.0, [])

    def _stop_all(self) -> None:
        for process, _, _ in self._running.values():
            _kill(process)


def _earlier_state(path: Path) -> dict[str, dict[str, Any]]:
    """How the jobs of an earlier sweep ended. Raises ValueError if the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"[sweep] expected the state of an earlier sweep, got {path}: {error}") from None


def _kill(process: subprocess.Popen) -> None:
    """End a job and the processes that it started: they share its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="cuda_reference.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=Path, required=True, help="TOML list of jobs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep; one found there goes on")
    parser.add_argument("--model", type=Path, required=True, help="{model}: directory of a transformers causal LM")
    parser.add_argument("--text-cache", type=Path, required=True, help="{text}: file of encoded text")
    parser.add_argument("--workers", type=int, default=0, help="{workers}: processes that make batches, for each job")
    parser.add_argument("--gpus", type=int, help="default: all visible ones")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    return parser


@ends_in_one_line(build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    args = build_parser().parse_args(argv)
    jobs = load_jobs(args.jobs)
    args.out.mkdir(parents=True, exist_ok=True)
    paths = {"model": str(args.model.resolve()), "text": str(args.text_cache.resolve())}
    gpus = torch.cuda.device_count() if args.gpus is None else args.gpus
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the jobs are stopped too

    def report(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f}] {line}", flush=True)

    sweep = Sweep(jobs, args.out, gpus, paths | {"workers": str(args.workers)}, report)
    sweep.run(args.seconds)


if __name__ == "__main__":
    main()
