"""One of several processes that train: writes what it found as `rankN.pt`.

Run by torchrun in test_training_processes.py: `training_worker.py HOME OUT`, where HOME holds a model and a corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed as dist

from cuda_reference import data_text
from cuda_reference.calibration import calibrate_model
from cuda_reference.data import calibration_rows, stream, training_rows
from cuda_reference.data_prompts import TASKS
from cuda_reference.recipe import Recipe, load_recipe
from cuda_reference.train import build_parser, load_model, train
from cuda_reference.training import Trainer, World
from parity_tests.tiny_training import byte_tokenizer, training_arguments

MASKS = "{" + ", ".join(f"{task} = [{number % 2}]" for number, task in enumerate(TASKS)) + "}"
ROWS = 3  # of a start: not the same number for each of two processes


def start_recipe() -> Recipe:
    """The recipe of `training_arguments` with a start."""
    settings = build_parser().parse_args(training_arguments(Path(), Path())).set
    return load_recipe("smollm2", [*settings, f"start={MASKS}", f"calibration_rows={ROWS}"])


def trained(home: Path, out: Path, world: World, *more: str) -> dict[str, torch.Tensor]:
    """Routers after a run of the command in `out`."""
    args = build_parser().parse_args(training_arguments(home, out, *more))
    return train(args, load_recipe(args.recipe, args.set), world).full_routers()


def calibrated(home: Path, world: World) -> dict[str, torch.Tensor]:
    """Routers after a start that all processes measure."""
    recipe = start_recipe()
    model = load_model(str(home / "model"), recipe, world.device)
    rows = training_rows(recipe, byte_tokenizer(), world.rank, world.ranks)
    calibrate_model(model, stream(*calibration_rows(rows, recipe)), recipe)
    return model.routers()


def refusal(world: World) -> str:
    """The error of a computation that only the first process can make, and cannot."""

    def fails() -> None:
        raise ValueError(f"process {world.rank} cannot")

    try:
        world.shared(fails)
    except ValueError as error:
        return str(error)
    return "none"


def main() -> None:
    """Write what this process found: its own folders stand for a disk of its own."""
    home, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    data_text.default_roots = lambda: {"site": home / "corpus"}
    world = World.join("cpu")
    disk = out / f"disk{world.rank}"
    counts = torch.ones(3, 2)
    record = Trainer._record(SimpleNamespace(world=world), torch.tensor(1.0 + world.rank), counts, torch.tensor(0.0))
    found = {
        "loss": record["loss"],
        "by_task": record["by_task"],
        "refusal": refusal(world),
        "calibrated": calibrated(home, world),
        "whole": trained(home, disk / "whole", world),
        "stopped": trained(home, disk / "parts", world, "--stop-after", "0"),
        "resumed": trained(home, disk / "parts", world),
        "sharded": trained(home, disk / "sharded", world, "--spread", "fsdp"),
        "files": sorted(str(path.relative_to(disk)) for path in disk.rglob("*.*")),
    }
    torch.save({k: _plain(v) for k, v in found.items()}, out / f"rank{world.rank}.pt")
    dist.destroy_process_group()


def _plain(value: object) -> object:
    """Parameters as tensors."""
    return {name: p.detach().clone() for name, p in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
