"""flux_mlx.server: its parts, without a process: command line, prompt cache, log, generation thread."""

from __future__ import annotations

import argparse
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm.server
import pytest
from mlx_lm.server import GenerationContext

from flux_mlx.server import build_parser
from flux_mlx.server_log import RequestLog, Saved, Served
from flux_mlx.server_requests import Generator, PromptCache
from parity_tests.tiny_models import flux_model, prompt


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
