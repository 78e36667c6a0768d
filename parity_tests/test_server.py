"""flux_mlx.server: a real process over HTTP, and its parts."""

from __future__ import annotations

import argparse
import json
import logging
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm.server
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.server import GenerationContext

from flux_mlx import load
from flux_mlx.models import set_route
from flux_mlx.safe_loading import load_without_code
from flux_mlx.server import build_parser, default_prompt_cache_bytes
from flux_mlx.server_http import check_body
from flux_mlx.server_log import RequestLog, Saved, Served
from flux_mlx.server_requests import Generator, PromptCache
from parity_tests.server_process import Server, running_server
from parity_tests.tiny_directories import flux_directory
from parity_tests.tiny_models import flux_model, prompt

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


def single_run(model, tokenizer, text: str, n: int = 12, **settings) -> list[int]:
    """The answer of stock's own generation to one prompt."""
    return [r.token for r in stream_generate(model, tokenizer, tokenizer.encode(text), max_tokens=n, **settings)]


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
    drafting = {"prompt": QUESTIONS[0], "model": str(directory), "draft_model": str(stock), "max_tokens": 12}
    model, tokenizer = load(directory)
    set_route(model, (0, 2))
    with running_server(stock, tmp_path / "log", "--num-draft-tokens", "20") as server:
        for body, drafts in ((drafting, 20), (drafting | {"num_draft_tokens": 15}, 15)):
            status, answer = server.post(body)
            assert status == 404
            assert answer["error"] == f"num_draft_tokens must be at most 14 for this model, got {drafts}"
        found = server.complete(QUESTIONS[0], model=str(directory), draft_model=str(stock), num_draft_tokens=14)
        assert found == single_run(model, tokenizer, QUESTIONS[0])
        assert server.complete(QUESTIONS[0], model=str(directory), num_draft_tokens=20) == found  # nothing is drafted
        assert server.complete(QUESTIONS[0], draft_model=str(stock))  # a stock model verifies any number of drafts


def test_the_server_listens_on_loopback_only_by_default():
    args = build_parser().parse_args([])
    assert (args.host, args.allowed_origins, args.trust_remote_code) == ("127.0.0.1", [], False)


def test_every_flag_of_the_stock_server_is_here_or_left_out_on_purpose(monkeypatch):
    def catch(parser, *args):
        raise LookupError({option for action in parser._actions for option in action.option_strings})

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(LookupError) as caught:
            mlx_lm.server.main()
    ours = {option for action in build_parser()._actions for option in action.option_strings}
    assert caught.value.args[0] - ours == {"--trust-remote-code", "--pipeline"}


def test_a_model_that_cannot_be_loaded_is_one_line(directory, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "model_file": "evil.py"}')
    command = [sys.executable, "-m", "flux_mlx.server", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "flux_mlx.server: [load]" in done.stderr
    assert "'evil.py'" in done.stderr
    assert "Traceback" not in done.stderr


# Parts


def test_check_body_names_the_field():
    for body in BAD_BODIES[:3]:
        with pytest.raises(ValueError, match=next(name for name in body if name != "prompt") + "|surrogates"):
            check_body(body)
    check_body({"prompt": "x", "stop": ["a"], "messages": [{"role": "user", "content": None}]})


def test_the_prompt_cache_is_bounded_and_leaves_a_token_to_run():
    model, cache = flux_model(), PromptCache(10, 1, RequestLog())
    entries = model.make_cache()
    model(mx.array([prompt(61)]), cache=entries)
    cache.insert_cache("m", prompt(61), entries)
    assert len(cache) == 0
    cache = PromptCache(10, 1 << 30, RequestLog())
    cache.insert_cache("m", prompt(61), entries)
    found, rest = cache.fetch_nearest_cache("m", prompt(61))
    assert rest == prompt(61)[-1:]
    assert found[0].offset == 60
    assert cache.fetch_nearest_cache("m", prompt(61, 5)) == (None, prompt(61, 5))


def context(tokens: list[int], cached: int = 0) -> GenerationContext:
    return GenerationContext(False, False, None, None, "normal", tokens, cached)


def test_the_log_forgets_dropped_requests():
    log, cache = RequestLog(), flux_model().make_cache()
    kept, dropped = context([1, 2]), context([1, 3])
    log.started("kept", kept)
    log.started("dropped", dropped)
    del dropped
    log.ended("dropped")
    assert log.saved([1, 3, 5], cache) is None
    assert log.stats()["answered"] == 0
    log.ended("kept")
    assert log.saved([1, 2, 5], cache) == Saved("kept", 3)
    assert [entry["id"] for entry in log.stats()["recent"]] == ["kept"]


def test_the_log_tells_requests_of_one_prompt_apart():
    log, cache, tokens = RequestLog(), flux_model().make_cache(), list(range(9))
    log.fetched(None)
    log.started("cold", cold := context(tokens))
    log.fetched(Saved("older", 20))
    log.started("warm", warm := context(tokens, 5))
    for name, end in (("cold", 4), ("warm", 3), ("cold", 8)):
        log.progressed(name, end)
    assert [log.saved(tokens[:8], cache) for _ in range(3)] == [Saved("cold", 8), Saved("warm", 8), None]
    for name, end in (("warm", 4), ("cold", 9)):
        log.progressed(name, end)
        log.ended(name)
        assert log.saved([*tokens, 7], cache) == Saved(name, 10)
    routes_of_both = "0 of 4 routed layers sparse; full: 0,1,2,3; sparse: none"
    assert [Served(**entry) for entry in log.stats()["recent"]] == [
        Served("warm", 9, 5, Saved("older", 20), [3, 1], 1, routes_of_both),
        Served("cold", 9, 0, None, [4, 4, 1], 1, routes_of_both),
    ]
    assert cold.prompt == warm.prompt


def test_a_request_served_alone_looks_for_a_cache_after_its_start():
    log, tokens = RequestLog(), [1, 2, 3]
    log.started("alone", alone := context(tokens, -1))
    log.fetched(Saved("older", 2))
    alone.prompt_cache_count = 2
    log.progressed("alone", 1)
    log.ended("alone")
    log.saved([1, 2, 3, 4], flux_model().make_cache())
    assert log.stats()["recent"][0]["cached_from"] == ("older", 2)


class Failing(Generator):
    """Fails at the first request, answers the second."""

    served = 0

    def _generate(self):
        self.requests.get()
        waiting = self.requests.get()
        self.served += 1
        if self.served == 1:
            raise IndexError("a bug")
        waiting[0].put(None)
        self._stop = True


def test_an_error_in_the_generation_thread_fails_its_requests_only():
    provider = SimpleNamespace(load_default=lambda: None)
    generator = Failing(provider, PromptCache(1, 1, RequestLog()))
    generator.wait_until_loaded()
    first, second, queues = Queue(), Queue(), [Queue() for _ in range(4)]
    for queue in (first, second):
        generator.requests.put((queue, None, None))
    errors = [first.get(timeout=30), second.get(timeout=30)]
    assert all(str(error) == "generation failed: a bug" for error in errors)
    for queue in queues[:2]:
        generator.requests.put((queue, None, None))
    assert queues[1].get(timeout=30) is None
    generator.join()
    assert generator.requests.log.failed == 2


class AlwaysFailing(Generator):
    """Fails at every request."""

    def _generate(self):
        self.requests.get()
        raise IndexError("a bug")


def test_requests_that_come_while_others_fail_are_answered_once():
    generator = AlwaysFailing(SimpleNamespace(load_default=lambda: None), PromptCache(1, 1, RequestLog()))
    generator.wait_until_loaded()

    def put_many(_: int) -> list[Queue]:
        queues = [Queue() for _ in range(100)]
        for queue in queues:
            generator.requests.put((queue, None, None))
        return queues

    interval = sys.getswitchinterval()
    logging.disable(logging.ERROR)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as pool:
            queues = [queue for part in pool.map(put_many, range(16)) for queue in part]
        assert all(str(queue.get(timeout=60)) == "generation failed: a bug" for queue in queues)
    finally:
        sys.setswitchinterval(interval)
        logging.disable(logging.NOTSET)
        generator._stop = True
        generator.requests.put((Queue(), None, None))
        generator.join()
    assert all(queue.empty() for queue in queues)
