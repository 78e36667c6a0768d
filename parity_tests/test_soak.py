"""A long run against the server: FLUX_MLX_SOAK=1000 sends that many requests. Without it, a handful."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flux_mlx import load
from flux_mlx.models import set_route
from parity_tests.greedy import Answers, single_run
from parity_tests.server_process import Server, running_server
from parity_tests.tiny_directories import flux_directory

REQUESTS = int(os.environ.get("FLUX_MLX_SOAK", "30"))
LONG = REQUESTS >= 200
CONCURRENCY = 8
WARM_UP = 0.3  # share of the requests after which memory must be flat
GROWTH = 1.1
FULL_LAYERS = (0, 2)
PREFIXES = ["You answer in few words. ", "You are a pirate who has lost his ship, his crew and his parrot. " * 2, ""]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return flux_directory(tmp_path_factory.mktemp("soak") / "flux")


def prompts(count: int) -> list[str]:
    """Prompts of 20 to 300 tokens with shared prefixes; some come again."""
    rng, texts = random.Random(0), []
    for i in range(count):
        again = texts and rng.random() < 0.2
        fresh = rng.choice(PREFIXES) + f"{i}: " + "".join(rng.choices("abcdefgh ,.", k=rng.randrange(20, 170)))
        texts.append(rng.choice(texts) if again else fresh)
    return texts


def memory_kib(server: Server) -> int:
    """Resident memory of the server."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def hang_up(server: Server) -> None:
    """Ask for a long answer and go away."""
    body = json.dumps({"prompt": "x" * 50, "max_tokens": 50_000, "logit_bias": {"256": -1e9}}).encode()
    headers = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall("\r\n".join([*headers, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        client.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            client.recv(1)


def test_every_answer_is_its_single_run_answer(directory, tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("FLUX_MLX_ROUTE", ",".join(map(str, FULL_LAYERS)))
    model, tokenizer = load(directory)
    set_route(model, FULL_LAYERS)
    texts, memory = prompts(REQUESTS), []
    expected = {text: single_run(model, tokenizer, text, 8) for text in set(texts)}
    with running_server(directory, tmp_path / "log", "--prompt-cache-bytes", "20MB") as server:

        def one(index: int) -> list[int]:
            if index % 50 == 7:
                hang_up(server)
            if index % max(1, REQUESTS // 20) == 0:
                memory.append(memory_kib(server))
            return server.complete(texts[index], max_tokens=8)

        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(one, range(REQUESTS)))
        stats = server.wait_for(lambda stats: stats["open"] == 0)
    compared = Answers(model)
    for text, answer in zip(texts, answers, strict=True):
        compared.check(tokenizer.encode(text), answer, expected[text])
    compared.report(record_property)
    assert (stats["failed"], stats["answered"]) == (0, REQUESTS)
    assert stats["prompt_cache"]["bytes"] <= 20e6
    warm = memory[int(WARM_UP * len(memory)) :]
    assert not LONG or max(warm[len(warm) // 2 :]) <= GROWTH * max(warm[: len(warm) // 2])
    print(f"{REQUESTS} requests, near-ties: {compared.decisions.ties}, resident memory in KiB: {memory}")
