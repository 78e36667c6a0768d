"""The HTTP side of the server: foreign, mistyped and oversized requests are refused before mlx-lm's code sees them."""

from __future__ import annotations

import json
import logging
import math
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.server import APIHandler, CompletionRequest

from flux_mlx.server_requests import Generator

MAX_BODY_BYTES = 64 << 20
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def _host_name(header: str) -> str:
    """Name in a Host header, without the port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


def check_body(body: dict[str, Any]) -> None:
    """Refuse what would fail later, in the thread that all requests share.

    Raises:
        ValueError: A field has the wrong type, or a number is not finite.
    """
    stop = body.get("stop")
    if not (stop is None or isinstance(stop, str) or _is_list_of(stop, str)):
        raise ValueError("stop must be a string or a list of strings")
    for text in [stop] if isinstance(stop, str) else stop or []:
        text.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    if "prompt" in body and not isinstance(body["prompt"], str):
        raise ValueError("prompt must be a string")
    if "messages" in body and not (_is_list_of(body["messages"], dict) and body["messages"]):
        raise ValueError("messages must be a list of objects, one or more")
    for message in body.get("messages", ()):
        _check_message(message)
    for name in ("stream_options", "chat_template_kwargs", "role_mapping"):
        if not isinstance(body.get(name) or {}, dict):
            raise ValueError(f"{name} must be an object")
    options = body.get("stream_options")
    if options is not None and not isinstance(options.get("include_usage"), bool):
        raise ValueError("stream_options must have include_usage, true or false")
    if not _is_list_of(body.get("tools") or [], dict):
        raise ValueError("tools must be a list of objects")
    if not isinstance(body.get("draft_model", ""), str):
        raise ValueError("draft_model must be a string")
    for name, value in body.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _check_message(message: dict[str, Any]) -> None:
    if not isinstance(message.get("role"), str):
        raise ValueError("every message must have a role, a string")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("only text content is supported")
        content = "".join(str(part.get("text")) for part in content)
    if not (content is None or isinstance(content, str)):
        raise ValueError("content must be a string or a list of text parts")


class _Connected:
    """The response generator as one request sees it: its answer ends when the client has hung up."""

    def __init__(self, generator: Generator, request_id: str, connection: socket.socket):
        self._generator, self._request_id, self._connection = generator, request_id, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def _check(self) -> None:
        readable, _, _ = select.select([self._connection], [], [], 0)
        if readable and self._connection.recv(1, socket.MSG_PEEK) == b"":
            raise ConnectionAbortedError("the client has hung up")

    def _checked(self, responses: Iterator[Any]) -> Iterator[Any]:
        for response in responses:
            self._check()
            yield response

    def generate(self, request: CompletionRequest, args: Any, progress_callback: Callable[[int, int], None]) -> Any:
        """As `Generator.generate`. Raises ConnectionAbortedError where the client is seen to be gone."""

        def report(processed: int, total: int) -> None:
            self._check()
            progress_callback(processed, total)

        request.request_id = self._request_id
        context, responses = self._generator.generate(request, args, report)
        return context, self._checked(responses)


class Handler(APIHandler):
    """mlx-lm's request handler behind checks, with `/stats`."""

    def log_message(self, text: str, *args: Any) -> None:
        """To the log instead of stderr."""
        logging.info("%s " + text, self.client_address[0], *args)

    def _refuse(self, status: int, reason: str) -> None:
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": reason}).encode())

    def _is_welcome(self) -> bool:
        """Whether the request comes from no foreign web page; answers it if it does."""
        allowed, origin = self.response_generator.cli_args.allowed_origins, self.headers.get("Origin")
        if origin is not None and origin not in allowed and "*" not in allowed:
            self._refuse(403, f"requests from {origin} are not allowed: see --allowed-origins")
            return False
        bound, host = self.response_generator.cli_args.host, _host_name(self.headers.get("Host", ""))
        if bound in LOOPBACK_NAMES and host not in LOOPBACK_NAMES:
            self._refuse(403, f"this server answers to localhost, not to {host!r}")
            return False
        return True

    def do_POST(self) -> None:  # noqa: N802
        """Check where the request comes from and what it is, then hand it to mlx-lm's code."""
        if not self._is_welcome():
            return
        if self.headers.get_content_type() != "application/json":
            self._refuse(415, "Content-Type must be application/json")
            return
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            self._refuse(413, f"the request has {length} bytes, the limit is {MAX_BODY_BYTES}")
            return
        if length.startswith("-"):
            self._refuse(400, "Content-Length must not be negative")
            return
        try:
            super().do_POST()
        except (ConnectionError, TimeoutError) as error:
            logging.info("%s: %s", getattr(self, "request_id", "request"), error)
        except (UnicodeDecodeError, RecursionError) as error:
            self._refuse(400, f"the request cannot be read: {error}")

    def validate_model_parameters(self) -> None:
        """mlx-lm's checks and ours."""
        check_body(self.body)
        super().validate_model_parameters()
        if any(not math.isfinite(bias) for bias in (self.logit_bias or {}).values()):
            raise ValueError("logit_bias must be finite")

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """As mlx-lm's; generation ends when the client hangs up."""
        shared = self.response_generator
        self.response_generator = _Connected(shared, self.request_id, self.connection)
        try:
            super().handle_completion(request, stop_words)
        finally:
            self.response_generator = shared

    def do_GET(self) -> None:  # noqa: N802
        """mlx-lm's answers, and `/stats`."""
        if not self._is_welcome():
            return
        if self.path == "/stats":
            self._set_completion_headers(200)
            self.end_headers()
            self.wfile.write(json.dumps(self.stats(), indent=1).encode())
        else:
            super().do_GET()

    def stats(self) -> dict[str, Any]:
        """Requests with their routes, prompt caches, memory."""
        caches = self.response_generator.prompt_cache
        return {
            **caches.log.stats(),
            "prompt_cache": {"sequences": len(caches), "bytes": caches.nbytes, "limit_bytes": caches.max_bytes},
            "memory": {"active_bytes": mx.get_active_memory(), "peak_bytes": mx.get_peak_memory()},
        }
