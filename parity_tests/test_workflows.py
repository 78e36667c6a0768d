"""The workflow files say what is there: they parse, their files and modules exist, their numbers are the kernels'."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from flux_mlx import doctor
from parity_tests.frameworks import backend_table
from parity_tests.host_shim import apple
from parity_tests.host_shim.variants import ALL

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EVENTS = {"push", "pull_request", "schedule", "workflow_dispatch"}
FILE = re.compile(r"(?:parity_tests|examples|flux_mlx|metal_kernels)/[\w/-]+(?:\.py)?")
MODULE = re.compile(r"python -m ([\w.]+)")


def read(path: Path) -> dict:
    """A workflow; YAML reads its key `on` as true."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(workflow: dict) -> list[str]:
    """What its steps run."""
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_has_the_form_of_a_workflow(path):
    workflow = read(path)
    assert set(workflow) <= {"name", True, "permissions", "concurrency", "jobs"}
    assert set(workflow[True]) <= EVENTS
    for job in workflow["jobs"].values():
        assert set(job) <= {"if", "runs-on", "timeout-minutes", "strategy", "env", "steps"}
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
        named = set(re.findall(r"matrix\.(\w+)", str(job)))
        assert named <= set(job.get("strategy", {}).get("matrix", {}))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_files_modules_and_extras_exist(path):
    text = " ".join(commands(read(path)))
    files = set(FILE.findall(text)) | set(re.findall(r"hashFiles\('([^']+)'\)", path.read_text(encoding="utf-8")))
    assert files
    assert not [file for file in files if not (ROOT / file).exists()]
    assert not [module for module in MODULE.findall(text) if importlib.util.find_spec(module) is None]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= set(extras)


def test_the_deep_run_covers_every_backend():
    deep = read(ROOT / ".github" / "workflows" / "parity.yml")["jobs"]["deep"]
    assert set(deep["strategy"]["matrix"]["backend"]) == set(backend_table("cpu"))


def test_the_metal_run_expects_every_variant():
    text = " ".join(commands(read(ROOT / ".github" / "workflows" / "metal.yml")))
    compiled, tested = (int(re.search(rf"--{what} --at-least (\d+)", text)[1]) for what in ("compile", "self-test"))
    assert compiled == len(ALL) * len(apple.STANDARDS)
    assert tested == len(doctor.all_variants())
