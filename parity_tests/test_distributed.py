"""A Flux model over two local processes: every rank takes the routes of one process, and gives its tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux_mlx import load
from flux_mlx.spec import Route
from parity_tests.distributed_worker import answers
from parity_tests.tiny_directories import flux_directory

LAUNCH = Path(sys.executable).with_name("mlx.launch")


@pytest.mark.parametrize("family", ["llama", "glm4_moe"])
def test_two_ranks_are_one_process(family, tmp_path):
    directory = flux_directory(tmp_path / "flux", family)
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [str(LAUNCH), "-n", "2", "--backend", "ring", "--python", sys.executable, str(worker)]
    env = {**os.environ, "PYTHONPATH": str(worker.parents[1])}
    done = subprocess.run(
        [*command, str(directory), str(tmp_path)], env=env, capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["size"] for rank in ranks] == [2, 2]
    assert [rank["heads"] for rank in ranks] == [2, 2]
    expected = answers(load(directory)[0])
    assert ranks[0]["answers"] == expected
    assert ranks[1]["answers"] == expected
    assert {route for answer in expected for route in answer["routes"]} == {Route.FULL, Route.SPARSE}
