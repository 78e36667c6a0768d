"""Options, profiles and the backend fixture of the suite. parity_tests/README.md says how to run it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from parity_tests.backends import Backend
from parity_tests.frameworks import backend_table
from parity_tests.journal import Journal
from parity_tests.properties import NEAR_TIES

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("deep", max_examples=10_000, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def required_backends(device: str) -> list[str]:
    """Backends that must run on this platform: one that cannot is a failure, not a skip."""
    if device == "cuda":
        return ["numpy", "torch", "triton"]
    return ["numpy", "torch", "mlx", "metal"] + ["triton"] * sys.platform.startswith("linux")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device`, `--require-backends` and `--journal`."""
    group = parser.getgroup("parity")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where Torch and Triton run")
    group.addoption(
        "--require-backends",
        metavar="NAMES",
        help="comma-separated backends whose absence is a failure, not a skip (default: all that the platform has)",
    )
    group.addoption("--journal", type=Path, metavar="FILE", help="note finished tests here, pass over those noted")


def _required(config: pytest.Config) -> set[str]:
    names = config.getoption("--require-backends")
    if names is None:
        return set(required_backends(config.getoption("--device")))
    return {name for name in names.split(",") if name}


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device before anything imports Triton, and refuse unknown backends."""
    if config.getoption("--device") == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    table = backend_table(config.getoption("--device"))
    unknown = sorted(_required(config) - set(table))
    if unknown:
        raise pytest.UsageError(f"--require-backends: expected some of {sorted(table)}, got {unknown}.")
    journal = config.getoption("--journal")
    if journal is not None:
        config.pluginmanager.register(Journal(journal, writes=not hasattr(config, "workerinput")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `backend` runs for every backend of the table."""
    if "backend" in metafunc.fixturenames:
        names = list(backend_table(metafunc.config.getoption("--device")))
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """One backend of the table; skips if it cannot run here, fails if it was required."""
    record = backend_table(request.config.getoption("--device"))[request.param]
    reason = record.missing()
    if reason and record.name in _required(request.config):
        pytest.fail(f"backend {record.name} is required: {reason}")
    if reason:
        pytest.skip(f"backend {record.name}: {reason}")
    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the decisions that were too close to compare."""
    reports = [r for group in terminalreporter.stats.values() for r in group if hasattr(r, "user_properties")]
    notes = [(r.nodeid, value) for r in reports for name, value in r.user_properties if name == NEAR_TIES]
    if notes:
        terminalreporter.section("near-ties: decisions too close to compare")
        for test, value in sorted(set(notes)):
            terminalreporter.write_line(f"{test}: {value}")
