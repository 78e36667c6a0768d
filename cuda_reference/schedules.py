"""Values that change over training: functions of the share of steps done, in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedules:
    """Temperature, noise and learning rate over training.

    Args:
        tau_start, tau_end: Temperature of the routes; a half cosine leads from one to the other.
        tau_share: Share of the steps after which `tau_end` is reached.
        noise_share: Share of the steps with full Gumbel noise; it then falls linearly to 0 at the last step, so that
            training ends with the decisions of inference. 1.0 keeps the noise to the end, as published.
        warmup_share: Share of the steps with a linearly rising learning rate.
        lr_floor: The cosine's last value, as a share of the learning rate.
    """

    tau_start: float = 1.5
    tau_end: float = 1.0
    tau_share: float = 0.6
    noise_share: float = 1.0
    warmup_share: float = 0.2
    lr_floor: float = 0.0

    def __post_init__(self) -> None:
        if not (self.tau_start > 0 and self.tau_end > 0):
            raise ValueError(f"[Schedules] expected positive temperatures, got {self.tau_start} and {self.tau_end}.")
        for name in ("tau_share", "noise_share", "warmup_share", "lr_floor"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"[Schedules] {name} must be a share in [0, 1], got {value!r}.")

    def tau(self, progress: float) -> float:
        """Temperature at `progress`."""
        done = min(1.0, progress / self.tau_share) if self.tau_share else 1.0
        return self.tau_end + (self.tau_start - self.tau_end) * half_cosine(done)

    def noise(self, progress: float) -> float:
        """Multiplier of the Gumbel noise at `progress`."""
        if progress <= self.noise_share:
            return 1.0
        return (1.0 - progress) / (1.0 - self.noise_share)

    def lr(self, progress: float) -> float:
        """Multiplier of the learning rate at `progress`."""
        if progress < self.warmup_share:
            return progress / self.warmup_share
        done = (progress - self.warmup_share) / (1.0 - self.warmup_share) if self.warmup_share < 1.0 else 1.0
        return self.lr_floor + (1.0 - self.lr_floor) * half_cosine(done)


def half_cosine(done: float) -> float:
    """1 at 0, 0 at 1, flat at both ends."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
