"""`flux_mlx.train`: train the routers of a frozen causal LM. One process, or many through torchrun.

flux_mlx.train --recipe smollm2 --model DIRECTORY --out RUN
torchrun --nproc-per-node 8 -m cuda_reference.train --recipe published --model DIRECTORY --out RUN --spread fsdp
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cuda_reference.calibration import calibrate_model, check_start
from cuda_reference.checkpoints import flux_config, load_checkpoint, model_fingerprint, save_checkpoint, save_routers
from cuda_reference.console import ends_in_one_line
from cuda_reference.data import Rows, calibration_rows, stream, training_rows
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import Recipe, load_recipe
from cuda_reference.training import Trainer, World

LOG_NAME, ROUTERS_NAME = "log.csv", "routers.safetensors"  # the routers' name is that of a finished run alone
UNFINISHED_NAME = "routers_unfinished.safetensors"  # what `--stop-after` leaves
STOPPED = 3  # exit status of a run that the same command goes on with


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="flux_mlx.train", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="smollm2", help="TOML file, or the name of a shipped recipe")
    parser.add_argument("--model", required=True, help="directory or hub id of a transformers causal LM")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run found there goes on")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="override settings of the recipe")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--spread", choices=("ddp", "fsdp"), default="ddp", help="with torchrun")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--text-cache", type=Path, help="file of encoded text: read if it exists, else written")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument(
        "--stop-after",
        type=float,
        default=float("inf"),
        help=f"seconds after which to save and stop, with exit status {STOPPED}",
    )
    parser.add_argument("--half", action="store_true", help="write the routers as float16, as they are shipped")
    parser.add_argument("--compile", action="store_true", help="compile MLPs and norms (CUDA)")
    return parser


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises as `load_model`."""
    return _pretrained(AutoTokenizer, path)


def load_model(path: str, recipe: Recipe, device: torch.device, *, compiled: bool = False) -> PackedModel:
    """A backbone with fresh routers: bfloat16 on CUDA, float32 on a CPU; routers float32.

    Raises:
        ValueError: There is no transformers causal LM at `path`, or a damaged one; the message names it in one line.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = _pretrained(AutoModelForCausalLM, path, dtype=dtype).to(device)
    torch.manual_seed(recipe.seed)
    model = PackedModel(backbone, flux_config(recipe), recipe.by_head)
    if recipe.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.train()
    if compiled:
        compile_parts(model)
    return model


def _pretrained(kind: type, path: str, **options: Any) -> Any:
    """What an Auto class of transformers makes of `path`. Raises as `load_model`."""
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # of what is missing or damaged transformers, tokenizers and safetensors raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"[load_model] expected the directory or hub id of a transformers causal LM and its tokenizer, got {path}: "
            f"{reason}"
        ) from error


def compile_parts(model: PackedModel) -> None:
    """Compile what is the same in every layer and free of hooks: one graph serves all layers."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.backbone.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile(dynamic=False)


class Log:
    """CSV of the steps. A resumed run keeps the rows up to the step that it resumes from.

    Args:
        path: The file.
        tasks: Their NLL and Omega are columns.
        step: Steps done so far.
    """

    def __init__(self, path: Path, tasks: Sequence[str], step: int):
        self.tasks = tasks
        parts = [f"{name}_{task}" for name in ("nll", "omega", "lambda1", "lambda2") for task in tasks]
        self.columns = ["step", "seconds", "wait_s", "loss", "tau", "lr", "grad_norm", *parts]
        kept = []
        if path.is_file() and step:
            with open(path, newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self._file = open(path, "w", newline="")  # noqa: SIM115
        self._writer = csv.DictWriter(self._file, self.columns)
        self._writer.writeheader()
        self._writer.writerows(kept)

    def write(self, step: int, seconds: float, record: dict[str, Any], multipliers: torch.Tensor) -> dict[str, float]:
        """Write one step; returns its row."""
        nll, omega, counts = record["by_task"].tolist()
        row: dict[str, Any] = {"step": step, "seconds": round(seconds, 2), "tau": record["tau"], "lr": record["lr"]}
        row |= {name: float(record[name]) for name in ("loss", "grad_norm", "wait_s")}
        for i, task in enumerate(self.tasks):
            if counts[i]:
                row |= {f"nll_{task}": nll[i] / counts[i], f"omega_{task}": omega[i] / counts[i]}
            row |= {f"lambda{n + 1}_{task}": float(multipliers[n, i]) for n in range(2)}
        self._writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()
        return row

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _show(bar: tqdm, row: dict[str, float], tasks: Sequence[str]) -> None:
    shown = [
        f"{task[:6]} {row[f'nll_{task}']:.2f}/{row[f'omega_{task}']:.2f}" for task in tasks if f"nll_{task}" in row
    ]
    bar.set_postfix_str("nll/Omega " + " ".join(shown))
    bar.update()


def train(args: argparse.Namespace, recipe: Recipe, world: World) -> Trainer:
    """Run the recipe to its end, or until `args.stop_after` seconds have passed."""
    start = time.monotonic()
    micro, steps = recipe.data.micro_steps, recipe.optimiser.steps
    last = steps * micro  # rows of this process
    tokenizer = load_tokenizer(args.model)
    rows = training_rows(recipe, tokenizer, world.rank, world.ranks, args.workers, args.text_cache)
    model = load_model(args.model, recipe, world.device, compiled=args.compile)
    check_start(model, recipe)
    run = {"model": model_fingerprint(model), "data": sorted(set(world.gathered(rows.fingerprint())))}
    found = world.shared(lambda: _found(args.out, steps))
    if recipe.calibration_rows and not found:
        _calibrate(model, rows, recipe, world, args.workers)
    trainer = Trainer(model, recipe, world, args.spread, next(model.backbone.parameters()).dtype, run)
    if found:
        trainer.load(*found)
    if world.leads:
        args.out.mkdir(parents=True, exist_ok=True)
    packs = stream(rows, range(trainer.step * micro, last), args.workers, pin=world.device.type == "cuda")
    log = Log(args.out / LOG_NAME, recipe.tasks, trainer.step) if world.leads else None
    with tqdm(total=steps, initial=trainer.step, disable=not world.leads, mininterval=1.0) as bar:
        while not trainer.done:
            record = trainer.take_step(packs)
            multipliers = _whole(trainer.penalty.multipliers)
            if log is not None:
                _show(bar, log.write(trainer.step, time.monotonic() - start, record, multipliers), recipe.tasks)
            late = _agreed(time.monotonic() - start > args.stop_after, world)
            if trainer.step % args.save_every == 0 or trainer.done or late:
                _save(args.out, trainer)
            if late:
                break
    _save_routers(args.out, trainer, torch.float16 if args.half else torch.float32)
    if log is not None:
        log.close()
    return trainer


def _found(out: Path, steps: int) -> tuple[int, dict[str, Any]] | None:
    """The checkpoint that the run in `out` goes on from, if any.

    Raises:
        ValueError: Routers of a finished run lie there without its last checkpoint; or no checkpoint can be read.
    """
    found = load_checkpoint(out)
    done = found[0] if found else 0
    if done < steps and (out / ROUTERS_NAME).exists():
        raise ValueError(
            f"[train] expected a checkpoint of step {steps} beside the {ROUTERS_NAME} of {out}, got {done}; move the "
            "file away, or give a new output folder."
        )
    return found


def _calibrate(model: PackedModel, rows: Rows, recipe: Recipe, world: World, workers: int) -> None:
    """Give fresh routers the recipe's start."""
    agreement = calibrate_model(model, stream(*calibration_rows(rows, recipe), workers), recipe)
    if recipe.start and world.leads:
        tqdm.write(f"start: {agreement:.3f} of the decisions on other prompts follow the masks", file=sys.stderr)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter without its sharding."""
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach().cpu()


def _agreed(late: bool, world: World) -> bool:
    """Whether any process says so: all stop in the same step."""
    if world.ranks == 1:
        return late
    flag = torch.tensor([float(late)], device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _save(out: Path, trainer: Trainer) -> None:
    """A checkpoint; all processes gather, the first writes."""
    state = trainer.state()
    if trainer.world.leads:
        save_checkpoint(out, trainer.step, state)
    if trainer.world.ranks > 1:
        dist.barrier()


def _save_routers(out: Path, trainer: Trainer, dtype: torch.dtype) -> None:
    """The routers, under the name of a finished run or of a stopped one; all processes gather, the first writes."""
    routers = trainer.full_routers()
    if trainer.world.leads:
        save_routers(out / (ROUTERS_NAME if trainer.done else UNFINISHED_NAME), routers, trainer.recipe, dtype)
        if trainer.done:
            (out / UNFINISHED_NAME).unlink(missing_ok=True)
    if trainer.world.ranks > 1:
        dist.barrier()


@ends_in_one_line(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    """Console entry; returns the exit status: 0, or `STOPPED` where steps are left."""
    args = build_parser().parse_args(argv)
    recipe = load_recipe(args.recipe, args.set)
    world = World.join(args.device)
    try:
        trainer = train(args, recipe, world)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if trainer.done:
        return 0
    if world.leads:
        print(
            f"[train] stopped after step {trainer.step} of {recipe.optimiser.steps}: the same command goes on.",
            file=sys.stderr,
        )
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
