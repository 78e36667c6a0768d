"""Memory of exact prefill and of an answer under the KV policy evict, prompt length by prompt length.

    sh examples/with-openblas .venv/bin/python benchmarks/long_context_memory.py --json long_context_memory.json

A small random Llama on any device, every layer sparse unless --full-layers names some. Bytes are the allocator's. What
should be flat is what sparse layers hold; the buffer of hidden states grows with the prompt, and so do full layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import llama

import flux_mlx

PATTERN = flux_mlx.PatternConfig(block_size=64, sink_tokens=64, window_tokens=512)
VOCABULARY = 512


def small_model(args: argparse.Namespace) -> nn.Module:
    """A random Llama, routed as asked, under the policy asked for."""
    config = llama.ModelArgs(
        model_type="llama",
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        intermediate_size=2 * args.hidden_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
    )
    mx.random.seed(0)
    model = llama.Model(config)
    model.eval()
    route = tuple(args.full_layers) if args.full_layers else "sparse"
    flux_mlx.apply(model, flux_mlx.FluxConfig(pattern=PATTERN, route=route))
    flux_mlx.set_kv_policy(model, args.kv_policy)
    mx.eval(model.parameters())
    return model


def measure(model: nn.Module, tokens: int, generated_tokens: int) -> dict[str, int]:
    """Bytes that one prompt and its answer take, above what the model and the prompt take."""
    prompt = mx.random.randint(0, VOCABULARY, (tokens,))
    cache = model.make_cache()
    mx.eval(prompt, [entry.state for entry in cache])
    mx.clear_cache()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    last = flux_mlx.prefill(model, prompt, cache)
    mx.eval([entry.state for entry in cache])
    result = {
        "tokens": tokens,
        "after_prefill_bytes": mx.get_active_memory() - start,
        "prefill_peak_bytes": mx.get_peak_memory() - start,
        "hidden_states_bytes": tokens * model.model.norm.weight.nbytes,
    }
    mx.reset_peak_memory()
    for _ in generate_step(last, model, max_tokens=generated_tokens, prompt_cache=cache):
        pass
    mx.eval([entry.state for entry in cache])
    return result | {
        "after_answer_bytes": mx.get_active_memory() - start,
        "answer_peak_bytes": mx.get_peak_memory() - start,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--generated-tokens", type=int, default=600)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--full-layers", type=int, nargs="*", default=[])
    parser.add_argument("--kv-policy", choices=("keep", "evict"), default="evict")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args(argv)
    model = small_model(args)
    result = {
        "command": " ".join(["benchmarks/long_context_memory.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": str(mx.default_device()),
        "versions": {name: version(name) for name in ("mlx", "flux-mlx")},
        "pattern": dataclasses.asdict(PATTERN),
        "layers": args.layers,
        "kv_policy": args.kv_policy,
        "runs": [measure(model, tokens, args.generated_tokens) for tokens in args.tokens],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
