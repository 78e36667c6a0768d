"""What a router said, on the device until the host reads it."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from flux_mlx.spec import Route

_WORD_BITS = 32


class Decision(NamedTuple):
    """What the router said, not read yet."""

    codes: mx.array  # int32 [B], of Route: SPARSE or FULL; or what `packed` makes of them
    fed: list[bool]  # B rows: those that it counts for; the others keep their route
    is_lent: bool = False  # kernels under way may read `codes`
    is_packed: bool = False

    @classmethod
    def joined(cls, codes: list[mx.array]) -> Decision:
        """Decisions of one row or more as one, to be computed beside other work and read later."""
        return cls(packed(codes), [True] * sum(part.size for part in codes), is_packed=True)

    def read(self) -> list[Route | None]:
        """The rows' new routes, None where they keep theirs. Waits for the device."""
        if self.is_packed or self.is_lent:
            codes = unpacked(self.codes if self.is_packed else packed([self.codes]), len(self.fed))
        else:
            codes = self.codes.tolist()
        return [Route(code) if fed else None for code, fed in zip(codes, self.fed, strict=True)]


def packed(codes: list[mx.array]) -> mx.array:
    """A bit for each row, set where it is SPARSE; the first row is the lowest bit of the first word.

    What the host reads MLX on CUDA moves to other memory: 0.1 ms and more, without waiting for kernels that read it
    where it was. Up to 8 bytes, so 64 rows, lie where both can read from the start. The GPU's next write there waits
    for the page: for what is read once a prompt, beside other work, that is little.

    Args:
        codes: int32 `[B]` each, of `Route`, SPARSE or FULL; joined.

    Returns:
        uint32 `[ceil(rows / 32)]`.
    """
    if missing := -sum(part.size for part in codes) % _WORD_BITS:
        codes = [*codes, mx.zeros(missing, mx.int32)]
    bits = (mx.concatenate(codes) == int(Route.SPARSE)).astype(mx.uint32).reshape(-1, _WORD_BITS)
    return (bits << mx.arange(_WORD_BITS, dtype=mx.uint32)).sum(axis=1)


def unpacked(words: mx.array, rows: int) -> list[Route]:
    """The first `rows` rows of what `packed` made. Waits for the device."""
    bits = [word >> bit & 1 for word in words.tolist() for bit in range(_WORD_BITS)]
    return [Route.SPARSE if bit else Route.FULL for bit in bits[:rows]]
