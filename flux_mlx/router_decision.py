"""What a router said, on the device until the host reads it."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from flux_mlx.cuda_kernels import rows_on_device
from flux_mlx.spec import Route


class Decision(NamedTuple):
    """What the router said, not read yet."""

    codes: mx.array  # int32 [B], of Route
    fed: list[bool]  # rows that it counts for; the others keep their route
    is_lent: bool = False  # kernels under way may read `codes`

    def read(self) -> list[Route | None]:
        """The rows' new routes, None where they keep theirs. Waits for the device."""
        codes = joined_for_host([self.codes]) if self.is_lent else self.codes
        return [Route(code) if fed else None for code, fed in zip(codes.tolist(), self.fed, strict=True)]


def joined_for_host(codes: list[mx.array]) -> mx.array:
    """Decisions of one row or more, joined, in memory that no kernel reads.

    MLX on CUDA moves what the host reads to other memory, and does not wait for kernels that read it where it was.
    """
    repeats = -(-rows_on_device(len(codes), codes[0].itemsize) // len(codes))  # of one alone MLX would make no copy
    return mx.concatenate(codes * repeats)[: sum(part.size for part in codes)]
