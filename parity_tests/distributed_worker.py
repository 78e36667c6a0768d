"""One rank of a tensor-parallel Flux model: prints its tokens and routes as a line of JSON.

Run by `mlx.launch` in test_distributed.py: `distributed_worker.py MODEL_DIRECTORY OUT_DIRECTORY`.
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
                rest = prefill(model, mx.array(tokens), cache) if exact else mx.array(tokens)
            generated = generate_step(rest, model, max_tokens=6, prompt_cache=cache, prefill_step_size=32)
            found.append({"tokens": [token for token, _ in generated], "routes": [int(r) for r in routes(cache)]})
    return found


def main() -> None:
    """Write what this rank found."""
    directory, out = sys.argv[1], Path(sys.argv[2])
    group = mx.distributed.init()
    model, _ = sharded_load(directory, tensor_group=group, trust_remote_code=True)
    found = {"size": group.size(), "heads": model.layers[0].self_attn.n_heads, "answers": answers(model)}
    (out / f"rank{group.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
