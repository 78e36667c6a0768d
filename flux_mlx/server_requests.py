"""What happens to a request inside the server: routes are noted, caches bounded, a failure ends no other request."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, trim_prompt_cache
from mlx_lm.server import GenerationContext, ResponseGenerator

from flux_mlx.server_log import RequestLog, Saved
from flux_mlx.window_cache import DroppedKeysError


class PromptCache(LRUPromptCache):
    """mlx-lm's prompt cache with a limit in bytes, which also reports the routes of finished requests.

    Args:
        max_size: Sequences to keep at most.
        max_bytes: Bytes to keep at most.
        log: Where to report.
        layers: How many entries of a cache are the model's; a draft model's come after them.
    """

    def __init__(self, max_size: int, max_bytes: int, log: RequestLog, layers: Callable[[], int | None] = lambda: None):
        super().__init__(max_size, max_bytes)
        self.log, self.layers = log, layers

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """As mlx-lm's, but one token is always left to run: its batches need one.

        What was kept under the KV policy evict serves the requests that go on from its end; others begin anew.
        """
        try:
            cache, rest = super().fetch_nearest_cache(model, tokens)
            if cache is not None and not rest:
                cache, rest = (cache, tokens[-1:]) if trim_prompt_cache(cache, 1) else (None, tokens)
        except DroppedKeysError:
            cache, rest = None, tokens
        self.log.fetched(_source(cache))
        return cache, rest

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any) -> None:
        """As mlx-lm's, under the tokens that it holds. The cache bears the name of its request, and copies of it do."""
        saved = self.log.saved(tokens, prompt_cache[: self.layers()])
        tokens = tokens[: _level(prompt_cache, len(tokens))]
        prompt_cache[0].flux_saved = saved and saved._replace(tokens=len(tokens))
        super().insert_cache(model, tokens, prompt_cache, **kwargs)


def _level(cache: list[Any], tokens: int) -> int:
    """Cut all entries to the tokens that the shortest holds, and return their number, `tokens` at most.

    After speculative decoding the model and its draft model hold fewer tokens than the answer has, and not equally
    many; under the whole answer's tokens, as mlx-lm keeps them, later prompts would go on at wrong positions.
    """
    held = [entry.offset for entry in cache if isinstance(getattr(entry, "offset", None), int)]
    level = min([tokens, *held])
    for entry in cache:
        if isinstance(getattr(entry, "offset", None), int) and entry.offset > level:
            entry.trim(entry.offset - level)
    return level


def _source(cache: list[Any] | None) -> Saved | None:
    """Which request's a copy of a kept cache is, if known."""
    return None if cache is None else getattr(cache[0], "flux_saved", None)


class _Answer:
    """A request's response queue as the generation thread sees it: what passes is noted."""

    def __init__(self, queue: Queue, request_id: str, requests: _Requests):
        self.queue, self.request_id, self.requests = queue, request_id, requests

    def put(self, item: Any) -> None:
        if isinstance(item, GenerationContext):
            self.requests.log.started(self.request_id, item)
        elif isinstance(item, tuple):  # prompt tokens run, and all that are to be run
            self.requests.log.progressed(self.request_id, item[0])
        elif item is None:
            self.requests.log.ended(self.request_id)
        elif isinstance(item, Exception):
            self.requests.log.failed_one()
        if item is None or isinstance(item, Exception):
            self.requests.answered(self.queue)
        self.queue.put(item)


class _Requests(Queue):
    """Requests to the generation thread, whose response queues are known as long as somebody waits at them.

    Every HTTP thread puts, while the generation thread takes: one lock keeps requests and response queues in step.
    """

    def __init__(self, log: RequestLog):
        super().__init__()
        self.log = log
        self._lock = threading.Lock()
        self._waiting: list[weakref.ref[Queue]] = []

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        """Add a request. Response queues that nobody holds any more are forgotten here."""
        queue, request, settings = item
        answer = _Answer(queue, getattr(request, "request_id", "request"), self)
        with self._lock:
            self._waiting = [ref for ref in self._waiting if ref() is not None]
            self._waiting.append(weakref.ref(queue))
            super().put((answer, request, settings), *args, **kwargs)

    def answered(self, queue: Queue) -> None:
        """Forget a response queue whose answer is whole."""
        with self._lock:
            self._waiting = [ref for ref in self._waiting if ref() is not queue]

    def take_all(self) -> list[Queue]:
        """Drop every request, and return and forget the response queues of these and of those in flight."""
        with self._lock:
            while not self.empty():
                self.get_nowait()
            refs, self._waiting = self._waiting, []
        return [queue for ref in refs if (queue := ref()) is not None]


class Generator(ResponseGenerator):
    """mlx-lm's generation thread, which outlives an error: the requests in flight fail, the next ones are served."""

    def __init__(self, model_provider: Any, prompt_cache: PromptCache):
        self._pending = _Requests(prompt_cache.log)
        self._loaded: Queue[Exception | None] = Queue()
        self._finished = threading.Event()
        super().__init__(model_provider, prompt_cache)

    def wait_until_loaded(self) -> None:
        """Return when the default model is there; raise what its loading raised."""
        error = self._loaded.get()
        if error is not None:
            raise error

    @property
    def requests(self) -> _Requests:
        """The queue to the generation thread."""
        return self._pending

    @requests.setter
    def requests(self, queue: Queue) -> None:
        """The base class's own queue is not used."""

    def _run_generate(self) -> None:
        """The base class's thread: it lasts as long as the work, which another one does that never ends.

        At the end of a thread that used `mx.random`, MLX takes the interpreter's lock: after Python's `join` has
        returned, so the interpreter may be ending by then, and the process aborts.
        """
        threading.Thread(target=self._work, daemon=True).start()
        self._finished.wait()

    def _work(self) -> None:
        try:
            self._serve_requests()
        finally:
            self._finished.set()
        threading.Event().wait()

    def _serve_requests(self) -> None:
        try:
            self.model_provider.load_default()  # in this thread, to which lazy arrays of a model belong
        except Exception as error:
            self._loaded.put(error)
            return
        self._loaded.put(None)
        while not self._stop:
            try:
                self._generate()
            except Exception as error:
                logging.exception("generation failed")
                self._fail_requests(error)

    def _fail_requests(self, error: Exception) -> None:
        for queue in self._pending.take_all():
            self._pending.log.failed_one()
            queue.put(RuntimeError(f"generation failed: {error}"))
        mx.clear_cache()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """As mlx-lm's, with the checks that need the model."""
        found = super()._tokenize(tokenizer, request, args)
        if not found[0]:
            raise ValueError("the prompt has no tokens")
        vocabulary = self.model_provider.vocabulary_size()
        wrong = [token for token in args.logits.logit_bias or () if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"logit_bias must name tokens from 0 to {vocabulary - 1}, got {wrong}")
        if args.sampling.top_k >= vocabulary:
            raise ValueError(f"top_k must be below the vocabulary's {vocabulary}, got {args.sampling.top_k}")
        limit = self.model_provider.max_draft_tokens()
        if self.model_provider.draft_model is not None and limit is not None and args.num_draft_tokens > limit:
            raise ValueError(f"num_draft_tokens must be at most {limit} for this model, got {args.num_draft_tokens}")
        return found
