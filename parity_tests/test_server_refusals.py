"""flux_mlx.server: what it refuses, over HTTP and on its command line, and that it goes on after."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flux_mlx.safe_loading import load_without_code
from flux_mlx.server_http import check_body
from parity_tests.server_process import Server, running_server
from parity_tests.tiny_directories import flux_directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return flux_directory(tmp_path_factory.mktemp("server") / "flux")


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory) -> Server:
    with running_server(directory, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({}, 415),
        ({"Content-Type": "application/json", "Origin": "https://evil.example"}, 403),
        ({"Content-Type": "application/json", "Origin": "null"}, 403),
        ({"Content-Type": "application/json", "Host": "evil.example:80"}, 403),
        ({"Content-Type": "application/json", "Content-Length": "-1"}, 400),
        ({"Content-Type": "application/json", "Content-Length": "99999999999"}, 413),
    ],
)
def test_foreign_and_mistyped_posts_are_refused(server, headers, status):
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    if "Content-Length" in headers:
        body = b""
    assert server.raw("POST", "/v1/completions", body, headers)[0] == status


def test_foreign_pages_cannot_read_stats(server):
    assert server.raw("GET", "/stats", headers={"Origin": "https://evil.example"})[0] == 403
    assert server.raw("GET", "/v1/models", headers={"Host": "evil.example"})[0] == 403


BAD_BODIES = [
    {"prompt": "x", "stop": [5]},
    {"prompt": "x", "stop": "\ud800"},
    {"prompt": "x", "temperature": float("nan")},
    {"prompt": "x", "top_k": 272},
    {"prompt": "x", "logit_bias": {"272": 1}},
    {"prompt": "x", "logit_bias": {"-1": 1}},
    {"prompt": "x", "logit_bias": {"1": "nan"}},
    {"prompt": ""},
    {"prompt": 5},
    {"prompt": "\ud800"},
    {"prompt": "x", "stream": True, "stream_options": {}},
    {"messages": []},
    {"messages": ["x"]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost:1"}}]}]},
    {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": 3},
    {"messages": [{"role": "user", "content": "x"}], "tools": [1]},
    [],
]


def test_bad_requests_are_refused_and_end_nothing(server):
    for body in BAD_BODIES:
        path = "/v1/chat/completions" if isinstance(body, dict) and "messages" in body else "/v1/completions"
        status, answer = server.post(body, path)
        assert status in (400, 404), (body, status, answer)
        assert answer["error"], body
    for raw in (b"{", b"\xff\xfe", b"[" * 100_000):
        assert server.raw("POST", "/v1/completions", raw, {"Content-Type": "application/json"})[0] == 400
    assert server.complete("x" * 61)


def test_a_foreign_models_code_is_not_run(server, directory, tmp_path):
    foreign = flux_directory(tmp_path / "foreign", seed=3)
    assert server.complete("x" * 61, model=str(foreign)) != server.complete("x" * 61)
    marker = tmp_path / "ran"
    (foreign / "flux_model.py").write_text(f"open({str(marker)!r}, 'w')\n" + (foreign / "flux_model.py").read_text())
    status, answer = server.post({"prompt": "x" * 61, "model": str(foreign)})
    assert status == 404
    assert "asks to run its own code ('flux_model.py'); models with code are not loaded" in answer["error"]
    config = json.loads((foreign / "config.json").read_text())
    for name in ("../flux/flux_model.py", "other.py", str(directory / "flux_model.py"), 7):
        (foreign / "config.json").write_text(json.dumps({**config, "model_file": name}))
        with pytest.raises(ValueError, match="asks to run its own code"):
            load_without_code(str(foreign))
    assert not marker.exists()
    assert server.complete("x" * 61)


def test_check_body_names_the_field():
    for body in BAD_BODIES[:3]:
        with pytest.raises(ValueError, match=next(name for name in body if name != "prompt") + "|surrogates"):
            check_body(body)
    check_body({"prompt": "x", "stop": ["a"], "messages": [{"role": "user", "content": None}]})


def test_a_model_that_cannot_be_loaded_is_one_line(directory, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "model_file": "evil.py"}')
    command = [sys.executable, "-m", "flux_mlx.server", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "flux_mlx.server: [load]" in done.stderr
    assert "'evil.py'" in done.stderr
    assert "Traceback" not in done.stderr
