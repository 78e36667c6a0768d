"""A block's decoding step of one row, as MLX replays it: what lies before attention and what lies behind it, compiled.

Building the graph of a token costs Python and MLX's bindings more than some GPUs need to compute it, though all of it
but attention has the same shapes for every token. So the family's own code is traced once, with something in place of
the cache that takes what attention gets and gives what attention makes of it; from then on MLX repeats what it saw.

MLX keeps compiled graphs for each thread, and drops them in the thread that called last: every thread gets its own.

The trace holds the arrays of the weights: as arguments they would cost half of what is saved. Whether the block has the
very same modules and arrays is looked at for every token. What that does not see is looked at when a row's tokens begin
to be decoded, and behind every longer call or copy: settings of modules, and arrays that were written in place.
"""

from __future__ import annotations

import copy
import io
import threading
import weakref
from itertools import chain
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flux_mlx.families import family, project_token, rotate

_PARALLEL = ("cohere",)
"""Families whose blocks read the normed input behind attention again: a step would norm it twice."""

_RESTLESS = ("mlx.nn.layers.dropout", "mlx.nn.layers.distributed")
_OF_ROUTING = frozenset({"evicts", "flux", "forced", "group", "pooled_dim", "samples", "token_steps"})
"""Attributes of routed blocks and attention modules that a trace does not depend on."""

_MOST_THREADS = 8  # that keep steps of a block; more begin anew
_COUNTED = threading.Lock()  # threads that trace at once are counted one by one


class Tap:
    """Stands where a block expects a cache, while it is traced.

    Args:
        output: `[1, 1, HQ, D]` or alike: what attention gives, before its output projection; None: not known yet.
    """

    __slots__ = ("heard", "output")

    def __init__(self, output: mx.array | None = None):
        self.output = output
        self.heard: mx.array | None = None

    def attend(self, attn: nn.Module, x: mx.array) -> mx.array:
        """In place of attention over `x`, which is kept as `heard`."""
        self.heard = x
        return x if self.output is None else attn.o_proj(self.output.reshape(1, 1, self.output.size))


class TokenStep:
    """A block's step, for one thread.

    Args:
        block: A stock block with a routed attention module.
        x: An input of it.

    Attributes:
        is_traced: Whether there are the halves; not if the block may do other things at other times.
        before: Compiled: the block's input `[1, 1, hidden]` and the token's position, int32 `[]`, to the token's
            queries `[1, HQ, 1, D]` and keys, rotated, and its values.
        after: Compiled: the same input, and attention's output in any shape, to the block's output.
    """

    def __init__(self, block: nn.Module, x: mx.array):
        self._thread, self._block = threading.get_ident(), weakref.ref(block)  # weak: the block holds its steps
        self._modules = _modules_under(block)
        self._values = [dict.values(module) for module in self._modules]  # not what is held, but the look at it
        self._held = [*dict.values(block), *chain(*self._values), None]  # None: behind the last, as more may come
        self._settings = _settings(block, self._modules)
        self._contents = [copy.copy(array) for array in _arrays_of(block)]  # what they share ends with a write to one
        self._n_contents = _distinct(self._contents)
        self.is_traced = _does_the_same_for_all_tokens(block, self._modules) and self._trace(block, mx.zeros_like(x))

    def is_of(self, block: nn.Module) -> bool:
        """Whether it is a step of this block and this thread."""
        return self._block() is block and self._thread == threading.get_ident()

    def is_held(self) -> bool:
        """Whether the block holds the modules and arrays that were traced, and no others."""
        return all(map(is_, chain(dict.values(self._block()), *self._values, (None,)), self._held))

    def is_current(self) -> bool:
        """Whether a trace of the block would be the same now."""
        now = _settings(self._block(), self._modules)
        if not (self.is_held() and len(now) == len(self._settings) and all(map(is_, now, self._settings))):
            return False
        return not self.is_traced or _distinct(self._contents + _arrays_of(self._block())) == self._n_contents

    def _trace(self, block: nn.Module, x: mx.array) -> bool:
        """Trace both halves, before a cache is written; says whether MLX could: not code that looks at a position."""
        twin = _twin(block)

        def before(x: mx.array, position: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            tap = Tap()
            _stock_call(twin, x, tap)
            q, k, v = project_token(twin.self_attn, tap.heard)
            return rotate(twin.self_attn, q, position), rotate(twin.self_attn, k, position), v

        def after(x: mx.array, out: mx.array) -> mx.array:
            return _stock_call(twin, x, Tap(out))

        self.before, self.after = mx.compile(before), mx.compile(after)
        try:
            mx.async_eval(_arrays_of(twin))  # else for each token anew
            q, _, v = self.before(x, mx.array(0))
            self.after(x, mx.zeros((1, q.shape[1], 1, v.shape[3]), v.dtype))
        except (ValueError, TypeError, RuntimeError):  # stock code computes, and says what is wrong if anything is
            return False
        return True


class _TokenLinear(nn.Linear):
    """`nn.Linear` without bias for one token, whose weight `[1, in, out]` is a view made once: one node for five.

    MLX would transpose the weight, flatten the input and unflatten the output each time, for the same product.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self["columns"] if x.ndim == 3 else super().__call__(x)


def _twin(module: nn.Module) -> nn.Module:
    """A copy of a module tree to trace, over the same arrays."""
    twin = copy.copy(module)
    twin.__dict__.pop("token_steps", None)
    for name, value in module.items():
        if isinstance(value, nn.Module):
            twin[name] = _twin(value)
    if type(module) is nn.Linear and "bias" not in module:
        twin.__class__ = _TokenLinear
        twin["columns"] = module.weight.T[None]
    return twin


def _stock_call(block: nn.Module, x: mx.array, tap: Tap) -> mx.array:
    """The family's own code of a block, whose attention hands over to `tap`."""
    stock = type(block).__bases__[1]
    return stock.__call__(block, x, None, tap)


class StepSeen(weakref.ref):
    """What a cache knows of the step that decodes its tokens: nothing that lasts, and copies of it nothing at all."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


class TokenSteps:
    """The steps of a block, by thread; a copy of the block begins with none."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: dict[int, TokenStep] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()

    def find(self, block: nn.Module, x: mx.array) -> TokenStep:
        """This thread's step of the block as it is now, for inputs like `x`."""
        thread = threading.get_ident()
        step = self._steps.get(thread)
        if step is not None and step.is_of(block) and step.is_current():
            return step
        if step is not None:
            self._steps.clear()  # those of other threads are as old, and hold old weights
        step = TokenStep(block, x)
        with _COUNTED:
            if len(self._steps) >= _MOST_THREADS:
                self._steps.clear()
            self._steps[thread] = step
        return step

    def drop_old(self) -> None:
        """Let go of weights that the block has no more: in training, no token may come for long."""
        if not all(step.is_held() for step in list(self._steps.values())):
            self._steps.clear()


def _modules_under(module: nn.Module) -> list[nn.Module]:
    """All modules under a module but routers."""
    found = []
    for name, value in module.items():
        if isinstance(value, nn.Module) and name != "router":
            found += value, *_modules_under(value)
    return found


def _arrays_of(module: nn.Module) -> list[mx.array]:
    """All arrays under a module but those of routers."""
    holders = (module, *_modules_under(module))
    return [value for holder in holders for value in holder.values() if isinstance(value, mx.array)]


def _settings(block: nn.Module, modules: list[nn.Module]) -> list[Any]:
    """What else a trace depends on: the names of all that is held, and plain attributes."""
    found: list[Any] = []
    for module in (block, *modules):
        found += module
        found += (value for name, value in vars(module).items() if name not in _OF_ROUTING)
    return found


def _distinct(arrays: list[mx.array]) -> int:
    """How many arrays there are behind some Python objects; MLX tells that in the names of a graph's nodes only."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count("rank=source")


def _does_the_same_for_all_tokens(block: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether all that is in the block is known to, and reads its normed input before attention only."""
    return family(block.self_attn) not in _PARALLEL and all(map(_is_plain, [block, *modules]))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is MLX's or mlx-lm's, without chance, ranks, hooks, adapters, and lists of whatever."""
    source = type(module).__module__
    if source in _RESTLESS or not source.startswith(("mlx.nn.layers.", "mlx_lm.models.")):
        return False
    return all(isinstance(value, (mx.array, nn.Module)) for value in module.values())
