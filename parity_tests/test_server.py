"""flux_mlx.server: a real process over HTTP, and its answers."""

from __future__ import annotations

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flux_mlx import load
from flux_mlx.models import set_route
from flux_mlx.server import default_prompt_cache_bytes
from parity_tests.greedy import single_run
from parity_tests.server_process import Server, running_server
from parity_tests.tiny_directories import flux_directory

SYSTEM = "You answer in few words, and you never speak of yourself or of the weather. "
QUESTIONS = [f"{SYSTEM}Question {i}: what comes after {'x' * (7 * i)}?" for i in range(6)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = flux_directory(tmp_path_factory.mktemp("server") / "flux")
    config = json.loads((path / "config.json").read_text())
    config["flux"]["route"] = [0, 2]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def server(directory, log) -> Server:
    with running_server(directory, log) as server:
        yield server


def test_mixed_requests_get_their_single_run_answers(server, directory):
    model, tokenizer = load(directory)
    set_route(model, (0, 2))
    expected = [single_run(model, tokenizer, question) for question in QUESTIONS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(server.complete, QUESTIONS * 3)) == expected * 3
    status, answer = server.post({"prompt": QUESTIONS[0], "max_tokens": 12})
    assert status == 200
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > len(SYSTEM)
    stats = server.wait_for(lambda stats: stats["answered"] == len(QUESTIONS * 3) + 1)
    assert (stats["failed"], stats["open"]) == (0, 0)
    assert stats["recent"][-1]["routes"] == "2 of 4 routed layers sparse; full: 0,2; sparse: 1,3"
    assert stats["recent"][-1]["prompt_tokens"] == len(QUESTIONS[0])
    assert 0 < stats["prompt_cache"]["bytes"] < stats["prompt_cache"]["limit_bytes"] == default_prompt_cache_bytes()


def test_routes_are_in_the_log(server, log):
    answered = server.stats()["answered"]
    server.complete("x" * 61)
    server.wait_for(lambda stats: stats["answered"] == answered + 1)
    assert "61 prompt tokens, " in log.read_text()
    assert "of them cached; 2 of 4 routed layers sparse; full: 0,2" in log.read_text()


def test_a_conversation_and_its_continuation(server):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello there, who are you?"}]
    status, answer = server.post({"messages": messages, "max_tokens": 9}, "/v1/chat/completions")
    assert status == 200
    messages += [answer["choices"][0]["message"] | {"content": "A."}, {"role": "user", "content": "And now?"}]
    status, answer = server.post({"messages": messages, "max_tokens": 9, "seed": 3}, "/v1/chat/completions")
    assert status == 200
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_stream_ends_well(server):
    body = json.dumps({"prompt": "x" * 61, "stream": True, "max_tokens": 5}).encode()
    status, text = server.raw("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert status == 200
    assert text.endswith("data: [DONE]\n\n")


def test_the_same_prompt_twice_and_a_cached_answer_as_prompt(server):
    answer = server.post({"prompt": "y" * 40, "max_tokens": 9, "logit_bias": {"66": 100}})[1]["choices"][0]["text"]
    assert answer == "c" * 9  # so that text and tokens are the same thing
    first = server.complete("y" * 40)
    assert server.complete("y" * 40) == first
    for end in (8, 9):  # what the cache holds, exactly, and one token more
        assert server.complete("y" * 40 + answer[:end])


def test_a_killed_client_leaves_nothing_behind(server):
    before = server.wait_for(lambda stats: stats["open"] == 0)
    body = json.dumps({"prompt": "x" * 61, "max_tokens": 100_000, "logit_bias": {"256": -1e9}}).encode()
    headers = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", *headers, "", ""])
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + body)
        server.wait_for(lambda stats: stats["open"] == 1)
    after = server.wait_for(lambda stats: stats["open"] == 0)
    if sys.platform == "linux":
        server.wait_until_idle()
    assert after["requests"] == before["requests"] + 1
    assert after["answered"] == before["answered"]
    assert after["prompt_cache"]["sequences"] <= before["prompt_cache"]["sequences"] + 1  # the prompt's, to go on with
    server.complete("z" * 20)
    server.wait_for(lambda stats: stats["answered"] == before["answered"] + 1)


ONE_BY_ONE = [
    ("--draft-model", "{model}"),
    ("--kv-bits", "8", "--kv-group-size", "32"),
    ("--kv-policy", "evict"),
    ("--kv-policy", "evict", "--draft-model", "{model}"),
]


@pytest.mark.parametrize("flags", ONE_BY_ONE)
def test_requests_served_one_by_one_get_their_single_run_answers(directory, tmp_path, flags):
    flags = [flag.format(model=directory) for flag in flags]
    model, tokenizer = load(directory)
    set_route(model, (0, 2))
    settings = {"kv_bits": 8, "kv_group_size": 32} if "--kv-bits" in flags else {}
    with running_server(directory, tmp_path / "log", *flags, "--quantized-kv-start", "0") as server:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(server.complete, QUESTIONS[:3]))
        stats = server.wait_for(lambda stats: stats["answered"] == 3)
    first = single_run(model, tokenizer, QUESTIONS[0], **settings, quantized_kv_start=0)
    assert found[0] == first
    if not settings:  # else cached prefixes are quantised, so that only the first request is a single run
        assert found == [single_run(model, tokenizer, question) for question in QUESTIONS[:3]]
    assert stats["recent"][-1]["routes"] == "2 of 4 routed layers sparse; full: 0,2; sparse: 1,3"


def test_too_many_drafts_are_refused_for_the_model_that_a_request_names(directory, tmp_path):
    stock = directory.with_name(f"{directory.name}-stock")
    routed = flux_directory(tmp_path / "routed")
    drafting = {"draft_model": str(stock), "max_tokens": 12}
    with running_server(stock, tmp_path / "log", "--num-draft-tokens", "20") as server:
        for body, drafts in (({}, 20), ({"num_draft_tokens": 15}, 15)):
            status, answer = server.post({"prompt": QUESTIONS[0], "model": str(routed), **drafting, **body})
            assert status == 404
            assert answer["error"] == f"num_draft_tokens must be at most 14 for this model, got {drafts}"
        found = server.complete(QUESTIONS[0], model=str(routed), **drafting, num_draft_tokens=14)
        assert found == single_run(*load(routed), QUESTIONS[0])
        assert server.complete(QUESTIONS[0], model=str(routed), num_draft_tokens=20) == found  # nothing is drafted
        forced = server.complete(QUESTIONS[0], model=str(directory), **drafting)  # no router takes 20 for a prompt
        assert forced == single_run(*load(directory), QUESTIONS[0])
        assert server.complete(QUESTIONS[0], **drafting)  # a stock model verifies any number of drafts
