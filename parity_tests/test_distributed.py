"""Flux models over two local processes: every rank takes the routes of one process, and gives its tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from flux_mlx import load
from flux_mlx.spec import Route
from parity_tests.distributed_worker import answers
from parity_tests.tiny_directories import flux_directory

LAUNCH = Path(sys.executable).with_name("mlx.launch")
FAMILIES = ("llama", "qwen3", "glm4_moe")  # plain; norms of queries and keys; these, experts and a partial rotation


def launch(out: Path, directories: list[Path]) -> list[dict]:
    """What each of two ranks finds, by name of the directory. One launch serves all: it is what takes the time."""
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [str(LAUNCH), "-n", "2", "--backend", "ring", "--python", sys.executable, str(worker), str(out)]
    env = {**os.environ, "PYTHONPATH": str(worker.parents[1])}
    done = subprocess.run(
        [*command, *map(str, directories)], env=env, capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_are_one_process(tmp_path):
    directories = [flux_directory(tmp_path / family, family) for family in FAMILIES]
    ranks = launch(tmp_path, directories)
    for directory in directories:
        expected = answers(load(directory)[0])
        for rank in ranks:
            assert rank[directory.name] == {"size": 2, "heads": 2, "answers": expected}, directory.name
        assert {route for answer in expected for route in answer["routes"]} == {Route.FULL, Route.SPARSE}
