"""Compiled steps hold few things, for no longer than they are needed, one set for each thread."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import mlx.core as mx
import numpy as np
import pytest

import flux_mlx
from flux_mlx.benchmark_parts import AttentionShape, grow
from parity_tests.held_memory import settled_memory
from parity_tests.tiny_models import flux_model, prompt
from parity_tests.token_by_token import PROMPT_TOKENS, decoded, double_down, one_by_one, scale_all, steps_of


def test_every_thread_traces_for_itself():
    model, tokens, found = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 4), []
    cache = model.make_cache()
    expected = decoded(model, tokens, cache=copy.deepcopy(cache))
    thread = threading.Thread(target=lambda: found.append(decoded(model, tokens, cache=cache)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], expected)
    assert len(steps_of(model)) == 2 * len(model.layers)


def test_threads_that_come_and_go_leave_few_steps():
    model = flux_model("llama", route="full")
    block, x = model.layers[0], mx.zeros((1, 1, 128))
    started = threading.Barrier(12)  # all are alive at once, so that no number is given out twice

    def trace() -> None:
        block.token_steps.find(block, x)
        started.wait()

    threads = [threading.Thread(target=trace) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < len(block.token_steps._steps) <= 8


def test_steps_hold_no_copy_of_a_weight_and_no_old_weight_for_long():
    model, tokens = flux_model("llama", route=(1,)), prompt(PROMPT_TOKENS + 3)
    mx.eval(model(mx.array(tokens)[None], cache=model.make_cache()))
    held = settled_memory()
    thread = threading.Thread(target=decoded, args=(model, tokens))
    thread.start()
    thread.join()
    decoded(model, tokens)
    assert settled_memory() - held < model.layers[0].mlp.up_proj.weight.nbytes // 4
    old = weakref.ref(steps_of(model)[0]), weakref.ref(steps_of(model)[1])
    double_down(model)
    scale_all(model)
    decoded(model, tokens)
    assert [step() for step in old] == [None, None]


@pytest.mark.parametrize("route", ["full", "sparse"])
def test_a_token_copies_no_keys(route):
    model = flux_model("llama", route=route)
    shape, cache = AttentionShape.of(model), model.make_cache()
    for entry in cache:
        grow(entry.kv, shape, 20_000)
    one_by_one(model, prompt(3), cache)
    held = settled_memory()
    one_by_one(model, prompt(3), cache)
    assert all(step.is_traced for step in steps_of(model))
    assert mx.get_peak_memory() - held < cache[0].kv.keys.nbytes // 2


def test_neither_steps_nor_kept_caches_hold_on_to_a_model():
    model = flux_model("llama", route=(1,))
    cache = model.make_cache()
    decoded(model, prompt(PROMPT_TOKENS + 4), cache=cache)
    block, step = weakref.ref(model.layers[0]), weakref.ref(steps_of(model)[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert block() is None  # no cycle: the memory is free at once
        assert step() is None
    finally:
        gc.enable()
    assert flux_mlx.routes(cache)
