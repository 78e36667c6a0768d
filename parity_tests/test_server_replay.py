"""Automatic routes on the server: every answer of a mixed, concurrent run equals its replay, alone, over real HTTP.

FLUX_MLX_SOAK=1000 sends that many requests; without it, some dozens.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

from flux_mlx import describe_routes, load
from parity_tests.properties import NEAR_TIES
from parity_tests.server_process import running_server
from parity_tests.server_replay import Answered, Replay
from parity_tests.tiny_directories import flux_directory

REQUESTS = int(os.environ.get("FLUX_MLX_SOAK", "48"))
BATCH = 64  # requests between two looks at /stats, which keep the latest 100
CONCURRENCY = 8
STEP = 32
SYSTEM = ["You answer in few words, and never of the weather. ", "You are a pirate who has lost his ship and parrot. "]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return flux_directory(tmp_path_factory.mktemp("replay") / "flux")


def bodies(count: int) -> list[dict]:
    """Prompts and conversations with shared beginnings; a fifth of them come again."""
    rng, made = random.Random(0), []
    for i in range(count):
        question = f"{i}: " + "".join(rng.choices("abcdefgh ,.", k=rng.randrange(3, 150)))
        if made and rng.random() < 0.2:
            body = rng.choice(made)
        elif rng.random() < 0.5:
            body = {"prompt": rng.choice(SYSTEM) + question}
        else:
            system = {"role": "system", "content": rng.choice(SYSTEM)}
            body = {"messages": [system, {"role": "user", "content": question}]}
        made.append(body)
    return made


def prompt_tokens(tokenizer, body: dict) -> list[int]:
    """What the server makes of a request."""
    if "prompt" in body:
        return tokenizer.encode(body["prompt"])
    return tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)


def cold_routes(model, prompt: list[int]) -> str:
    """The routes of a prompt run in one call, on an empty cache."""
    cache = model.make_cache()
    model(mx.array([prompt[:-1]]), cache=cache)
    return describe_routes(cache)


def test_every_answer_is_its_replay(directory, tmp_path, record_property):
    model, tokenizer = load(directory)
    answered: dict[str, Answered] = {}

    def one(body: dict) -> tuple[str, Answered]:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        status, answer = server.post({**body, "max_tokens": rng.randrange(1, 12), "logprobs": True}, path)
        assert status == 200, answer
        tokens = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
        return answer["id"], Answered(prompt_tokens(tokenizer, body), tokens, {})

    rng, wanted = random.Random(1), bodies(REQUESTS)
    flags = ("--prefill-step-size", str(STEP), "--prompt-cache-bytes", "20MB", "--prompt-concurrency", "4")
    with running_server(directory, tmp_path / "log", *flags) as server, ThreadPoolExecutor(CONCURRENCY) as pool:
        for start in range(0, REQUESTS, BATCH):
            found = dict(pool.map(one, wanted[start : start + BATCH]))
            for served in server.wait_for(lambda stats: stats["open"] == 0)["recent"]:
                if served["id"] in found:
                    found[served["id"]].served = served
            answered |= found
        assert server.stats()["failed"] == 0
    assert all(request.served for request in answered.values())

    replay = Replay(model, answered)
    for name in answered:
        replay.check(name)
    assert len(replay.near_ties) <= 1 + REQUESTS // 100
    if replay.near_ties:
        record_property(NEAR_TIES, f"{len(replay.near_ties)} of {REQUESTS} {sorted(replay.near_ties)}")

    # what makes it a test
    served = [request.served for request in answered.values()]
    assert len({entry["routes"] for entry in served}) >= 3
    assert sum(entry["cached_from"] is not None for entry in served) >= REQUESTS // 4
    assert len({len(entry["chunks"]) for entry in served}) >= 4
    assert any(cold_routes(model, request.prompt) != request.served["routes"] for request in answered.values())
