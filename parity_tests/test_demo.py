"""The demo's directory: a new one when the routers' file changes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_directory_follows_the_contents_of_the_routers(demo, tmp_path):
    file = tmp_path / "routers.safetensors"
    names = set()
    for text in (b"old", b"new"):
        file.write_bytes(text)
        names.add(demo.directory_name(file))
    assert len(names) == 2


def test_the_routers_of_the_demo_are_there(demo):
    assert demo.ROUTERS.is_file()
