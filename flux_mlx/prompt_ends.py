"""Which tokens of a prompt the router pools, the first and the last, where the prompt comes in chunks."""

from __future__ import annotations

import itertools

import mlx.core as mx


def prompt_ends(chunks: list[mx.array], pool_tokens: int) -> mx.array:
    """What the router pools of a prompt in chunks `[1, ., hidden]`: its first and last `pool_tokens` rows, or all."""
    if sum(chunk.shape[1] for chunk in chunks) <= 2 * pool_tokens:
        return joined(chunks, 1)
    return joined(head_pieces(chunks, pool_tokens) + tail_pieces(chunks, pool_tokens), 1)


def chunks_of_ends(sizes: list[int], pool_tokens: int) -> list[int]:
    """Which chunks of so many tokens hold the first and the last `pool_tokens` tokens of a prompt."""
    stops = list(itertools.accumulate(sizes))
    starts = [0, *stops[:-1]]
    tail = stops[-1] - pool_tokens
    return [i for i, (start, stop) in enumerate(zip(starts, stops, strict=True)) if start < pool_tokens or stop > tail]


def head_pieces(chunks: list[mx.array], tokens: int) -> list[mx.array]:
    """The first `tokens` of chunks `[1, ., ...]`, or all, in pieces."""
    pieces = []
    for chunk in chunks:
        if tokens > 0:
            pieces.append(chunk[:, :tokens])
            tokens -= chunk.shape[1]
    return pieces


def tail_pieces(chunks: list[mx.array], tokens: int) -> list[mx.array]:
    """The last `tokens`."""
    pieces: list[mx.array] = []
    for chunk in reversed(chunks):
        if tokens > 0:
            pieces.insert(0, chunk[:, -tokens:])
            tokens -= chunk.shape[1]
    return pieces


def joined(pieces: list[mx.array], axis: int) -> mx.array:
    """The pieces as one array; a single one as it is."""
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=axis)
