"""What training minimises: routes drawn by Gumbel noise, the LM loss, the sparsity penalty with learned multipliers.

Maths (Flux Attention, arXiv 2604.07394, and its public code): a layer's z in [0, 1] weighs full attention,
output = z * FA + (1 - z) * SA; Omega = 1 - mean of z over the layers, for one sample;
loss = LM + mean over the tasks present of lambda1[task] |Omega - t| + lambda2[task] (Omega - t)^2,
where t is the task's target and the lambdas follow gradient ascent, kept >= 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

ROWS_PER_STEP = 1024  # rows whose float32 probabilities exist at one time, forward and backward


def logistic_noise(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Difference of two Gumbel draws, which is a logistic one: float32 of `shape` on the generator's device."""
    uniform = torch.rand(tuple(shape), generator=generator, device=generator.device)
    uniform = uniform.clamp(1e-7, 1 - 1e-7)
    return uniform.log() - (-uniform).log1p()


def gumbel_route(logits: torch.Tensor, noise: torch.Tensor | None, tau: float, *, hard: bool = True) -> torch.Tensor:
    """Draw z, the weight of full attention: softmax((logits + gumbel) / tau)[1] (Jang et al., arXiv 1611.01144).

    Args:
        logits: `[..., 2]`, logit 1 speaks for FULL.
        noise: `[...]`, from `logistic_noise`: of two Gumbel draws only the difference matters. None: the decision of
            inference.
        tau: Temperature, positive.
        hard: Straight-through: exactly 0 or 1 forward, the soft value's gradient backward. False: the soft mixture.

    Returns:
        `[...]` of the logits' dtype.
    """
    gap = logits[..., 1] - logits[..., 0]
    soft = torch.sigmoid((gap if noise is None else gap + noise) / tau)
    if not hard:
        return soft
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


class SparsityPenalty(nn.Module):
    """Pulls Omega of every task towards the task's target.

    Args:
        targets: Task name to target t in [0, 1].
        generator: Draws the initial multipliers from U(0, 0.5).
    """

    def __init__(self, targets: Mapping[str, float], generator: torch.Generator):
        super().__init__()
        self.tasks = tuple(targets)
        self.register_buffer("targets", torch.tensor([float(targets[task]) for task in self.tasks]))
        first = 0.5 * torch.rand(2, len(self.tasks), generator=generator)
        self.multipliers = nn.Parameter(first)  # lambda1 and lambda2, [2, tasks]

    def forward(self, omega: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """Mean over the tasks present of the mean penalty of their samples.

        Args:
            omega: `[N]` float32, share of sparse layers of each sample.
            task: `[N]` int64, index into `tasks`.
        """
        gap = omega - self.targets[task]
        each = self.multipliers[0, task] * gap.abs() + self.multipliers[1, task] * gap.square()
        return task_means(each, task, len(self.tasks))[0]

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Clamp the multipliers at 0; to be called after every optimiser step."""
        self.multipliers.clamp_(min=0.0)


def task_means(values: torch.Tensor, task: torch.Tensor, tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of `values [N]` by task: (their mean over the tasks present, `[tasks]` with nan where absent)."""
    counts = torch.zeros(tasks, dtype=values.dtype, device=values.device).index_add(0, task, torch.ones_like(values))
    sums = torch.zeros_like(counts).index_add(0, task, values)
    present = counts > 0
    overall = (sums / counts.clamp(min=1)).sum() / present.sum().clamp(min=1)
    return overall, torch.where(present, sums / counts.clamp(min=1), torch.nan).detach()


def sample_nll(
    logits: torch.Tensor, targets: torch.Tensor, sample: torch.Tensor, samples: int, rows: int = ROWS_PER_STEP
) -> torch.Tensor:
    """Mean negative log-likelihood of each sample's answer tokens, natural log.

    Args:
        logits: `[M, vocab]`, any float dtype; the softmax is float32.
        targets: `[M]` int64.
        sample: `[M]` int64, which sample a row belongs to.
        samples: Number of samples; each has at least one row.
        rows: Rows whose float32 probabilities exist at one time.

    Returns:
        `[samples]` float32.
    """
    return _sample_means(target_nll(logits, targets, rows), sample, samples)


def target_nll(logits: torch.Tensor, targets: torch.Tensor, rows: int = ROWS_PER_STEP) -> torch.Tensor:
    """Negative log-likelihood of each row's target, natural log: `[M]` float32; arguments as `sample_nll`'s."""
    return _by_rows(_nll, rows, logits, targets)


def sample_divergence(
    logits: torch.Tensor, teacher: torch.Tensor, sample: torch.Tensor, samples: int, rows: int = ROWS_PER_STEP
) -> torch.Tensor:
    """Mean KL(teacher || model) over each sample's answer tokens: what routing changes, whatever the answer was.

    A sample that the backbone itself gets wrong has a large NLL, and its gradient tells the routers little about what
    full attention gave; its divergence from the backbone is 0 as soon as the routes keep what the backbone does.

    Args:
        logits: `[M, vocab]`, any float dtype; the softmax is float32.
        teacher: `[M, vocab]`, of the model with every layer full.
        sample, samples, rows: As `sample_nll`.

    Returns:
        `[samples]` float32.
    """
    return _sample_means(_by_rows(_divergence, rows, logits, teacher), sample, samples)


def _by_rows(loss: Callable[..., torch.Tensor], rows: int, *tensors: torch.Tensor) -> torch.Tensor:
    """`loss` of each row of `tensors`, `[M]`: `rows` of them at a time, and computed anew for the gradient."""
    parts = zip(*(x.split(rows) for x in tensors), strict=True)
    return torch.cat([checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row's target."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def _divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model) of each row."""
    ours, theirs = (x.float().log_softmax(-1) for x in (logits, teacher))
    return (theirs.exp() * (theirs - ours)).sum(-1)


def _sample_means(values: torch.Tensor, sample: torch.Tensor, samples: int) -> torch.Tensor:
    """Means of the rows' values by sample, `[samples]`; each has at least one row."""
    zeros = torch.zeros(samples, device=values.device)
    return zeros.index_add(0, sample, values) / zeros.index_add(0, sample, torch.ones_like(values))
