"""The Hopper kernel's three programs as Python on a model of its shared memory, run in turns that a schedule picks.

Copies, products and stores are asynchronous: a copy may end at any time, in any order, a product or a store not before
it is waited for. What the programs compute is ignored; what they touch, and when, is checked at every access.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

HEAD_DIM = 64


class HazardError(Exception):
    """An access that another one may still be in the way of, a wrong tile, or a deadlock."""


class Value:
    """A tensor, a layout or a function of them, of which is known only whether it is there yet."""

    def __init__(self, *, is_there: bool = True) -> None:
        self.is_there = is_there

    def __getattr__(self, name: str) -> Value:
        return self

    def __call__(self, *others: object, **_: object) -> Value:
        if not all(x.is_there for x in (self, *others) if isinstance(x, Value)):
            raise HazardError("a product is used before it is there")
        return Value()

    __getitem__ = __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __call__
    __le__ = __lt__ = __ge__ = __and__ = __call__


class Index(int):
    """An integer that a kernel widens."""

    def to(self, _: object) -> Index:
        """Itself."""
        return self


class Barrier:
    """`mbarrier`: a phase ends when all arrivals have come and all announced bytes are there."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals, self.missing, self.bytes, self.ended = arrivals, arrivals, 0, 0

    def change(self, arrivals: int, size: int) -> None:
        """Take arrivals off, and add (or with a negative size complete) bytes."""
        self.missing -= arrivals
        self.bytes += size
        if self.missing < 0:
            raise HazardError("more arrivals than a phase has")
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.ended = self.arrivals, self.ended + 1


class Buffer:
    """A tile of shared memory: what is in it (None while a copy writes it), and who still reads it."""

    def __init__(self) -> None:
        self.content: tuple | None = None
        self.readers = 0
        self.is_fenced = True
        self.writing = False

    def reshape(self, _: object) -> Buffer:
        """The same bytes."""
        return self

    permute = reshape
    dtype = Value()

    def check_free(self, who: str) -> None:
        """Raise HazardError if the bytes are still read or written."""
        if self.readers or self.writing:
            raise HazardError(f"{who} writes what is still in use")

    def store(self, _: object) -> None:
        """The output replaces the queries, by ordinary stores."""
        self.check_free("a group")
        self.content, self.is_fenced = ("out",), False


class Machine:
    """Barriers, buffers and what is in flight; `choose` picks who goes on."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.choose = choose
        self.copies: list[tuple[Buffer, tuple, Barrier, int]] = []
        self.products: dict[str, list[tuple[Value, list[Buffer]]]] = {"group 0": [], "group 1": []}
        self.stores: dict[str, list[Buffer]] = {"group 0": [], "group 1": []}
        self.reads: dict[str, list[tuple]] = {"group 0": [], "group 1": []}
        self.fetched: list[tuple] = []
        self.blocked: dict[str, Callable[[], bool]] = {}
        self.turn = {name: threading.Semaphore(0) for name in ("producer", *self.products)}
        self.back = threading.Semaphore(0)
        self.failure: BaseException | None = None

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Give the turn back until the schedule returns it, which it may once `until()` holds."""
        name = threading.current_thread().name
        self.blocked[name] = until
        self.back.release()
        self.turn[name].acquire()
        if self.failure:
            raise SystemExit

    def wait(self, barrier: Barrier, parity: int) -> None:
        """Wait until the phase of this parity has ended."""
        self.pause(lambda: barrier.ended & 1 != parity)

    def load(self, desc: SimpleNamespace, at: list[int], barrier: Barrier, buffer: Buffer) -> None:
        """Start a copy into shared memory."""
        self.pause()
        buffer.check_free("a copy")
        buffer.content, buffer.writing = None, True
        self.copies.append((buffer, (desc.name, *at), barrier, desc.block_type.nbytes))
        self.fetched.append((desc.name, *at))

    def multiply(self, a: Any, b: Buffer, acc: Any, **_: object) -> Value:
        """Start a product: what it reads must be there, and stay."""
        self.pause()
        name = threading.current_thread().name
        operands = [x for x in (a, b) if isinstance(x, Buffer)]
        for operand in operands:
            if operand.content is None:
                raise HazardError(f"{name} reads what is not there yet")
            operand.readers += 1
            self.reads[name].append(operand.content)
        result = Value(is_there=False)
        self.products[name].append((result, operands))
        return result

    def wait_products(self, pending: int, deps: list) -> Any:
        """Wait for all products of this group but the last `pending`."""
        self.pause()
        queue = self.products[threading.current_thread().name]
        while len(queue) > pending:
            result, operands = queue.pop(0)
            result.is_there = True
            for operand in operands:
                operand.readers -= 1
        return deps[0] if len(deps) == 1 else deps

    def save(self, desc: SimpleNamespace, at: list[int], buffer: Buffer) -> None:
        """Start a copy out of shared memory."""
        self.pause()
        if buffer.content != ("out",) or not buffer.is_fenced:
            raise HazardError("a copy leaves before the output is there for it")
        buffer.readers += 1
        self.stores[threading.current_thread().name].append(buffer)

    def wait_stores(self, _: int) -> None:
        """Wait until this group's copies have read what they store."""
        self.pause()
        queue = self.stores[threading.current_thread().name]
        while queue:
            queue.pop().readers -= 1

    def run(self, programs: dict[str, Callable[[], None]]) -> None:
        """Run all programs to their end. Raises HazardError."""
        threads = [threading.Thread(target=self._program, args=(body,), name=name) for name, body in programs.items()]
        for thread in threads:
            thread.start()
            self.back.acquire()
        while self.blocked and not self.failure:
            self._step()
        self.failure = self.failure or (
            HazardError("a store outlives the kernel") if any(self.stores.values()) else None
        )
        for name in list(self.blocked):
            self.turn[name].release()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure

    def _program(self, body: Callable[[], None]) -> None:
        try:
            self.pause()
            body()
        except BaseException as error:  # raised again in `run`
            self.failure = self.failure or error
        self.blocked.pop(threading.current_thread().name, None)
        self.back.release()

    def _step(self) -> None:
        ready = [name for name, until in self.blocked.items() if until()]
        if not ready and not self.copies:
            self.failure = HazardError("deadlock")
            return
        picked = self.choose(len(ready) + len(self.copies))
        if picked < len(ready):
            self.turn[ready[picked]].release()
            self.back.acquire()
            return
        buffer, content, barrier, size = self.copies.pop(picked - len(ready))
        buffer.content, buffer.writing = content, False
        barrier.change(0, -size)


def _fence(q_bufs: list[Buffer]) -> None:
    """Hand what the calling group has stored to the copy engine."""
    group = int(threading.current_thread().name[-1])
    for buffer in q_bufs[group::2]:
        buffer.is_fenced = True


def _language(program: int, programs: int) -> SimpleNamespace:
    """What the programs use of Gluon: integers are computed, tensors are not."""
    tensors = "NVMMADistributedLayout DotOperandLayout SliceLayout arange zeros max sum exp2 log2 convert_layout store"
    scalars = {"cdiv": lambda a, b: -(-a // b), "minimum": min, "static_range": range}
    scalars |= {"program_id": lambda _: program, "num_programs": lambda _: programs}
    scalars["maximum"] = lambda a, b: Value() if isinstance(a, Value) else max(a, b)
    scalars["where"] = lambda condition, a, b: Value() if isinstance(condition, Value) else (a if condition else b)
    return SimpleNamespace(**dict.fromkeys(tensors.split(), Value()), **scalars, int64=Value(), float32=Value())


def _desc(name: str, heads: int, tokens: int, rows: int) -> SimpleNamespace:
    block = SimpleNamespace(nbytes=rows * HEAD_DIM * 2, shape=[1, 1, rows, HEAD_DIM])
    return SimpleNamespace(name=name, shape=[1, heads, tokens, HEAD_DIM], block_type=block)


def run_kernel(kernel: ModuleType, patch: Callable[..., None], q_tokens: int, kv_tokens: int, seed: int) -> Machine:
    """One block's three programs of `kernel`, a copy of `cuda_reference.triton_hopper`, 2 heads, sink 128, window 256.

    `patch(module, name, value)` sets an attribute for the test. Raises HazardError.
    """
    generator = random.Random(seed)
    machine = Machine(generator.randrange)
    q_bufs = [Buffer() for _ in range(4)]
    bufs = [SimpleNamespace(index=group.__getitem__) for group in (q_bufs, [Buffer(), Buffer()], [Buffer(), Buffer()])]
    bars = [[Barrier(count), Barrier(count)] for count in (1, 2, 1, 2, 1, 2)]
    bars = [SimpleNamespace(index=pair.__getitem__) for pair in bars]
    sync = SimpleNamespace(
        wait=machine.wait, expect=lambda bar, size: bar.change(1, size), arrive=lambda bar, count: bar.change(count, 0)
    )
    tile = kernel._tile.fn
    replaced = {name: getattr(kernel, name).fn for name in ("_row_tiles", "_key_tiles", "_attend")}
    replaced |= {"_tile": lambda *sizes: (Index(tile(*sizes)[0]), *tile(*sizes)[1:]), "_store_before_start": Value()}
    replaced |= {"gl": _language(0, 1), "mbarrier": sync, "tma": SimpleNamespace(store_wait=machine.wait_stores)}
    replaced |= {"tma_load": machine.load, "tma_store": machine.save, "fence_async_shared": lambda: _fence(q_bufs)}
    replaced |= {"warpgroup_mma": machine.multiply, "warpgroup_mma_wait": machine.wait_products}
    for name, value in replaced.items():
        patch(kernel, name, value)
    descs = [_desc("q", 2, q_tokens, 64), *(_desc(n, 1, kv_tokens, 128) for n in "kv"), _desc("out", 2, q_tokens, 64)]
    given = (descs, bufs, bars, (None, None, 0), (2, 128, 2, 128, 1.0))
    programs = {"producer": lambda: kernel._producer.fn(*given, TILES="span", STAGES=2)}
    for group in (0, 1):
        more = {"TILES": "span", "STAGES": 2, "WARP_GROUP": group}
        programs[f"group {group}"] = lambda more=more: kernel._consumer.fn(*given, Value(), Value(), **more)
    machine.run(programs)
    return machine
