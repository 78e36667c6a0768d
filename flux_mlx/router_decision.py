"""What a router said, on the device until the host reads it."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from flux_mlx.spec import Route

_WORD_BITS = 32


class PackedRoutes(NamedTuple):
    """Routes of some rows for the host to read, a bit each.

    What the host reads MLX on CUDA moves to other memory: 0.1 ms and more, without waiting for kernels that read it
    where it was. Up to 8 bytes, so 64 rows, lie where both can read from the start.
    """

    words: mx.array  # uint32 [ceil(rows / 32)]: the first row is the lowest bit of the first
    rows: int

    @classmethod
    def of(cls, codes: list[mx.array]) -> PackedRoutes:
        """Pack codes of `Route`, SPARSE or FULL: int32 `[B]` each, joined. Does not wait for the device."""
        rows = sum(part.size for part in codes)
        if missing := -rows % _WORD_BITS:
            codes = [*codes, mx.zeros(missing, mx.int32)]
        bits = (mx.concatenate(codes) == int(Route.SPARSE)).astype(mx.uint32).reshape(-1, _WORD_BITS)
        return cls((bits << mx.arange(_WORD_BITS, dtype=mx.uint32)).sum(axis=1), rows)

    def read(self) -> list[Route]:
        """The rows' routes. Waits for the device."""
        bits = [word >> bit & 1 for word in self.words.tolist() for bit in range(_WORD_BITS)]
        return [Route.SPARSE if bit else Route.FULL for bit in bits[: self.rows]]


class Decision(NamedTuple):
    """What the router said, not read yet."""

    codes: mx.array  # int32 [B], of Route: SPARSE or FULL
    fed: list[bool]  # rows that it counts for; the others keep their route

    def read(self) -> list[Route | None]:
        """The rows' new routes, None where they keep theirs. Waits for the device."""
        routes = PackedRoutes.of([self.codes]).read()
        return [route if fed else None for route, fed in zip(routes, self.fed, strict=True)]
