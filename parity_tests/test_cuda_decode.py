"""The CUDA decode kernel on the host shim: against the specification, with planted mistakes, and as models call it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from flux_mlx import cuda_catalog, cuda_kernels, spec
from flux_mlx.spec import Route
from parity_tests.cuda_cases import AMPERE, DECODE_PATTERN, H100, PREFILL_PATTERN, as_float64, check, draw
from parity_tests.host_shim.cuda_source import HostCuda
from parity_tests.host_shim.run import SCHEDULES, HostError


@pytest.fixture(autouse=True)
def _ampere(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "device", lambda: AMPERE)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 4, 2, 1, 301, 64), "float16"),
        ((2, 4, 1, 3, 200, 128), "bfloat16"),
        ((1, 6, 2, 8, 333, 64), "bfloat16"),  # three chunks of 8 rows
        ((1, 3, 3, 2, 2, 128), "float16"),
    ],
)
@pytest.mark.parametrize("run", [HostCuda(schedule="shuffled"), HostCuda(sanitize=True)], ids=["shuffled", "sanitized"])
def test_decode(sizes, dtype, run):
    B, HQ, HKV, L, S, D = sizes
    q, k, v = draw(B, HQ, L, D, dtype=dtype), draw(B, HKV, S, D, dtype=dtype), draw(B, HKV, S, D, dtype=dtype, seed=1)
    arrays = [as_float64(x) for x in (q, k, v)]
    sparse = cuda_kernels.sparse_attention(q, k, v, DECODE_PATTERN, run=run)
    check(sparse, spec.sparse_attention(*arrays, DECODE_PATTERN), dtype)
    full = cuda_kernels.full_attention(q, k, v, run=run)
    check(full, spec.full_attention(*arrays), dtype)


@pytest.mark.parametrize("schedule", ["behind", "shuffled"])
def test_decode_does_not_depend_on_the_order_of_blocks(schedule):
    q, k, v = draw(1, 8, 1, 64), draw(1, 2, 900, 64), draw(1, 2, 900, 64, seed=1)
    results = [cuda_kernels.full_attention(q, k, v, run=HostCuda(schedule=how)) for how in ("fair", schedule)]
    assert all(mx.array_equal(a, b).item() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("sizes", "dtype"), [((1, 8, 2, 1, 301, 128), "bfloat16"), ((2, 4, 1, 3, 200, 64), "float16")])
def test_decoder(sizes, dtype):
    """Whole buffers, NaN behind the keys in use; routes of all rows or of each."""
    B, HQ, HKV, L, S, D = sizes
    q, k, v = draw(B, HQ, L, D, dtype=dtype), draw(B, HKV, S, D, dtype=dtype), draw(B, HKV, S, D, dtype=dtype, seed=1)
    behind = mx.full((B, HKV, 19, D), float("nan"), k.dtype)
    buffers = [mx.concatenate([x, behind], axis=2) for x in (k, v)]
    arrays = [as_float64(x) for x in (q, k, v)]
    expected = [spec.full_attention(*arrays)[0], spec.sparse_attention(*arrays, DECODE_PATTERN)[0]]
    for route in (Route.FULL, Route.SPARSE, (Route.SPARSE, Route.FULL)[:B]):
        codes = route if isinstance(route, tuple) else (route,) * B
        decode = cuda_kernels.decoder(
            tuple(q.shape), tuple(buffers[0].shape), dtype, DECODE_PATTERN, D**-0.5, route, HostCuda()
        )
        out = decode(q, *buffers, S)
        assert out.shape == (B, L, HQ * D)
        wanted = np.stack([expected[code == Route.SPARSE][row] for row, code in enumerate(codes)])
        check([out], [wanted.swapaxes(1, 2).reshape(out.shape)], dtype)


def test_calls_of_a_decoder_take_slots_in_turn():
    """Calls that run at once must not count in the same tickets; all decoders of as many groups share them."""
    seen = []

    def run(launch):
        return lambda inputs, late: [seen.append((inputs[4].size, *late))]

    q, k = (1, 4, 1, 64), mx.zeros((1, 2, 256, 64))
    for capacity in (256, 512):
        decode = cuda_kernels.decoder(q, (1, 2, capacity, 64), "float16", DECODE_PATTERN, 0.125, Route.SPARSE, run)
        for tokens in (7, 8):
            decode(k, k, k, tokens)
    slots = [slot for *_, slot in seen]
    assert [(size, tokens) for size, tokens, _ in seen] == [(2 * cuda_catalog.DECODE_SLOTS, n) for n in (7, 8, 7, 8)]
    assert [(slot - slots[0]) % cuda_catalog.DECODE_SLOTS for slot in slots] == [0, 1, 2, 3]


def test_what_no_decoder_takes():
    options = ("float16", DECODE_PATTERN, 0.125, Route.SPARSE)
    with pytest.raises(ValueError, match="expected up to 8 queries, got 9"):
        cuda_kernels.decoder((1, 4, 9, 64), (1, 2, 256, 64), "float16", PREFILL_PATTERN, 0.125, Route.SPARSE)
    with pytest.raises(ValueError, match=r"with D of \(64, 128\), got \(1, 4, 1, 80\)"):
        cuda_kernels.decoder((1, 4, 1, 80), (1, 2, 256, 80), *options)
    with pytest.raises(ValueError, match="expected dtype bfloat16 or float16, got float32"):
        cuda_kernels.decoder((1, 4, 1, 64), (1, 2, 256, 64), "float32", *options[1:])


def test_decode_splits():
    """A block a multiprocessor at most, and no more than have 144 keys each."""
    assert cuda_catalog.decode_splits(H100, 8, 128 + 2048) == 16
    assert cuda_catalog.decode_splits(H100, 8, 500) == 4
    assert cuda_catalog.decode_splits(H100, 8, 1 << 20) == 16
    assert cuda_catalog.decode_splits(H100, 1, 1 << 20) == 64
    assert cuda_catalog.decode_splits(H100, 512, 1 << 20) == 1
    assert cuda_catalog.decode_splits(H100, 8, 1) == 1


def test_decode_launch():
    shapes = (2, 24, 3, 128), (2, 8, 512, 128)
    (kernel,) = {cuda_catalog.find("bfloat16", 128, block, H100, "decode") for block in (48, 128)}
    assert (kernel.name, kernel.suffix) == ("flux_decode_bfloat16_d128", "cubin")
    launch = cuda_catalog.decode(kernel, H100, *shapes, DECODE_PATTERN, 0.1, 512, 0)
    assert launch.blocks == (4, 8 * 2, 2)  # 9 rows of a KV head are two chunks
    parts = 4 * 8 * 2 * 2 * 8
    assert cuda_catalog.lse_offset(shapes[0], 8, 4) == parts * 130
    assert launch.output_shapes == ((2, 3, 24 * 128), (parts * 130 + 2 * 24 * 3,))
    late = [name for name, _ in kernel.scalars[len(launch.arguments) :]]
    assert late == ["kv_tokens", "slot"]
    assert dict(launch.arguments)["scale"] == np.float32(0.1)
    assert cuda_catalog.find("bfloat16", 128, 128, AMPERE, "decode").suffix == "ptx"
    assert cuda_catalog.find("bfloat16", 128, 48, H100) is None  # not for prefill


MUTATIONS = {
    "window off by one block": ("pattern.window_blocks + 1 : 0", "pattern.window_blocks : 0"),
    "sink dropped": ("return {begin < pattern.sink_span ? begin : pattern.sink_span, begin}", "return {0, begin}"),
    "own key hidden": ("return position <= query.position", "return position < query.position"),
    "a later key seen": ("return position <= query.position", "return position <= query.position + 1"),
    "last key of a piece lost": ("number < piece.end ? position", "number < piece.end - 1 ? position"),
    "a key past the end": ("number < piece.end ? position", "true ? position"),
    "no barrier before warps are merged": ("  store(part, tile);\n  __syncthreads();\n", "  store(part, tile);\n"),
    "no barrier behind the ticket": ("  __syncthreads();\n  return tile.is_last;", "  return tile.is_last;"),
    "merged by the first to come": ("gridDim.x - 1) == gridDim.x - 1;", "gridDim.x - 1) == 0;"),
    "tickets kept": ("take_ticket(ticket, gridDim.x - 1)", "take_ticket(ticket, gridDim.x + 7)"),
    "tickets of other rows": ("is_last(tickets + group, tile)", "is_last(tickets, tile)"),
    "maximum of half the keys": ("  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));\n", ""),
    "sum of half the keys": ("total += __shfl_xor_sync(kAllLanes, total, 2);", ""),
    "rows exchanged": ("__shfl_sync(kAllLanes, keep, 8 * t), __shfl_sync(kAllLanes, keep, 8 * t + 4)", "1.0f, 1.0f"),
    "route ignored": ("is_sparse ? int(q_pos", "true ? int(q_pos"),
}  # fmt: skip


def attend_with(mutation: tuple[str, str], schedule: str) -> None:
    """Check a case: rows that repeat, two turns of a warp, NaN behind the keys in use; the last of them matter most."""
    q, k, v = draw(2, 4, 2, 64), draw(2, 2, 733, 64), draw(2, 2, 733, 64, seed=1)
    k[:, :, -2:] = 0.5 * q[:, ::2]
    buffers = [mx.concatenate([x, mx.full((2, 2, 3, 64), float("nan"), k.dtype)], axis=2) for x in (k, v)]
    options = {"kv_tokens": 733, "run": HostCuda(mutation=mutation, schedule=schedule)}
    results = cuda_kernels.routed_attention(q, *buffers, (Route.FULL, Route.SPARSE), DECODE_PATTERN, **options)
    arrays = [as_float64(x) for x in (q, k, v)]
    by_row = zip(spec.full_attention(*arrays), spec.sparse_attention(*arrays, DECODE_PATTERN), strict=True)
    check(results, [np.stack([full[0], sparse[1]]) for full, sparse in by_row], "float16")


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_mistakes_in_decode_are_found(mutation):
    with pytest.raises((AssertionError, HostError)):
        [attend_with(mutation, schedule) for schedule in ("behind", "shuffled")]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decode_without_a_mistake(schedule):
    attend_with(("", ""), schedule)
