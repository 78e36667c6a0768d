"""One rank of tensor-parallel Flux models: writes its tokens and routes of each as JSON.

Run by `mlx.launch` in test_distributed.py: `distributed_worker.py OUT_DIRECTORY MODEL_DIRECTORY...`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.utils import sharded_load

from flux_mlx import prefill, routes
from parity_tests.tiny_models import prompt

PROMPTS = [prompt(61, seed) for seed in range(3)]


def answers(model) -> list[dict]:
    """Greedy tokens and routes of every prompt, prefilled by chunks and layer by layer."""
    found = []
    for exact in (False, True):
        for tokens in PROMPTS:
            cache = model.make_cache()
            with mx.stream(generation_stream):  # where generate_step's last, unread step may still be exchanging sums
                rest = prefill(model, mx.array(tokens), cache, prefill_step_size=32) if exact else mx.array(tokens)
            generated = generate_step(rest, model, max_tokens=6, prompt_cache=cache, prefill_step_size=32)
            found.append({"tokens": [token for token, _ in generated], "routes": [int(r) for r in routes(cache)]})
    return found


def main() -> None:
    """Write what this rank found."""
    out, *directories = map(Path, sys.argv[1:])
    group, found = mx.distributed.init(), {}
    for directory in directories:
        model, _ = sharded_load(str(directory), tensor_group=group, trust_remote_code=True)
        heads = model.layers[0].self_attn.n_heads
        found[directory.name] = {"size": group.size(), "heads": heads, "answers": answers(model)}
    (out / f"rank{group.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
