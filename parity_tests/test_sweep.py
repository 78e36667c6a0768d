"""The orchestrator: order, values of earlier jobs, failures, time limits, going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cuda_reference.sweep import Job, Sweep, filled, load_jobs, main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"


def writes(out, text="{}", **settings):
    return Job(out, ("-c", WRITE, out, text), **settings)


def run(jobs, folder, gpus=2, seconds=60.0):
    lines = []
    state = Sweep(jobs, folder, gpus, {"model": "M"}, lines.append).run(seconds)
    return {name: entry["outcome"].partition(":")[0] for name, entry in state.items()}, lines


def test_jobs_take_values_from_the_files_that_they_need(tmp_path):
    jobs = [
        writes("a.json", '{"masks": {"9": [1, 2]}}'),
        writes("b.json", "[{a.json:masks/9}, 3]", needs=("a.json",)),
        writes("c.txt", "{model}"),
    ]
    outcomes, _ = run(jobs, tmp_path)
    assert outcomes == {"a.json": "done", "b.json": "done", "c.txt": "done"}
    assert json.loads((tmp_path / "b.json").read_text()) == [[1, 2], 3]
    assert (tmp_path / "c.txt").read_text() == "M"
    assert json.loads((tmp_path / "sweep.json").read_text())["a.json"]["outcome"] == "done"


def test_a_failure_leaves_out_only_what_needs_it(tmp_path):
    jobs = [
        Job("a.json", ("-c", "raise SystemExit(3)")),
        writes("b.json", needs=("a.json",)),
        Job("silent.json", ("-c", "pass")),
        writes("c.json"),
        writes("d.json", "{c.json:none}", needs=("c.json",)),
    ]
    outcomes, _ = run(jobs, tmp_path)
    wanted = {"a.json": "failed", "silent.json": "failed", "c.json": "done", "d.json": "not started"}
    assert outcomes == wanted | {"b.json": "left out"}


def test_every_job_has_a_gpu_of_its_own(tmp_path):
    show = "import os, sys, pathlib; pathlib.Path(sys.argv[1]).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', ''))"
    jobs = [Job(f"{i}.txt", ("-c", show + "; import time; time.sleep(1)", f"{i}.txt")) for i in range(2)]
    jobs.append(Job("both.txt", ("-c", show, "both.txt"), gpus=2))
    run(jobs, tmp_path)
    assert sorted((tmp_path / f"{i}.txt").read_text() for i in range(2)) == ["0", "1"]
    assert (tmp_path / "both.txt").read_text() == "0,1"


def test_jobs_over_their_time_are_stopped_with_their_children(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    outcomes, lines = run([Job("slow.json", ("-c", child), minutes=0.02), writes("a.json")], tmp_path)
    assert outcomes == {"slow.json": "stopped", "a.json": "done"}
    assert any("over its time" in line for line in lines)


def test_a_sweep_that_is_stopped_goes_on(tmp_path):
    (tmp_path / "a.json").write_text("kept")
    jobs = [writes("a.json"), Job("b.json", ("-c", "import time; time.sleep(600)"))]
    assert run(jobs, tmp_path, seconds=0.5)[0] == {"b.json": "stopped"}
    assert (tmp_path / "a.json").read_text() == "kept"
    assert run([*jobs[:1], writes("b.json")], tmp_path)[0] == {"b.json": "done"}


def test_a_file_counts_when_its_job_is_done(tmp_path):
    early = f"{WRITE}; import time; time.sleep(1); pathlib.Path(sys.argv[1]).write_text('whole')"
    read = "import sys, pathlib; pathlib.Path('b.json').write_text(pathlib.Path('a.json').read_text())"
    jobs = [Job("a.json", ("-c", early, "a.json", "half")), Job("b.json", ("-c", read), needs=("a.json",))]
    assert run(jobs, tmp_path)[0] == {"a.json": "done", "b.json": "done"}
    assert (tmp_path / "b.json").read_text() == "whole"


def test_what_a_failed_job_left_does_not_count(tmp_path):
    left = Job("a.json", ("-c", f"{WRITE}; raise SystemExit(3)", "a.json", "half"))
    after = writes("b.json", needs=("a.json",))
    assert run([left, after], tmp_path)[0] == {"a.json": "failed", "b.json": "left out"}
    assert run([writes("a.json", "whole"), after], tmp_path)[0] == {"a.json": "done", "b.json": "done"}
    assert run([left, after], tmp_path)[0] == {"a.json": "done", "b.json": "done"}
    assert (tmp_path / "a.json").read_text() == "whole"


def test_a_job_of_too_many_gpus_holds_up_nobody(tmp_path):
    jobs = [writes("wide.json", gpus=3), writes("a.json")]
    outcomes, lines = run(jobs, tmp_path)
    assert outcomes == {"wide.json": "left out", "a.json": "done"}
    assert any("needs 3 GPUs, there are 2" in line for line in lines)


def test_a_sweep_that_is_told_to_end_ends_its_jobs(tmp_path):
    slow = "import os, time, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
    (tmp_path / "jobs.toml").write_text(f'[[job]]\nout = "a.json"\ncommand = ["-c", "{slow}"]\n')
    command = [sys.executable, "-m", "cuda_reference.sweep", "--jobs", tmp_path / "jobs.toml", "--out", tmp_path]
    sweep = subprocess.Popen([*command, "--model", tmp_path, "--text-cache", tmp_path / "t", "--gpus", "0"])
    pid = tmp_path / "pid"
    while not (pid.is_file() and pid.read_text()):
        assert sweep.poll() is None
        time.sleep(0.05)
    sweep.terminate()
    assert sweep.wait(timeout=60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_the_command_reads_a_list(tmp_path, capsys):
    (tmp_path / "jobs.toml").write_text(
        f'[[job]]\nout = "a.json"\ncommand = ["-c", "{WRITE}", "a.json", "{{workers}}"]\nminutes = 1.0\n'
    )
    arguments = ["--jobs", str(tmp_path / "jobs.toml"), "--out", str(tmp_path / "run"), "--model", str(tmp_path)]
    main([*arguments, "--text-cache", str(tmp_path / "t"), "--workers", "7", "--gpus", "0"])
    assert (tmp_path / "run" / "a.json").read_text() == "7"
    assert "a: done" in capsys.readouterr().out


def test_shards_are_jobs_of_their_own(tmp_path):
    (tmp_path / "jobs.toml").write_text(
        '[[job]]\nout = "a_{shard}.json"\nshards = 2\nminutes = 3.0\n'
        'command = ["--shard", "{shard}/{shards}", "--out", "a_{shard}.json"]\n'
        '[[job]]\nout = "b.json"\nneeds = ["a_1.json"]\ncommand = []\n'
    )
    assert load_jobs(tmp_path / "jobs.toml") == [
        Job("a_0.json", ("--shard", "0/2", "--out", "a_0.json"), minutes=3.0),
        Job("a_1.json", ("--shard", "1/2", "--out", "a_1.json"), minutes=3.0),
        Job("b.json", (), needs=("a_1.json",)),
    ]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_lists_that_are_published_write_what_they_say(path):
    for job in load_jobs(path):
        target = job.command[job.command.index("--out") + 1]
        assert target in (job.out, job.out.rpartition("/")[0]), job.out


def test_a_job_without_its_file_is_named(tmp_path):
    jobs = [Job("a.json", ("-c", "pass"))]
    state = Sweep(jobs, tmp_path, 0, {}, lambda line: None).run(60.0)
    assert state["a.json"]["outcome"] == "failed: it did not write a.json"


@pytest.mark.parametrize(
    "text",
    [
        "job = 3",
        "[[job]]\nout='a'\n",
        "x",
        "[[job]]\nout='a'\ncommand=[]\nneeds=['b']",
        "[[job]]\nout='a'\ncommand=[]\nshards=0",
        "[[job]]\nout='a'\ncommand=[]\nshards=2",
    ],
)
def test_bad_lists_are_refused(tmp_path, text):
    (tmp_path / "jobs.toml").write_text(text)
    with pytest.raises(ValueError, match=r"\[sweep\]"):
        load_jobs(tmp_path / "jobs.toml")


def test_a_value_that_is_not_there_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"masks": {}}')
    with pytest.raises(ValueError, match="no value at masks/9"):
        filled("{a.json:masks/9}", tmp_path, {})
