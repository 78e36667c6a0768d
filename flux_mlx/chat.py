"""`flux_mlx.chat`: a conversation whose every turn is routed exactly, with the routes in a status line."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm.chat import setup_arg_parser as stock_arg_parser
from mlx_lm.generate import GenerationResponse
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from flux_mlx.cache import CacheList, can_trim, describe_routes, tokens_held
from flux_mlx.cuda_settings import prepare_cuda
from flux_mlx.generate import add_kv_policy_argument, add_route_arguments, describe_stock_flags, load_model, sampler_of
from flux_mlx.stream import stream_generate, warn_if_too_long

HELP = "q  exit    r  reset the conversation    h  this help"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx_lm.chat's parser with our flags added."""
    parser = stock_arg_parser()
    parser.description = "Chat with a Flux model."
    parser.set_defaults(model=None)
    describe_stock_flags(parser)
    add_route_arguments(parser)
    add_kv_policy_argument(parser)
    return parser


class Conversation:
    """Messages so far, and the cache that holds their tokens.

    Args:
        model: A Flux model.
        tokenizer: Its tokenizer, with a chat template.
        system_prompt: First message, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, system_prompt: str | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt is not None else []
        self.tokens: list[int] = []  # what the cache holds
        self.cache = self.model.make_cache()

    def next_prompt(self, query: str) -> list[int]:
        """Add a user message; cut the cache back to what the new text shares with it; return the tokens to run.

        Raises:
            ValueError: The chat template refuses the conversation, which is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": query}]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"[chat] the model's chat template refuses this conversation: {error}") from error
        shared = 0
        while shared < min(len(self.tokens), len(text) - 1) and self.tokens[shared] == text[shared]:
            shared += 1
        self.cut(shared)
        self.messages = messages
        new = list(text[len(self.tokens) :])
        self.tokens = list(text)
        return new

    def cut(self, tokens: int) -> None:
        """Keep the first `tokens` in the cache, and the layers' routes; nothing if they are none, or cannot be cut."""
        excess = tokens_held(self.cache) - tokens
        if excess > 0 and tokens > 0 and can_trim(self.cache, excess):
            for entry in self.cache:
                routes = entry.routes if isinstance(entry, CacheList) else None
                entry.trim(excess)
                if routes is not None:
                    entry.resume(routes)
        elif excess > 0:  # nothing is to be kept; or windows that have moved on, states: what they held before is gone
            self.cache, tokens = self.model.make_cache(), 0
        self.tokens = self.tokens[:tokens]

    def cancel_turn(self) -> None:
        """Take the last user message back, after an interrupted prefill, which leaves the cache as it was."""
        self.messages.pop()
        self.tokens = self.tokens[: tokens_held(self.cache)]

    def close_turn(self, generated: list[int], answer: str) -> None:
        """Store the answer. `generated` are its token ids, of which the cache holds all or all but the last ones."""
        self.messages.append({"role": "assistant", "content": answer})
        self.tokens += generated
        self.cut(min(len(self.tokens), tokens_held(self.cache)))


def answer(console: Console, chat: Conversation, args: argparse.Namespace, query: str) -> None:
    """One turn: prefill with a progress bar, the streamed answer (Ctrl-C ends it), the status line."""
    prompt = chat.next_prompt(query)
    warn_if_too_long(chat.model, len(chat.tokens))
    start = time.perf_counter()
    with Progress(TextColumn("prefill"), BarColumn(), console=console, transient=True) as progress:
        task = progress.add_task("prefill")
        responses = stream_generate(
            chat.model,
            chat.tokenizer,
            prompt,
            prompt_cache=chat.cache,
            prefill_step_size=args.prefill_step_size,
            prompt_progress_callback=lambda done, total: progress.update(task, completed=done, total=total),
            max_tokens=args.max_tokens,
            sampler=sampler_of(args, chat.tokenizer),
        )
        try:
            first = next(responses)
        except KeyboardInterrupt:
            return chat.cancel_turn()
        except ValueError:
            chat.cancel_turn()
            raise
    first_token_s = time.perf_counter() - start
    generated, text = [], ""
    try:
        for response in itertools.chain([first], responses):
            generated.append(response.token)
            text += response.text
            console.print(response.text, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        responses.close()
    chat.close_turn(generated, text)
    console.print()
    console.print(status_line(chat, len(prompt), first_token_s, response), style="dim", markup=False)


def status_line(chat: Conversation, new_tokens: int, first_token_s: float, response: GenerationResponse) -> str:
    """New tokens, time to the first, speed and routes of a turn."""
    speed = f"{response.generation_tps:.1f} tok/s"
    return f"{new_tokens} new tokens · first after {first_token_s:.1f} s · {speed} · {describe_routes(chat.cache)}"


def main() -> None:
    """Entry point."""
    prepare_cuda()
    parser = setup_arg_parser()
    args = parser.parse_args()
    mx.random.seed(args.seed)
    model, tokenizer = load_model(parser, args)
    if not tokenizer.has_chat_template:
        parser.exit(2, f"{parser.prog}: the tokenizer of {args.model} has no chat template\n")
    console = Console(highlight=False)
    console.print(f"flux_mlx.chat · {args.model} · {HELP}", style="bold", markup=False)
    chat = Conversation(model, tokenizer, args.system_prompt)
    while True:
        try:
            query = console.input("[bold]>> [/bold]")
        except (EOFError, KeyboardInterrupt):
            query = "q"
        if query == "q":
            break
        if query == "r":
            chat.reset()
            console.print("conversation reset", style="dim")
        elif query == "h":
            console.print(HELP)
        elif query.strip():
            try:
                answer(console, chat, args, query)
            except ValueError as error:
                console.print(str(error), style="red", markup=False)


if __name__ == "__main__":
    main()
