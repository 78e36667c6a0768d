"""The training step and its state: what is optimised, how it is spread over processes, what a checkpoint holds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from cuda_reference.data_packing import Pack
from cuda_reference.objective import SparsityPenalty, logistic_noise, sample_divergence, sample_nll, task_means
from cuda_reference.packed_model import PackedModel
from cuda_reference.recipe import Recipe
from flux_mlx.spec.config import ROUTER_INFIX

_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_LOAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False, strict=False)


@dataclass(frozen=True)
class World:
    """The processes of this run, from torchrun's environment.

    Args:
        rank, ranks: This process among all.
        device: Of this process.
    """

    rank: int
    ranks: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None = None) -> World:
        """Join the process group that torchrun started, if any. `device` None takes CUDA where there is one."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(place)
        if ranks > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", "0")), ranks, place)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def shared(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives on the first process, for all: only its files count. A ValueError is raised on all."""
        if self.ranks == 1:
            return compute()
        box: list[Any] = [None]
        if self.leads:
            try:
                box = [compute()]
            except ValueError as error:
                box = [error]
        dist.broadcast_object_list(box, device=self.device)
        if isinstance(box[0], ValueError):
            raise box[0]
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values


class Loss(nn.Module):
    """Model and penalty in one module, so that one wrapper serves both.

    Args:
        model: Backbone with routers.
        penalty: Sparsity penalty.
        kind: One of `recipe.LOSSES`.
    """

    def __init__(self, model: PackedModel, penalty: SparsityPenalty, kind: str = "nll"):
        super().__init__()
        self.model, self.penalty, self.kind = model, penalty, kind

    def forward(self, pack: Pack, noise: torch.Tensor, tau: float, hard: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a pack and, detached, `[3, tasks]`: NLL by task, Omega by task, samples by task."""
        teacher = self._teacher(pack) if self.kind == "kl" else None
        logits, routing = self.model(pack, noise=noise, tau=tau, hard=hard)
        with torch.set_grad_enabled(teacher is None and torch.is_grad_enabled()):  # else only logged: no graph
            nll = sample_nll(logits, pack.loss_targets, pack.loss_sample, pack.samples)
        omega = routing.omega()
        lost = nll if teacher is None else sample_divergence(logits, teacher, pack.loss_sample, pack.samples)
        loss = lost.mean() + self.penalty(omega, pack.task)
        tasks = len(self.penalty.tasks)
        counts = torch.bincount(pack.task, minlength=tasks).float()
        by_task = [task_means(values.detach(), pack.task, tasks)[1].nan_to_num() * counts for values in (nll, omega)]
        return loss, torch.stack([*by_task, counts])

    @torch.no_grad()
    def _teacher(self, pack: Pack) -> torch.Tensor:
        """Logits of the pack with every layer full."""
        layers = len(self.model.backbone.get_decoder().layers)
        return self.model(pack, forced=torch.ones(layers, pack.groups, dtype=torch.bool, device=pack.tokens.device))[0]


def _shard(loss: Loss, dtype: torch.dtype) -> Loss:
    """FSDP2: every layer a unit, its float32 router a unit of its own."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    for layer in loss.model.backbone.model.layers:
        if hasattr(layer.self_attn, "router"):
            fully_shard(layer.self_attn.router)
        fully_shard(layer, mp_policy=policy)
    fully_shard(loss.penalty)
    return fully_shard(loss, mp_policy=policy)


class Trainer:
    """Holds a run's state and takes its steps.

    Args:
        model: On the device of `world`.
        recipe: The run.
        world: The processes.
        spread: "ddp" or "fsdp": how several processes share the work.
        dtype: Of the backbone.
        run: What else the run depends on, in JSON's types: a checkpoint goes on only where it is the same.
    """

    def __init__(
        self,
        model: PackedModel,
        recipe: Recipe,
        world: World,
        spread: str,
        dtype: torch.dtype,
        run: Mapping[str, Any] | None = None,
    ):
        self.recipe, self.world, self.step = recipe, world, 0
        self.run = {"processes": world.ranks, **(run or {})}
        penalty = SparsityPenalty(recipe.targets, torch.Generator().manual_seed(recipe.seed)).to(world.device)
        self.loss: nn.Module = Loss(model, penalty, recipe.loss)
        self.penalty, self.model = penalty, model
        if world.ranks > 1 and spread == "fsdp":
            self.loss = _shard(self.loss, dtype)
        elif world.ranks > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.loss = DistributedDataParallel(self.loss, device_ids=ids)
        options = recipe.optimiser
        self.router_parameters = list(model.routers().values())
        groups = [
            {"params": self.router_parameters, "lr": options.lr, "weight_decay": options.weight_decay},
            {"params": [penalty.multipliers], "lr": options.lambda_lr, "weight_decay": 0.0, "maximize": True},
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=tuple(options.betas))
        self._layers = len(model.backbone.get_decoder().layers)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.recipe.optimiser.steps

    def take_step(self, packs: Iterator[Pack]) -> dict[str, Any]:
        """One optimiser step over `micro_steps` packs; returns what to log."""
        recipe = self.recipe
        progress = self.step / recipe.optimiser.steps
        tau, micro_steps = recipe.schedules.tau(progress), recipe.data.micro_steps
        total, by_task, waited = 0.0, 0.0, 0.0
        for micro in range(micro_steps):
            asked = time.monotonic()
            pack = next(packs).to(self.world.device)
            waited += time.monotonic() - asked
            noise = self._noise(pack, micro) * recipe.schedules.noise(progress)
            with self._sync(micro == micro_steps - 1):
                loss, parts = self.loss(pack, noise, tau, recipe.hard)
                (loss / micro_steps).backward()
            total, by_task = total + loss.detach() / micro_steps, by_task + parts
        norm = nn.utils.clip_grad_norm_(self.router_parameters, recipe.optimiser.clip)
        rate = recipe.optimiser.lr * recipe.schedules.lr((self.step + 1) / recipe.optimiser.steps)
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.penalty.keep_positive()
        self.step += 1
        return self._record(total, by_task, norm) | {"tau": tau, "lr": rate, "wait_s": waited}

    def _sync(self, last: bool) -> Any:
        """Exchange gradients in the last micro-step only."""
        if isinstance(self.loss, DistributedDataParallel) and not last:
            return self.loss.no_sync()
        return nullcontext()

    def _noise(self, pack: Pack, micro: int) -> torch.Tensor:
        """Noise of this step: the same again after a resume."""
        number = (self.step * self.recipe.data.micro_steps + micro) * self.world.ranks + self.world.rank
        generator = torch.Generator(self.world.device).manual_seed(self.recipe.seed * 1_000_003 + number)
        return logistic_noise((self._layers, self.model.groups * pack.groups), generator)

    def _record(self, loss: torch.Tensor, by_task: torch.Tensor, norm: torch.Tensor) -> dict[str, Any]:
        """Numbers of the step over all processes: the sums stay on the device until they are read."""
        if self.world.ranks > 1:
            sums = torch.cat([loss.view(1), by_task.flatten()])
            dist.all_reduce(sums)
            loss, by_task = sums[0] / self.world.ranks, sums[1:].view_as(by_task)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return {"loss": loss, "grad_norm": norm, "by_task": by_task}

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, on the CPU. All processes must call it."""
        whole = get_model_state_dict(self.loss, options=_STATE)
        return {
            "recipe": self.recipe.to_dict(),
            "run": self.run,
            "model": {name: value for name, value in whole.items() if not _is_frozen(name)},
            "optimiser": get_optimizer_state_dict(self.loss, self.optimiser, options=_STATE),
        }

    def load(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from `state` after `step` steps.

        Raises:
            ValueError: The checkpoint is of another recipe, number of processes, model or data, or lacks parameters.
        """
        if json.dumps(state["recipe"]) != json.dumps(self.recipe.to_dict()):  # multipliers follow the tasks' order
            raise ValueError(
                "[Trainer.load] the checkpoint was written by another recipe, or with its tasks in another order; give "
                "a new output folder."
            )
        found = state.get("run", {})
        ours = {name: value for name, value in self.run.items() if found.get(name) != value}
        if ours:
            theirs = {name: found.get(name, "not noted") for name in ours}
            raise ValueError(
                f"[Trainer.load] expected {theirs}, as the checkpoint was written with, got {ours}; go on as the run "
                "was started, or give a new output folder."
            )
        trained = {"penalty.multipliers", *(f"model.backbone.{name}" for name in self.model.routers())}
        missing = sorted(trained - state["model"].keys())
        if missing:
            raise ValueError(f"[Trainer.load] the checkpoint lacks {len(missing)} parameters: {missing[:4]}.")
        set_model_state_dict(self.loss, state["model"], options=_LOAD)
        set_optimizer_state_dict(self.loss, self.optimiser, state["optimiser"], options=_LOAD)
        self.step = step

    def full_routers(self) -> dict[str, torch.Tensor]:
        """The routers under the names of a Flux model directory, gathered. All processes must call it."""
        routers = self.model.routers()
        return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in routers.items()}


def _is_frozen(name: str) -> bool:
    """Whether a name of the state dict belongs to the backbone (tied weights escape `ignore_frozen_params`)."""
    return name.startswith("model.") and ROUTER_INFIX not in name
