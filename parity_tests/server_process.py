"""A real `flux_mlx.server` process on loopback, and requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

START_S = 600
IDLE_S = 0.03


class Server:
    """Requests to a server.

    Args:
        port: Where it listens.
        process: The server.
    """

    def __init__(self, port: int, process: subprocess.Popen):
        self.port, self.process = port, process

    def raw(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and text of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def post(self, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer to a JSON body."""
        headers = {"Content-Type": "application/json", **headers}
        status, text = self.raw("POST", path, json.dumps(body).encode(), headers)
        return status, json.loads(text) if text.startswith("{") else text

    def complete(self, prompt: str, **settings: Any) -> list[int]:
        """The tokens that follow `prompt`, greedily."""
        status, answer = self.post({"prompt": prompt, "max_tokens": 12, "logprobs": True, **settings})
        assert status == 200, answer
        return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]

    def stats(self) -> dict[str, Any]:
        """`/stats`."""
        return json.loads(self.raw("GET", "/stats")[1])

    def cpu_s(self) -> float:
        """Processor time that the server has used (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def wait_until_idle(self) -> None:
        """Return when it computes nothing any more: next to no processor time in a second."""
        deadline, before = time.monotonic() + START_S, self.cpu_s()
        while True:
            time.sleep(1)
            used, before = self.cpu_s() - before, self.cpu_s()
            if used <= IDLE_S:
                return
            assert time.monotonic() < deadline, used

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """`/stats`, as soon as they fulfil `condition`: a request is noted after its answer has left."""
        deadline = time.monotonic() + START_S
        while not condition(stats := self.stats()):
            assert time.monotonic() < deadline, stats
            time.sleep(0.05)
        return stats


def free_port() -> int:
    """A port that nobody listens at."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _hear_interrupts() -> None:
    """Processes that a shell starts in the background, and theirs, ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def running_server(
    model: Path, log: Path, *flags: str, module: tuple[str, ...] = ("flux_mlx.server",)
) -> Iterator[Server]:
    """A server of `model`, ended with the block. Its output goes to `log`."""
    port = free_port()
    command = [sys.executable, "-m", *module, "--model", str(model), "--port", str(port), *flags]
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=_hear_interrupts) as process,
    ):
        server, deadline = Server(port, process), time.monotonic() + START_S
        try:
            while True:
                with contextlib.suppress(OSError):
                    if server.raw("GET", "/health")[0] == 200:
                        break
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield server
        finally:
            process.kill()
