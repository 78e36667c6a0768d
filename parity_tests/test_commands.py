"""`flux_mlx.generate`, `flux_mlx.chat` and the stock command on a Flux model directory, as a user runs them."""

from __future__ import annotations

import importlib
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
from flux_mlx.cuda_settings import CUDA_SETTINGS
from flux_mlx.models import routed_layers, set_route
from flux_mlx.spec import FluxConfig, Route, RouterConfig
from flux_mlx.stream import stream_generate, warn_if_too_long
from parity_tests.tiny_directories import TEMPLATE, VOCABULARY, flux_directory
from parity_tests.tiny_models import flux_model

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


@pytest.mark.parametrize("flags", [(), ("--draft-model", "{model}")])
def test_the_answer_is_the_same_from_sink_and_window_alone(directory, flags):
    flags = [flag.format(model=directory) for flag in flags]
    answers = []
    for policy in ("keep", "evict"):
        arguments = ("--model", str(directory), "-p", PROMPT, "-m", "30", "--route", "1,3", "--verbose", "False")
        done = run("flux_mlx.generate", *arguments, "--kv-policy", policy, *flags)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1] != ""


def test_stock_generate_shows_routes_and_obeys_the_environment(directory):
    arguments = ("--model", str(directory), "-p", PROMPT, "-m", "3", "--trust-remote-code")
    done = run("mlx_lm.generate", *arguments, FLUX_MLX_SHOW_ROUTES="1", FLUX_MLX_ROUTE="0,2")
    assert done.returncode == 0, done.stderr
    assert "flux: 2 of 4 routed layers sparse; full: 0,2; sparse: 1,3" in done.stderr
    refused = run("mlx_lm.generate", *arguments, FLUX_MLX_ROUTE="0-x")
    assert refused.returncode
    said = "[FLUX_MLX_ROUTE] expected auto, full, sparse or a list of full layers like 0,2,6-8; got '0-x'"
    assert said in refused.stderr
    refused = run("flux_mlx.generate", "--model", str(directory), "-p", PROMPT, FLUX_MLX_ROUTE="0-x")
    assert refused.stderr.startswith(f"flux_mlx.generate: {said}")


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
    with pytest.raises(ValueError, match="expected 14 draft tokens at most with this route and KV policy, got 15"):
        next(stream_generate(model, tokenizer, tokens, draft_model=draft, num_draft_tokens=15))


@pytest.mark.parametrize("policy", ["keep", "evict"])
def test_with_forced_routes_long_drafts_are_verified_too(directory, policy):
    model, tokenizer = flux_mlx.load(directory)
    stock, _ = mlx_lm.load(str(directory.with_name(directory.name + "-stock")))
    flux_mlx.set_route(model, (1, 3))
    flux_mlx.set_kv_policy(model, policy)
    tokens = tokenizer.encode(PROMPT)

    def answer(**settings) -> list[int]:
        return [r.token for r in stream_generate(model, tokenizer, tokens, max_tokens=60, **settings)]

    greedy = answer()
    for drafted in (15, 40):
        assert answer(draft_model=stock, num_draft_tokens=drafted) == greedy
    if policy == "keep":
        assert model.max_draft_tokens is None
        return
    with pytest.raises(ValueError, match="expected 255 draft tokens at most with this route and KV policy, got 256"):
        answer(draft_model=stock, num_draft_tokens=256)
    assert answer(draft_model=stock, num_draft_tokens=255) == greedy


def test_stock_speculative_generation_is_greedy_or_refused(directory):
    model, tokenizer = flux_mlx.load(directory)
    stock, _ = mlx_lm.load(str(directory.with_name(directory.name + "-stock")))

    def answer(target, tokens, **settings):
        return [r.token for r in mlx_lm.stream_generate(target, tokenizer, tokens, max_tokens=20, **settings)]

    for text in (PROMPT, PROMPT[:9]):  # a prompt that is routed, and one that is not
        tokens = tokenizer.encode(text)
        greedy = answer(model, tokens)
        assert answer(model, tokens, draft_model=stock, num_draft_tokens=14) == greedy
        for drafted in (15, 20):
            with pytest.raises(
                ValueError, match=f"expected 14 draft tokens at most with this route and KV policy, got {drafted}"
            ):
                answer(model, tokens, draft_model=stock, num_draft_tokens=drafted)
        assert answer(stock, tokens, draft_model=model, num_draft_tokens=20) == answer(stock, tokens)
    set_route(model, (1, 3))
    assert answer(model, tokens, draft_model=stock, num_draft_tokens=20) == answer(model, tokens)


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
        (("--model", "{dir}-none"), "[load] {dir}-none is neither a model directory here nor a hub id."),
        (("--model", "no/hub"), "[load] no/hub is neither a model directory here, nor could the hub give it: "),
        (("--model", "{dir}-stock"), "has no flux section"),
        (("--model", "{dir}", "--route", "9"), "[9] are not routed layers; the model routes layers [0, 1, 2, 3]"),
        (("--model", "{dir}", "--route", "some"), "got 'some'"),
        (("--model", "{dir}", "--max-kv-size", "64"), "--max-kv-size is not supported"),
        (("--model", "{dir}", "-m", "0"), "--max-tokens must not be 0"),
        (("--model", "{dir}", "--chat-template-config", "{{"), "expected a JSON object, got '{'"),
        (("--model", "{dir}", "--draft-model", "{dir}-none"), "-none is neither a model directory here nor a hub id."),
        ((), "--model is required"),
    ],
)
def test_generate_refuses_in_one_line(directory, arguments, message):
    done = run("flux_mlx.generate", *(word.format(dir=directory) for word in arguments), "-p", "x", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert message.replace("{dir}", str(directory)) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_help_says_what_the_flags_do_here(command):
    said = " ".join(importlib.import_module(f"flux_mlx.{command}").setup_arg_parser().format_help().split())
    for flag in ("--image", "--max-kv-size", "--quantize-activations", "-qa", "--pipeline", "Llama-3.2"):
        assert flag not in said
    assert "Flux model directory, made by flux_mlx.convert" in said
    assert "without effect: no model's own code is run" in said


def test_chat_refuses_what_its_help_leaves_out(directory):
    for flags in (("--pipeline",), ("--max-kv-size", "64")):
        done = run("flux_mlx.chat", "--model", str(directory), *flags)
        assert done.returncode == 2
        assert f"{flags[0]} is not supported by Flux models" in done.stderr


@pytest.mark.parametrize("command", ["generate", "chat", "cache_prompt", "server", "benchmark"])
def test_every_command_makes_room_for_many_shapes_on_cuda(command, monkeypatch):
    first, *others = CUDA_SETTINGS
    monkeypatch.setenv(first, "7")
    for name in others:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"flux_mlx.{command}").main()
    assert {name: os.environ[name] for name in CUDA_SETTINGS} == CUDA_SETTINGS | {first: "7"}
    for name in others:
        monkeypatch.delenv(name)


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


def say(chat: Conversation, query: str, tokens: int = 4) -> int:
    """One turn; returns the number of tokens that it ran."""
    new = chat.next_prompt(query)
    responses = list(stream_generate(chat.model, chat.tokenizer, new, prompt_cache=chat.cache, max_tokens=tokens))
    chat.close_turn([r.token for r in responses], "".join(r.text for r in responses))
    return len(new)


FORGETFUL = TEMPLATE.replace(
    "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think></think>"
)


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL])
def test_a_conversations_cache_holds_its_text(directory, template):
    model, tokenizer = flux_mlx.load(directory)
    flux_mlx.set_route(model, (0, 2))
    tokenizer.chat_template = tokenizer._tokenizer.chat_template = template
    chat = Conversation(model, tokenizer, "be brief")
    for query in (PROMPT, "short?", PROMPT):
        new = say(chat, query)
        assert new < len(chat.tokens) or len(chat.messages) == 3
        fresh = model.make_cache()
        flux_mlx.prefill(model, mx.array([*chat.tokens, 1]), fresh)
        assert [entry.offset for entry in chat.cache] == [len(chat.tokens)] * 4
        for mine, theirs in zip(chat.cache, fresh, strict=True):
            for a, b in zip(mine.keys_and_values(), theirs.keys_and_values(), strict=True):
                assert mx.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL])
def test_a_short_turn_only_takes_layers_to_full(directory, template):
    model, tokenizer = flux_mlx.load(directory)
    tokenizer.chat_template = tokenizer._tokenizer.chat_template = template
    with_long_pools(model)
    chat = Conversation(model, tokenizer)
    lean(model, Route.FULL)
    say(chat, PROMPT)
    lean(model, Route.SPARSE)
    assert say(chat, "ok?") < 100
    assert flux_mlx.routes(chat.cache) == [Route.FULL] * 4
    say(chat, PROMPT)
    assert flux_mlx.routes(chat.cache) == [Route.SPARSE] * 4
    lean(model, Route.FULL)
    assert say(chat, "why?") < 100
    assert flux_mlx.routes(chat.cache) == [Route.FULL] * 4


def test_a_cut_to_nothing_forgets_the_routes(directory):
    model, tokenizer = flux_mlx.load(directory)
    with_long_pools(model)
    chat = Conversation(model, tokenizer)
    lean(model, Route.FULL)
    say(chat, PROMPT)
    assert flux_mlx.routes(chat.cache) == [Route.FULL] * 4
    chat.messages.clear()
    chat.cut(0)
    assert (chat.tokens, flux_mlx.routes(chat.cache)) == ([], [Route.UNSET] * 4)
    lean(model, Route.SPARSE)
    assert say(chat, "to be or not to be") < 100
    assert flux_mlx.routes(chat.cache) == [Route.SPARSE] * 4  # no turn before this one holds the layers full


def with_long_pools(model) -> None:
    """Pools of 100 tokens, more than a short turn has."""
    for attn in routed_layers(model).values():
        attn.flux = FluxConfig(pattern=model.flux.pattern, router=RouterConfig(pool_tokens=100))


def lean(model, route: Route) -> None:
    """Make every router decide alike."""
    for attn in routed_layers(model).values():
        attn.router.head[-1].weight = mx.zeros_like(attn.router.head[-1].weight)
        attn.router.head[-1].bias = mx.array([0.0, 1.0 if route == Route.FULL else -1.0])


@pytest.mark.parametrize(
    ("family", "changes"), [("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 24}), ("granitemoehybrid", {})]
)
def test_a_conversation_with_windows_or_states_starts_anew_where_it_cannot_cut(directory, family, changes):
    _, tokenizer = flux_mlx.load(directory)
    model = flux_model(family, vocab_size=VOCABULARY, **changes)
    tokenizer.chat_template = tokenizer._tokenizer.chat_template = FORGETFUL
    flux_mlx.set_route(model, "full")
    chat = Conversation(model, tokenizer)
    for query in (PROMPT, "short?"):
        new = chat.next_prompt(query)
        whole = list(chat.tokens)
        responses = list(stream_generate(model, tokenizer, new, prompt_cache=chat.cache, max_tokens=4))
        cold = [r.token for r in stream_generate(model, tokenizer, whole, max_tokens=4)]
        assert [r.token for r in responses] == cold
        chat.close_turn([r.token for r in responses], "".join(r.text for r in responses))


def test_a_template_that_refuses_leaves_the_conversation(directory):
    model, tokenizer = flux_mlx.load(directory)
    tokenizer.chat_template = tokenizer._tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    chat = Conversation(model, tokenizer, "be brief")
    with pytest.raises(
        ValueError, match=r"\[chat\] the model's chat template refuses this conversation: no system role"
    ):
        chat.next_prompt("hello")
    assert len(chat.messages) == 1


def test_logits_processors_see_the_prompt(directory):
    model, tokenizer = flux_mlx.load(directory)
    seen = {"flux": [], "stock": []}

    def processor(name: str):
        return lambda tokens, logits: (seen[name].append(tokens.tolist()), logits)[1]

    tokens = tokenizer.encode(PROMPT)
    for name, generate in (("flux", stream_generate), ("stock", mlx_lm.stream_generate)):
        list(generate(model, tokenizer, tokens, max_tokens=3, logits_processors=[processor(name)]))
    assert seen["flux"] == [step for step in seen["stock"] if len(step) >= len(tokens)]


def test_settings_are_refused_before_the_prefill(directory):
    model, tokenizer = flux_mlx.load(directory)
    cases = [
        ({"max_tokens": 0}, "max_tokens must not be 0"),
        ({"kv_bits": 7}, "keys of head dim 32 cannot be quantised with kv_bits 7"),
        ({"kv_bits": 4, "kv_group_size": 128}, "kv_group_size 128"),
    ]
    for settings, message in cases:
        cache = model.make_cache()
        with pytest.raises(ValueError, match=message):
            next(stream_generate(model, tokenizer, [1, 2, 3], prompt_cache=cache, **settings))
        assert cache[0].offset == 0


def test_a_cancelled_turn_leaves_no_trace(directory):
    model, tokenizer = flux_mlx.load(directory)
    chat = Conversation(model, tokenizer)
    say(chat, PROMPT)
    before = (list(chat.messages), list(chat.tokens), flux_mlx.routes(chat.cache))
    new = chat.next_prompt("and then?")

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(stream_generate(model, tokenizer, new, prompt_cache=chat.cache, prompt_progress_callback=interrupt))
    chat.cancel_turn()
    assert (chat.messages, chat.tokens, flux_mlx.routes(chat.cache)) == before
    assert chat.cache[0].offset == len(chat.tokens)
