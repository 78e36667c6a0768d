"""`flux_mlx.server`: mlx_lm.server for Flux models, without trust in code.

The same API as mlx-lm's. It differs in this: no model's own code is run; only local requests that no foreign web page
made are answered, unless flags say otherwise; prompt caches are bounded in bytes; `/stats` and the log show the routes
of every request, whatever flags say; a request that fails ends no other one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
from collections.abc import Sequence
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import ModelProvider, get_system_fingerprint
from mlx_lm.utils import _parse_size, maybe_set_recommended_wired_limit

from flux_mlx.adapters import check_adapters, load_adapters
from flux_mlx.cuda_settings import prepare_cuda
from flux_mlx.environment import check_environment
from flux_mlx.generate import add_kv_policy_argument, add_route_argument
from flux_mlx.models import FluxModel, set_kv_policy, set_route
from flux_mlx.safe_loading import find_model, load_without_code
from flux_mlx.server_http import LOOPBACK_NAMES, Handler
from flux_mlx.server_log import RequestLog
from flux_mlx.server_requests import Generator, PromptCache

PROMPT_CACHE_SHARE = 8  # prompt caches get this part of the machine's memory by default: one in eight
MAX_PORT = 65535
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def default_prompt_cache_bytes() -> int:
    """Bytes that prompt caches may take if nobody says."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // PROMPT_CACHE_SHARE


class Provider(ModelProvider):
    """mlx-lm's model provider, which loads models without their code."""

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        for path in (model_path, draft_model_path):
            if path is not None:
                find_model(path)  # refused before the model in use is dropped
        if adapter_path is not None:
            check_adapters(adapter_path)
        self.reset()
        mx.clear_cache()
        model, tokenizer, _ = load_without_code(model_path, self._tokenizer_config)
        if adapter_path is not None:
            load_adapters(model, adapter_path)
        if self.cli_args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        draft_model, draft_tokenizer = None, tokenizer
        if draft_model_path is not None:
            draft_model, draft_tokenizer, _ = load_without_code(draft_model_path)
        if draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise ValueError(f"[server] {draft_model_path} has another vocabulary than {model_path}.")
        self.model, self.tokenizer, self.draft_model = model, tokenizer, draft_model
        if self.cli_args.route is not None:
            if not isinstance(model, FluxModel):
                raise ValueError(f"[server] --route goes with Flux models only, and {model_path} is none.")
            set_route(model, self.cli_args.route)
        set_kv_policy(model, self.cli_args.kv_policy)
        batchable = draft_model is None and all(hasattr(c, "merge") for c in make_prompt_cache(model))
        self.is_batchable = batchable and self.cli_args.kv_policy == "keep"
        self.model_key = (model_path, adapter_path, draft_model_path)

    def layers(self) -> int:
        """Layers of the model."""
        return len(self.model.layers)

    def vocabulary_size(self) -> int:
        """Logits of a token."""
        return self.model.args.vocab_size if hasattr(self.model.args, "vocab_size") else self.tokenizer.vocab_size

    def max_draft_tokens(self) -> int | None:
        """Drafts that the model can verify at once; None: any number."""
        return self.model.max_draft_tokens if isinstance(self.model, FluxModel) else None


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to {MAX_PORT}, got {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line: mlx_lm.server's flags, as far as they make sense here."""
    parser = argparse.ArgumentParser(
        prog="flux_mlx.server",
        description="HTTP server for Flux models. It has no --show-routes: the log (from level INFO on) and /stats "
        "show the routes of every request.",
    )
    add = parser.add_argument
    add("--model", help="Flux model directory, or any that mlx-lm can load without code")
    add("--adapter-path", help="trained adapter weights and config")
    add("--host", default="127.0.0.1", help="host to listen at (default: %(default)s)")
    add("--port", type=_port, default=8080, help="0 to 65535; 0 takes a free one (default: %(default)s)")
    add(
        "--allowed-origins",
        type=lambda text: text.split(","),
        default=[],
        help="web origins whose pages may send requests, as https://a.example,https://b.example (default: none)",
    )
    add("--draft-model", help="model for speculative decoding")
    add("--num-draft-tokens", type=int, default=3, help="(default: %(default)s; 14 at most with automatic routes)")
    add("--log-level", default="INFO", choices=LEVELS, help="(default: %(default)s)")
    add("--chat-template", default="", help="chat template for the tokenizer")
    add("--use-default-chat-template", action="store_true", help="use the tokenizer's default chat template")
    add("--temp", type=float, default=0.0, help="default temperature (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="default nucleus (default: %(default)s)")
    add("--top-k", type=int, default=0, help="default top-k; 0 is off (default: %(default)s)")
    add("--min-p", type=float, default=0.0, help="default min-p (default: %(default)s)")
    add("--max-tokens", type=int, default=512, help="default length of an answer (default: %(default)s)")
    add("--chat-template-args", type=json.loads, default={}, help="JSON object for the chat template")
    add("--decode-concurrency", type=int, default=32, help="answers generated at once (default: %(default)s)")
    add("--prompt-concurrency", type=int, default=8, help="prompts processed at once (default: %(default)s)")
    add("--prefill-step-size", type=int, default=2048, help="tokens of a prefill chunk (default: %(default)s)")
    add("--prompt-cache-size", type=int, default=10, help="prompt caches to keep (default: %(default)s)")
    add(
        "--prompt-cache-bytes",
        type=_parse_size,
        default=default_prompt_cache_bytes(),
        help=f"bytes of prompt caches to keep (default: 1/{PROMPT_CACHE_SHARE} of the machine's memory)",
    )
    add("--kv-bits", type=int, help="bits of quantised keys and values: requests are then served one by one")
    add("--kv-group-size", type=int, default=64, help="(default: %(default)s)")
    add("--quantized-kv-start", type=int, default=DEFAULT_QUANTIZED_KV_START, help="(default: %(default)s)")
    add_route_argument(parser)
    add_kv_policy_argument(parser)  # evict: requests are served one by one
    parser.set_defaults(trust_remote_code=False, pipeline=False)
    return parser


def bind(host: str, port: int) -> ThreadingHTTPServer:
    """An HTTP server that has its port, and does not listen yet.

    Raises:
        OSError: The host is unknown, or the port not to be had; the message names them.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = infos[0]
        kind = type("Httpd", (ThreadingHTTPServer,), {"address_family": family})
        httpd = kind(address, Handler, bind_and_activate=False)
        httpd.server_bind()
    except OSError as error:
        raise OSError(f"[server] cannot listen at {host}, port {port}: {error.strerror or error}.") from error
    return httpd


def serve(args: argparse.Namespace) -> None:
    """Take the port, load the model, then answer requests until interrupted.

    Raises:
        OSError: No such model, or the port is not to be had.
        ValueError: The model or a setting is bad.
    """
    check_environment()
    if mx.distributed.init().size() > 1:
        raise ValueError("[server] flux_mlx.server runs in one process; start it without mlx.launch.")
    httpd = bind(args.host, args.port)
    provider = Provider(args)
    cache = PromptCache(args.prompt_cache_size, args.prompt_cache_bytes, RequestLog(), provider.layers)
    generator = Generator(provider, cache)
    try:
        generator.wait_until_loaded()
        if args.kv_policy == "evict" and args.kv_bits is not None:
            raise ValueError("[server] --kv-policy evict does not go with --kv-bits: choose one of them.")
        limit = provider.max_draft_tokens()
        if args.draft_model and limit is not None and args.num_draft_tokens > limit:
            raise ValueError(f"[server] --num-draft-tokens must be at most {limit} for this model.")
        if args.host not in LOOPBACK_NAMES:
            logging.warning("listening at %s: everybody who can reach this machine can use the model", args.host)
        httpd.RequestHandlerClass = partial(Handler, generator, system_fingerprint=get_system_fingerprint())
        httpd.server_activate()
        logging.info("listening at %s, port %d", args.host, httpd.server_port)
        httpd.serve_forever()
    except KeyboardInterrupt:
        logging.info("interrupted: ending")
    finally:
        generator.stop_and_join()
        httpd.server_close()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. A model that cannot be loaded ends in one line on stderr and status 2."""
    prepare_cuda()
    parser = build_parser()
    args: Any = parser.parse_args(argv)
    maybe_set_recommended_wired_limit()
    logging.basicConfig(level=args.log_level, format="%(asctime)s - %(levelname)s - %(message)s")
    try:
        serve(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
