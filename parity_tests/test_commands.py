"""`flux_mlx.generate`, `flux_mlx.chat` and the stock command on a Flux model directory, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

import flux_mlx
from flux_mlx.chat import Conversation
from flux_mlx.spec import Route
from flux_mlx.stream import stream_generate, warn_if_too_long
from parity_tests.tiny_directories import flux_directory

BIN = Path(sys.executable).parent
PROMPT = "the quick brown fox " * 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return flux_directory(tmp_path_factory.mktemp("commands") / "tiny")


def run(command: str, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(BIN / command), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=120,
    )


def test_generate_prints_answer_statistics_and_routes(directory):
    done = run(
        "flux_mlx.generate", "--model", str(directory), "-p", PROMPT, "-m", "5", "--show-routes", "--route", "1,3"
    )
    assert done.returncode == 0, done.stderr
    for pattern in (
        r"Prompt: \d+ tokens, [\d.]+ tokens-per-sec",
        r"Generation: 5 tokens",
        r"Time to first token: [\d.]+ s",
        r"Peak memory: [\d.]+ GB",
        r"Routes: 2 of 4 routed layers sparse; full: 1,3; sparse: 0,2",
    ):
        assert re.search(pattern, done.stdout), pattern


def test_stock_generate_shows_routes_and_obeys_the_environment(directory):
    arguments = ("--model", str(directory), "-p", PROMPT, "-m", "3", "--trust-remote-code")
    done = run("mlx_lm.generate", *arguments, FLUX_MLX_SHOW_ROUTES="1", FLUX_MLX_ROUTE="0,2")
    assert done.returncode == 0, done.stderr
    assert "flux: 2 of 4 routed layers sparse; full: 0,2; sparse: 1,3" in done.stderr
    refused = run("mlx_lm.generate", *arguments, FLUX_MLX_ROUTE="0-x")
    assert refused.returncode
    assert "expected auto, full, sparse or a list of full layers like 0,2,6-8; got '0-x'" in refused.stderr


def test_the_trust_flag_is_asked_for_by_name(directory):
    done = run("mlx_lm.generate", "--model", str(directory), "-p", "x")
    assert done.returncode
    assert "trust_remote_code=True" in done.stderr


def test_exact_and_stock_generation_agree_on_a_prompt_of_one_chunk(directory):
    model, tokenizer = flux_mlx.load(directory)
    tokens = tokenizer.encode(PROMPT)
    exact = [response.token for response in stream_generate(model, tokenizer, tokens, max_tokens=8)]
    stock = [response.token for response in mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens=8)]
    assert exact == stock


def test_speculative_generation_is_greedy(directory):
    model, tokenizer = flux_mlx.load(directory)
    draft, _ = mlx_lm.load(str(directory.with_name(directory.name + "-stock")))
    tokens = tokenizer.encode(PROMPT)
    greedy = [response.token for response in stream_generate(model, tokenizer, tokens, max_tokens=8)]
    drafted = stream_generate(model, tokenizer, tokens, max_tokens=8, draft_model=draft)
    assert [response.token for response in drafted] == greedy
    with pytest.raises(ValueError, match="takes fewer than 15 draft tokens, got 15"):
        next(stream_generate(model, tokenizer, tokens, draft_model=draft, num_draft_tokens=15))


def test_a_saved_prompt_cache_is_continued(directory, tmp_path):
    saved = tmp_path / "cache.safetensors"
    done = run(
        *("mlx_lm.cache_prompt", "--model", str(directory), "--prompt", PROMPT, "--trust-remote-code"),
        *("--prompt-cache-file", str(saved)),
    )
    assert done.returncode == 0, done.stderr
    done = run("flux_mlx.generate", "--prompt-cache-file", str(saved), "-p", "and then?", "-m", "4", "--show-routes")
    assert done.returncode == 0, done.stderr
    assert "Routes: " in done.stdout
    saved.write_bytes(saved.read_bytes()[:100])
    done = run("flux_mlx.generate", "--prompt-cache-file", str(saved), "-p", "x")
    assert done.returncode == 2
    assert f"cannot read prompt cache {saved}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "{dir}-none"), "none"),
        (("--model", "{dir}-stock"), "has no flux section"),
        (("--model", "{dir}", "--route", "9"), "[9] are not routed layers; the model routes layers [0, 1, 2, 3]"),
        (("--model", "{dir}", "--route", "some"), "got 'some'"),
        (("--model", "{dir}", "--max-kv-size", "64"), "--max-kv-size is not supported"),
        ((), "--model is required"),
    ],
)
def test_generate_refuses_in_one_line(directory, arguments, message):
    done = run("flux_mlx.generate", *(word.format(dir=directory) for word in arguments), "-p", "x", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_longer_than_the_context_is_warned_of(directory):
    model, _ = flux_mlx.load(directory)
    model.args.max_position_embeddings = 20
    with pytest.warns(UserWarning, match="the prompt has 21 tokens, the model's context is 20"):
        warn_if_too_long(model, 21)


def test_chat_turns_keep_one_cache(directory):
    done = run("flux_mlx.chat", "--model", str(directory), "-m", "4", stdin=f"{PROMPT}\nh\nand then?\nr\nagain\nq\n")
    assert done.returncode == 0, done.stderr
    turns = re.findall(
        r"(\d+) new tokens · first after [\d.]+ s · [\d.]+ tok/s · (\d) of 4", done.stdout.replace("\n", " ")
    )
    assert len(turns) == 3
    assert int(turns[0][0]) > int(turns[1][0])
    assert "conversation reset" in done.stdout
    assert "q  exit" in done.stdout


def test_a_conversation_feeds_only_what_is_new(directory):
    model, tokenizer = flux_mlx.load(directory)
    chat = Conversation(model, tokenizer, "be brief")
    for query in (PROMPT, "short?", PROMPT):
        new = chat.next_prompt(query)
        whole = list(chat.tokens)
        responses = list(stream_generate(model, tokenizer, new, prompt_cache=chat.cache, max_tokens=4))
        chat.close_turn([r.token for r in responses], "".join(r.text for r in responses))
        assert chat.cache[0].offset == len(chat.tokens)
        assert chat.tokens[: len(whole)] == whole
        fresh = model.make_cache()
        flux_mlx.prefill(model, mx.array([*chat.tokens, 1]), fresh)
        assert len({entry.offset for entry in chat.cache}) == 1
        assert fresh[0].offset == chat.cache[0].offset


def test_a_short_turn_only_takes_layers_to_full(directory):
    model, tokenizer = flux_mlx.load(directory)
    chat = Conversation(model, tokenizer)
    taken = []
    for query in (PROMPT, "ok?", "why?"):
        new = chat.next_prompt(query)
        responses = list(stream_generate(model, tokenizer, new, prompt_cache=chat.cache, max_tokens=3))
        chat.close_turn([r.token for r in responses], "".join(r.text for r in responses))
        taken.append(flux_mlx.routes(chat.cache))
        shorter = len(new) < model.flux.router.pool_tokens
        if len(taken) > 1 and shorter:
            kept = zip(taken[-2], taken[-1], strict=True)
            assert all(after == Route.FULL for before, after in kept if before == Route.FULL)


def test_a_cancelled_turn_leaves_no_trace(directory):
    model, tokenizer = flux_mlx.load(directory)
    chat = Conversation(model, tokenizer)
    chat.next_prompt(PROMPT)
    chat.cancel_turn()
    assert (chat.messages, chat.tokens, chat.cache[0].offset) == ([], [], 0)
