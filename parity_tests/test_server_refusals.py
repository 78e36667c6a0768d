"""flux_mlx.server: what it refuses, over HTTP and on its command line, and that it goes on after."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux_mlx.safe_loading import load_without_code
from flux_mlx.server import build_parser
from flux_mlx.server_http import check_body
from flux_mlx.server_log import RequestLog
from flux_mlx.server_requests import Generator, PromptCache
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


def start(*flags: str, **environment: str) -> str:
    """What a server that cannot start says: one line; it ends with status 2."""
    command = [sys.executable, "-m", "flux_mlx.server", *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "model_file": "evil.py"}')
    said = start("--model", str(tmp_path), "--port", "0")
    assert "flux_mlx.server: [load]" in said
    assert "'evil.py'" in said
    said = start("--model", f"{tmp_path}-none", "--port", "0")
    assert f"[load] {tmp_path}-none is neither a model directory here nor a hub id." in said


def test_a_bad_route_is_one_line(directory):
    said = start("--model", str(directory), "--port", "0", FLUX_MLX_ROUTE="bogus")
    assert said.startswith("flux_mlx.server: [FLUX_MLX_ROUTE] expected auto, full, sparse or a list of full layers")
    said = start("--model", str(directory), "--port", "0", "--route", "9")  # by the thread that has used mx.random
    assert "[9] are not routed layers" in said
    said = start("--model", f"{directory}-stock", "--port", "0", "--route", "full")
    assert "[server] --route goes with Flux models only" in said


def test_a_port_that_is_in_use_is_one_line_before_any_model_is_loaded():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        said = start("--model", "/nowhere/at/all", "--port", str(port))
    assert said == f"flux_mlx.server: [server] cannot listen at 127.0.0.1, port {port}: Address already in use.\n"


@pytest.mark.parametrize("port", ["99999", "65536", "-1", "x"])
def test_ports_that_there_are_not(port, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([f"--port={port}"])
    assert f"expected a port from 0 to 65535, got '{port}'" in capsys.readouterr().err


def test_the_thread_that_used_mlx_is_not_left_to_end_with_the_interpreter():
    threads = []
    provider = SimpleNamespace(load_default=lambda: threads.append(threading.current_thread()) or 1 / 0)
    generator = Generator(provider, PromptCache(1, 1, RequestLog()))
    with pytest.raises(ZeroDivisionError):
        generator.wait_until_loaded()
    generator.stop_and_join()
    assert not generator.generation_available()
    threads[0].join(0.2)
    assert threads[0].is_alive()
    assert threads[0].daemon


def test_a_forced_route_is_served_and_an_interrupt_ends_cleanly(directory, tmp_path):
    with running_server(directory, tmp_path / "log", "--route", "1,3") as server:
        server.complete("x" * 61)
        stats = server.wait_for(lambda stats: stats["answered"] == 1)
        assert "full: 1,3; sparse: 0,2" in stats["recent"][0]["routes"]
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
