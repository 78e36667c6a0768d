"""What a decoding step costs the host before MLX hands it over, measured without a GPU: graph nodes, and time to build.

    python -m benchmarks.mlx_graph_cost --json FILE

A model of Qwen3-8B's depth with tiny layers: neither the nodes of a step nor the work of making them depends on sizes.
What MLX makes one operation of on a GPU and many on a CPU (norm, rotary embedding, attention), and our own kernel, are
replaced by one node each, which takes the same arrays; so the graph is that of the CUDA path up to each launch. What
the bindings need for a launch of our kernel is not in it. Nothing is evaluated while the clock runs; kinds take turns.
"""

from __future__ import annotations

import argparse
import io
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from benchmarks.mlx_common import full_layers, parse, parser, save
from benchmarks.mlx_decode import filled_cache
from flux_mlx import cuda_kernels, kernel_policy
from flux_mlx.benchmark_models import SHAPES, random_model, stock_view
from flux_mlx.benchmark_parts import AttentionShape
from flux_mlx.cuda_catalog import Device, Launch
from flux_mlx.models import apply, set_kv_policy, set_route
from flux_mlx.spec import FluxConfig

WARM_UP_TOKENS = 8
_TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
_NODE = re.compile(r'label ="([^"]+)", shape=rectangle')
_FREE = {"Reshape", "Transpose", "Slice", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Broadcast", "Split"}
"""Nodes that MLX's CUDA backend mostly makes views of: no launch."""


def _norm(x: mx.array, *_: Any) -> mx.array:
    return mx.softmax(x, -1)


def _rope(x: mx.array, *_: Any, offset: Any, **__: Any) -> mx.array:
    return mx.depends(x, offset if isinstance(offset, mx.array) else mx.array(offset))


def _attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
    return mx.depends(q, [k, v])


def _launch(launch: Launch) -> cuda_kernels.Prepared:
    outputs = [mx.zeros(*made) for made in zip(launch.output_shapes, _dtypes(launch), strict=True)]
    mx.eval(outputs)
    return lambda inputs, late=(): [mx.depends(outputs[0], inputs), *outputs[1:]]


def _dtypes(launch: Launch) -> list[mx.Dtype]:
    return [getattr(mx, name) for name in launch.output_dtypes]


@contextmanager
def cuda_graphs() -> Iterator[None]:
    """One node, and next to no work, for what is one operation on a CUDA GPU."""
    decoder, prepared = cuda_kernels.decoder, {}

    def decoder_here(*args: Any) -> Any:
        return prepared.setdefault(args, decoder(*args, run=_launch))

    with ExitStack() as stack:
        for target, name, stand_in in (
            (mx.fast, "rms_norm", _norm),
            (mx.fast, "rope", _rope),
            (mx.fast, "scaled_dot_product_attention", _attention),
            (cuda_kernels, "device", lambda: Device(9, 0, 132, 50 << 20)),
            (cuda_kernels, "decoder", decoder_here),
            (kernel_policy, "choose", lambda *_: "cuda"),
        ):
            stack.enter_context(patch.object(target, name, stand_in))
        stack.enter_context(patch.dict(cuda_kernels.routed_attention.__kwdefaults__, run=_launch))
        yield


def tiny_model(args: argparse.Namespace) -> nn.Module:
    """A Flux model of the shape's family and depth with layers as small as our kernels take them."""
    config = {**SHAPES[args.shape], **_TINY, "vocab_size": 128}
    return apply(random_model(config, args.bits, dtype="float16"), FluxConfig())


def kinds(args: argparse.Namespace, model: nn.Module) -> dict[str, tuple[nn.Module, Any, str]]:
    """Model, route and KV policy of each kind of decoding."""
    spread = full_layers(args, model)
    return {
        "stock": (stock_view(model), None, "keep"),
        "full": (model, "full", "keep"),
        "spread": (model, spread, "keep"),
        "spread, evict": (model, spread, "evict"),
        "sparse": (model, "sparse", "keep"),
        "sparse, evict": (model, "sparse", "evict"),
    }


def nodes(out: mx.array) -> Counter[str]:
    """The operations of a graph by their names."""
    text = io.StringIO()
    mx.export_to_dot(text, out)
    return Counter(_NODE.findall(text.getvalue()))


class Step:
    """Decoding of one kind over a filled cache."""

    def __init__(self, model: nn.Module, route: Any, policy: str, shape: AttentionShape, tokens: int):
        self.model, self.route, self.policy = model, route, policy
        self.cache = filled_cache(model, shape, tokens)
        self.token = mx.array([[1]])
        mx.eval(self.token)
        self.seconds: list[float] = []
        self.nodes: Counter[str] = Counter()

    def __call__(self) -> None:
        """One token: built by the clock, counted, evaluated."""
        if self.route is not None:
            set_route(self.model, self.route)
            set_kv_policy(self.model, self.policy)
        start = time.perf_counter()
        out = self.model(self.token, cache=self.cache)
        self.seconds.append(time.perf_counter() - start)
        if len(self.seconds) == WARM_UP_TOKENS:
            self.nodes = nodes(out)
        mx.eval(out)

    def row(self, kind: str, layers: int) -> dict[str, Any]:
        """What was found."""
        found = self.seconds[WARM_UP_TOKENS:]
        free = sum(n for name, n in self.nodes.items() if name in _FREE)
        return {
            "kind": kind,
            "build_s": statistics.median(found),
            "least_build_s": min(found),
            "nodes_a_layer": sum(self.nodes.values()) / layers,
            "views_a_layer": free / layers,
            "nodes": dict(sorted(self.nodes.items())),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    made = parser(__doc__, (4000,))
    made.add_argument("--generation-tokens", "-g", type=int, default=200, help="(default: %(default)s)")
    args = parse(made, argv)
    model = tiny_model(args)
    shape, rows = AttentionShape.of(model), []
    with cuda_graphs():
        for tokens in args.lengths:
            steps = {kind: Step(*how, shape, tokens) for kind, how in kinds(args, model).items()}
            for _ in range(WARM_UP_TOKENS + args.generation_tokens):
                for step in steps.values():
                    step()
            rows += [{"tokens": tokens, **step.row(kind, len(model.layers))} for kind, step in steps.items()]
    save(args, "mlx_graph_cost", rows, layers=len(model.layers), sizes=_TINY)


if __name__ == "__main__":
    main()
