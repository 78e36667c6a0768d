"""Memory and time of training steps on long rows: a model of a known shape with random weights, one sample a row.

    python -m benchmarks.training_memory --shape llama-8b --tokens 65536 --out memory.json
    torchrun --nproc-per-node 4 -m benchmarks.training_memory --shape llama-8b --tokens 65536 --spread fsdp --out m.json

Beside what was measured stands what `arithmetic` expects (cuda_reference/TRAINING.md explains its lines).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from cuda_reference.checkpoints import flux_config
from cuda_reference.data_packing import pack
from cuda_reference.data_prompts import Sample
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import Recipe, load_recipe
from cuda_reference.training import Trainer, World
from flux_mlx.spec import RouterConfig

ANSWER_TOKENS = 256
SHAPES = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


def arithmetic(shape: dict[str, int], tokens: int, ranks: int, bytes_each: int = 2) -> dict[str, float]:
    """GB of one process in a step with gradient checkpointing and the weights sharded over `ranks`."""
    hidden, mlp, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    q, kv = (shape[f"num_{kind}_heads"] * shape["head_dim"] for kind in ("attention", "key_value"))
    layer = hidden * (2 * q + 2 * kv + 3 * mlp)
    embeddings = 2 * shape["vocab_size"] * hidden
    router = sum(int(np.prod(s)) for s in RouterConfig.parameter_shapes(shape["head_dim"]).values())
    # kept for the backward of one layer: q, k, v before and after RoPE, both branches' outputs and their difference,
    # the output projection, two norms and two residuals, three of the MLP and the product of two of them
    kept = 4 * q + 4 * kv + 2 * q + 5 * hidden + 4 * mlp
    gathered = layer if ranks > 1 else 0  # the layer at work, and the next one on its way
    parts = {
        "weights": (layers * layer + embeddings) / ranks + 2 * gathered,
        "layer inputs": layers * tokens * hidden,
        "one layer, recomputed": tokens * kept,
        "its gradients": tokens * (2 * mlp + 2 * hidden + q + 2 * kv),
        "logits": ANSWER_TOKENS * shape["vocab_size"] * 4,
        "routers and AdamW": layers * router * 16 / bytes_each,
    }
    found = {name: round(count * bytes_each / 1e9, 2) for name, count in parts.items()}
    return found | {"sum": round(sum(found.values()), 2)}


def build(shape: dict[str, int], tokens: int, recipe: Recipe, device: torch.device) -> PackedModel:
    """A frozen Llama of random weights with fresh routers; bfloat16 on CUDA, float32 on a CPU."""
    config = LlamaConfig(**shape, max_position_embeddings=tokens, tie_word_embeddings=False)
    torch.manual_seed(recipe.seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            backbone = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model = PackedModel(backbone, flux_config(recipe)).to(device)
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    backbone.train()
    return model


def measure(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Seconds and peak memory of `args.steps` steps."""
    shape = SHAPES[args.shape]
    recipe = load_recipe("published", [f"data.row_tokens={args.tokens}", "data.micro_steps=1"])
    recipe = replace(recipe, loss=args.loss)
    model = build(shape, args.tokens, recipe, world.device)
    trainer = Trainer(model, recipe, world, args.spread, next(model.backbone.parameters()).dtype)
    ids = np.random.default_rng(world.rank).integers(0, shape["vocab_size"], args.tokens).astype(np.int32)
    sample = Sample(ids, args.tokens - min(ANSWER_TOKENS, args.tokens // 4), "single")
    packs = itertools.repeat(pack([sample], recipe.tasks, recipe.router.pool_tokens, args.tokens))
    is_cuda, seconds = world.device.type == "cuda", []
    for _ in range(args.steps):
        start = time.monotonic()
        record = trainer.take_step(packs)
        loss = float(record["loss"])  # waits for the device
        seconds.append(round(time.monotonic() - start, 2))
    return {
        "shape": args.shape,
        "tokens": args.tokens,
        "ranks": world.ranks,
        "spread": args.spread if world.ranks > 1 else "none",
        "loss_kind": args.loss,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "torch": torch.__version__,
        "seconds": seconds,
        "loss": loss,
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if is_cuda else None,
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if is_cuda else None,
        "arithmetic_gb": arithmetic(shape, args.tokens, world.ranks if args.spread == "fsdp" else 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-8b", help="of the model")
    parser.add_argument("--tokens", type=int, default=65536, help="of a row, a multiple of 128")
    parser.add_argument("--steps", type=int, default=2, help="training steps; the first compiles the kernels")
    parser.add_argument("--loss", choices=("nll", "kl"), default="nll", help="as in the recipe")
    parser.add_argument("--spread", choices=("ddp", "fsdp"), default="ddp", help="with torchrun")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    world = World.join(args.device)
    try:
        found = measure(args, world)
        if world.leads:
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
