"""The package as users get it: a wheel in a clean environment, light imports, examples that run."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import flux_mlx
from parity_tests.tiny_directories import flux_directory

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("mlx", "mlx.core", "torch", "triton")
LIGHT = f"import sys, flux_mlx; dir(flux_mlx); print([m for m in {HEAVY} if m in sys.modules])"


def python(program: str | Path, *arguments: str, cwd: Path | None = None) -> str:
    """stdout of a Python process that must succeed."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_installs_in_a_clean_environment(tmp_path):
    python(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "clean", with_pip=True)
    clean = tmp_path / "clean" / "bin" / "python"
    python(clean, "-m", "pip", "install", "-q", str(wheel))
    assert python(clean, "-c", LIGHT, cwd=tmp_path).strip() == "[]"
    assert python(clean, "-c", "import mlx.core as mx; print((mx.ones(3) @ mx.ones(3)).item())").strip() == "3.0"
    names = python(clean, "-c", "from importlib import resources as r; print(*r.files('flux_mlx.data').iterdir())")
    assert "flux_model.py" in names
    for command in ("convert", "generate", "chat"):
        assert "--route" in python(clean.parent / f"flux_mlx.{command}", "--help")


def test_importing_the_package_is_light():
    assert python(sys.executable, "-c", LIGHT).strip() == "[]"


def test_every_public_name_is_there():
    assert all(getattr(flux_mlx, name) is not None for name in flux_mlx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flux_mlx.nothing  # noqa: B018


@pytest.mark.parametrize(("example", "stock"), [("generate", False), ("apply", True), ("routes", False)])
def test_an_example_runs(tmp_path, example, stock):
    directory = flux_directory(tmp_path / "tiny", num_hidden_layers=3)
    model = directory.with_name("tiny-stock") if stock else directory
    out = python(sys.executable, str(ROOT / "examples" / f"{example}.py"), str(model), "the quick brown fox " * 20)
    assert out.strip()
    if example == "routes":
        assert out.count("of 3 routed layers sparse") == 2


def test_openblas_is_optional(tmp_path):
    script = str(ROOT / "examples" / "with-openblas")
    done = subprocess.run(["sh", script, "echo", "ran"], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "ran\n"
