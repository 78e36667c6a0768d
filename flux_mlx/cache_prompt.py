"""`flux_mlx.cache_prompt`: process a prompt once, with exact routing, and save its cache with a fingerprint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from flux_mlx.cache import describe_routes
from flux_mlx.cache_files import check_target, save_prompt_cache
from flux_mlx.cuda_settings import prepare_cuda
from flux_mlx.exact_prefill import DEFAULT_STEP_TOKENS, prefill
from flux_mlx.generate import add_route_arguments, load_model, progress_bar


def cache_prompt(
    model: nn.Module, tokens: list[int], prefill_step_size: int = DEFAULT_STEP_TOKENS, **report: Any
) -> list:
    """The cache after a prompt, its last token included.

    Args:
        model: A Flux model.
        tokens: The prompt, 1 token or more.
        prefill_step_size: Tokens of a prefill chunk.
        report: `prompt_progress_callback` of `flux_mlx.prefill`.
    """
    cache = model.make_cache()
    with mx.stream(generation_stream):
        last = prefill(model, mx.array(tokens), cache, prefill_step_size=prefill_step_size, **report)
        model(last[None], cache=cache)
        mx.eval([entry.state for entry in cache])
    return cache


def build_parser() -> argparse.ArgumentParser:
    """The command line: mlx_lm.cache_prompt's flags, and ours."""
    parser = argparse.ArgumentParser(prog="flux_mlx.cache_prompt", description="Save the cache of a prompt.")
    parser.add_argument("--model", required=True, help="Flux model directory")
    parser.add_argument("--adapter-path", help="trained adapter weights and config")
    parser.add_argument("--prompt", required=True, help="the prompt; - reads it from stdin")
    parser.add_argument("--prompt-cache-file", required=True, help="file to write, ending in .safetensors")
    parser.add_argument("--prefill-step-size", type=int, default=DEFAULT_STEP_TOKENS, help="(default: %(default)s)")
    parser.add_argument("--kv-bits", type=int, help="bits of quantised keys and values (default: as computed)")
    parser.add_argument("--kv-group-size", type=int, default=64, help="(default: %(default)s)")
    add_route_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Bad input ends in one line on stderr and status 2."""
    prepare_cuda()
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_target(args.prompt_cache_file)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    model, tokenizer = load_model(parser, args)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": text}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    else:
        tokens = tokenizer.encode(text)
    report, bar = progress_bar(enabled=True)
    metadata = {"model": args.model, "tokenizer_config": json.dumps({})}
    try:
        cache = cache_prompt(model, tokens, args.prefill_step_size, prompt_progress_callback=report)
        bar.close()
        if args.kv_bits:
            cache = [entry.to_quantized(args.kv_group_size, args.kv_bits) for entry in cache]
        save_prompt_cache(args.prompt_cache_file, cache, model, metadata)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{len(tokens)} tokens saved in {args.prompt_cache_file}")
    if args.show_routes:
        print(f"Routes: {describe_routes(cache)}")


if __name__ == "__main__":
    main()
