"""`flux_mlx.generate`: mlx_lm.generate's flags, exact routing, a progress bar by layer, the routes."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm.generate import setup_arg_parser as stock_arg_parser
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from flux_mlx.adapters import load_adapters
from flux_mlx.cache import CacheList, describe_routes, tokens_held
from flux_mlx.cache_files import check_model, has_fingerprint, read_metadata
from flux_mlx.cuda_settings import prepare_cuda
from flux_mlx.loading import load
from flux_mlx.models import KV_POLICIES, set_kv_policy, set_route
from flux_mlx.safe_loading import load_without_code
from flux_mlx.spec import parse_route
from flux_mlx.stream import stream_generate, warn_if_too_long

UNSUPPORTED = ("image", "quantize_activations", "max_kv_size", "pipeline")
FLAG_HELP = {
    "model": "Flux model directory, made by flux_mlx.convert, or hub id of one",
    "trust_remote_code": "taken for likeness with mlx-lm, and without effect: no model's own code is run",
}
QUERY = "<query>"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx_lm.generate's parser with our flags added."""
    parser = stock_arg_parser()
    parser.description = "Generate text with a Flux model: every layer routed on the whole prompt."
    describe_stock_flags(parser)
    add_route_arguments(parser)
    add_kv_policy_argument(parser)
    return parser


def describe_stock_flags(parser: argparse.ArgumentParser) -> None:
    """Make the help of mlx-lm's flags say what they do here; those that `load_model` refuses are left out of it."""
    for action in parser._actions:
        if action.dest in UNSUPPORTED:
            action.help = argparse.SUPPRESS
        elif action.dest in FLAG_HELP:
            action.help = FLAG_HELP[action.dest]


def template_settings(parser: argparse.ArgumentParser, text: str | None) -> dict[str, Any]:
    """The value of --chat-template-config; exits with one line if it is not a JSON object."""
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        parser.error(f"--chat-template-config: expected a JSON object, got {text!r}")
    return value


def add_route_argument(parser: argparse.ArgumentParser) -> None:
    """--route, spelled alike in every command."""
    parser.add_argument(
        "--route",
        type=_route,
        help="auto (the routers decide), full, sparse, or the full layers as in 0,2,6-8. Default: FLUX_MLX_ROUTE, "
        "else the model's config",
    )


def add_route_arguments(parser: argparse.ArgumentParser) -> None:
    """--route, and --show-routes, spelled alike in every command that shows routes when asked."""
    add_route_argument(parser)
    parser.add_argument("--show-routes", action="store_true", help="Print which layers were full and which sparse")


def add_kv_policy_argument(parser: argparse.ArgumentParser) -> None:
    """--kv-policy, spelled alike in every command that has it."""
    parser.add_argument(
        "--kv-policy",
        choices=KV_POLICIES,
        default="keep",
        help="keep: every layer keeps all keys. evict: sparse layers keep sink and window only, and stay sparse in "
        "later turns (default: %(default)s)",
    )


def _route(text: str) -> Any:
    try:
        return parse_route(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def load_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer that the arguments name, routed as they say; exits with one line if that cannot be."""
    if args.model is None:
        parser.error("--model is required: a Flux model directory, made by flux_mlx.convert")
    if getattr(args, "max_tokens", None) == 0:
        parser.error("--max-tokens must not be 0 (use -1 for no limit)")
    for flag in UNSUPPORTED:
        if getattr(args, flag, None):
            parser.error(f"--{flag.replace('_', '-')} is not supported by Flux models")
    try:
        model, tokenizer = load(args.model)
        if args.adapter_path:
            load_adapters(model, args.adapter_path)
        if args.route is not None:
            set_route(model, args.route)
        set_kv_policy(model, getattr(args, "kv_policy", "keep"))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return model, tokenizer


def encode_prompt(args: argparse.Namespace, tokenizer: Any, *, suffix_only: bool) -> list[int]:
    """Token ids of the prompt through the chat template, as mlx_lm.generate makes them.

    Args:
        suffix_only: The part of the template before the user's text is in a prompt cache already.
    """
    text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    text = sys.stdin.read() if text == "-" else text
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    prefilled = args.prefill_response is not None

    def render(user: str) -> str:
        messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt is not None else []
        messages.append({"role": "user", "content": user})
        if prefilled:
            messages.append({"role": "assistant", "content": args.prefill_response})
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=prefilled,
            add_generation_prompt=not prefilled,
            **args.chat_template_config,
        )

    rendered = render(text)
    if suffix_only:
        rendered = rendered[render(QUERY).index(QUERY) :]
    return tokenizer.encode(rendered, add_special_tokens=False)


def open_prompt_cache(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Any] | None:
    """The saved prompt cache that the arguments name, if any; the model's name is taken from it or checked."""
    if args.prompt_cache_file is None:
        return None
    try:
        if has_fingerprint(args.prompt_cache_file):
            read_metadata(args.prompt_cache_file)
        cache, metadata = load_prompt_cache(args.prompt_cache_file, return_metadata=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        parser.exit(2, f"{parser.prog}: cannot read prompt cache {args.prompt_cache_file}: {error}\n")
    args.model = args.model or metadata.get("model")
    if metadata.get("model") not in (None, args.model):
        parser.exit(2, f"{parser.prog}: the prompt cache was made with {metadata['model']}, not with {args.model}\n")
    for entry in cache:
        CacheList.adopt(entry)
    return cache


def check_prompt_cache(parser: argparse.ArgumentParser, args: argparse.Namespace, model: Any) -> None:
    """Exit with one line if the saved prompt cache is one of ours and not of this model."""
    if args.prompt_cache_file is None or not has_fingerprint(args.prompt_cache_file):
        return
    metadata = load_prompt_cache(args.prompt_cache_file, return_metadata=True)[1]
    try:
        check_model(args.prompt_cache_file, metadata, model)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def progress_bar(enabled: bool) -> Any:
    """A callback (layers done, layers) that draws a bar on stderr, and the bar."""
    bar = tqdm(desc="Prefill", unit="layer", disable=not enabled, leave=False, file=sys.stderr)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.n = done
        bar.refresh()

    return report, bar


def generate(args: argparse.Namespace, model: Any, tokenizer: Any, prompt: list[int], cache: list[Any]) -> None:
    """Stream the answer to stdout, with statistics as mlx_lm.generate prints them, and the routes."""
    draft_model = load_draft(args.draft_model, tokenizer) if args.draft_model else None
    if draft_model is not None:
        cache = cache + make_prompt_cache(draft_model)
    report, bar = progress_bar(args.verbose)
    if args.verbose:
        print("=" * 10)
    start = time.perf_counter()
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        prompt_cache=cache,
        draft_model=draft_model,
        num_draft_tokens=args.num_draft_tokens,
        prefill_step_size=args.prefill_step_size,
        prompt_progress_callback=report,
        max_tokens=args.max_tokens,
        sampler=sampler_of(args, tokenizer),
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
    )
    with bar:
        first = next(responses)
    first_token_s = time.perf_counter() - start
    for response in itertools.chain([first], responses):
        print(response.text, end="", flush=True)
    print()
    if args.verbose:
        print("=" * 10)
        print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
        print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
        print(f"Time to first token: {first_token_s:.3f} s")
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    if args.show_routes:
        print(f"Routes: {describe_routes(cache[: len(model.layers)])}")


def load_draft(path: str, tokenizer: Any) -> Any:
    """The draft model, from a directory or a hub id.

    Raises:
        ValueError: Its tokenizer is another one than the model's.
    """
    draft_model, draft_tokenizer, _ = load_without_code(path)
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"[generate] the draft model's tokenizer must have the model's {tokenizer.vocab_size} tokens, "
            f"got {draft_tokenizer.vocab_size}."
        )
    return draft_model


def sampler_of(args: argparse.Namespace, tokenizer: Any) -> Any:
    """mlx-lm's sampler with the arguments' settings."""
    return make_sampler(
        args.temp,
        args.top_p,
        getattr(args, "min_p", 0.0),
        getattr(args, "min_tokens_to_keep", 1),
        top_k=getattr(args, "top_k", 0),
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )


def main() -> None:
    """Entry point."""
    prepare_cuda()
    parser = setup_arg_parser()
    args = parser.parse_args()
    args.chat_template_config = template_settings(parser, args.chat_template_config)
    if args.seed is not None:
        mx.random.seed(args.seed)
    cache = open_prompt_cache(parser, args)
    model, tokenizer = load_model(parser, args)
    check_prompt_cache(parser, args, model)
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    try:
        prompt = encode_prompt(args, tokenizer, suffix_only=cache is not None)
        warn_if_too_long(model, len(prompt) + tokens_held(cache or []))
        generate(args, model, tokenizer, prompt, cache or model.make_cache())
    except (OSError, ValueError, TemplateError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
