"""The CUDA kernels as functions of MLX arrays. Which calls should use them is said by `flux_mlx.kernel_policy`.

Layout `[B, H, L, D]`; keys are positions 0..S-1, queries the last L of them. Nothing here waits for the device: the
route of each batch row is read by the kernels. `run` prepares a launch; the default needs MLX's CUDA backend, the tests
pass one that executes the kernels on the host.

Prefill reads k and v in place where they are dense, as a whole cache buffer is, and MLX copies them where they are not;
so a cache gives its buffer and `kv_tokens` rather than a slice. It reads q and writes out as dense `[B, L, HQ, D]`, as
projections leave and take them. So does decode, of up to 8 queries: one kernel, of which `decoder` is the form that
costs the host least.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from flux_mlx import cuda_catalog, streaming
from flux_mlx.cuda_catalog import Device, Launch
from flux_mlx.spec import PatternConfig, Route

Prepared = Callable[[list[mx.array], Sequence[int]], list[mx.array]]  # of input arrays and late scalars: the outputs
Run = Callable[[Launch], Prepared]

FAMILIES = {"cuda": None, "cuda-portable": "portable"}  # compiled kernels that an `impl` allows; None: any
_SHARED_BYTES = 8  # `small_block_size` of MLX's CUDA allocator
_OWN_BYTES = 5 * 16384  # of what `device_array` makes: five of the allocator's pages
CACHE_STEP_TOKENS = 256  # stock caches grow by so many tokens; one that is full is dense
_HOPPER = Device(9, 0, 132, 50 << 20)  # an H100 with every multiprocessor that NVIDIA sells
_ATTRIBUTES = {"multiprocessors": 16, "l2_bytes": 38}  # CUdevice_attribute of the driver
_PLAIN = PatternConfig()


def is_available() -> bool:
    """Whether MLX has a CUDA device."""
    return mx.cuda.is_available()


@cache
def device() -> Device:
    """MLX's GPU. What MLX does not tell comes from the driver, or is that of an H100."""
    info = mx.device_info(mx.gpu)
    facts = {"multiprocessors": _HOPPER.multiprocessors, "l2_bytes": _HOPPER.l2_bytes}
    facts |= _driver_facts()
    major, minor = (int(info.get(f"compute_capability_{part}", 0)) for part in ("major", "minor"))
    return Device(major, minor, **facts)


def _driver_facts() -> dict[str, int]:
    """Attributes of the first visible CUDA device; {} where the driver cannot be asked."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    handle, value, facts = ctypes.c_int(), ctypes.c_int(), {}
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), 0):
        return {}
    for name, attribute in _ATTRIBUTES.items():
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) == 0 and value.value > 0:
            facts[name] = value.value
    return facts


def cuda_run(launch: Launch) -> Prepared:
    """Prepare a launch on the CUDA device.

    Raises:
        RuntimeError: There is no CUDA device.
    """
    kernel = launch.kernel
    if not is_available():
        raise RuntimeError(f'[{kernel.name}] impl="cuda" needs MLX with a CUDA device, and there is none.')
    x, y, z = launch.blocks
    options = {
        "name": kernel.name,
        "compiled_source": cuda_catalog.code(kernel),
        "output_shapes": list(launch.output_shapes),
        "output_dtypes": [getattr(mx, name) for name in launch.output_dtypes],
        "grid": (x * kernel.threads, y, z),
        "threadgroup": (kernel.threads, 1, 1),
        "shared_memory": kernel.shared_bytes,
        "ensure_row_contiguous": True,
    }
    scalars, call = [value for _, value in launch.arguments], mx.fast.precompiled_cuda_kernel
    return lambda inputs, late=(): call(inputs=inputs, scalars=[*scalars, *late], **options)


def rows_on_device(rows: int, row_bytes: int) -> int:
    """`rows`, or as many as an array of rows of `row_bytes` must have for MLX to keep it in the GPU's own memory.

    Up to 8 bytes go to a pool that host and GPU share: once the host has read there, the GPU's next write waits for
    the page, ten times as long as a small kernel takes. So kernels write to, and read from, larger buffers. Those that
    the host reads move to shared memory as well, and MLX gives them out again: it is best that it reads few.
    """
    return max(rows, _SHARED_BYTES // row_bytes + 1)


def device_array(values: Sequence[int]) -> mx.array:
    """The host's int32 `[B]` in the GPU's own memory, in a buffer that repeats them. Waits for the device.

    Of host memory every block would fetch them anew, over the bus: 0.2 ms for what takes 0.01. MLX gives buffers that
    were the host's out again, to kernels too: for this one any of 80 to 112 KB, which the host seldom has.
    """
    by_host = mx.array(values, mx.int32)
    by_device = mx.tile(by_host, max(2, _OWN_BYTES // by_host.nbytes))[: len(values)]
    mx.eval(by_device)
    return by_device


@lru_cache(maxsize=256)
def _route_codes(codes: tuple[int, ...]) -> mx.array:
    """Known routes as int32 `[B]` on the device, made once."""
    return device_array(codes)


def _route_of_all(route: mx.array | tuple[int, ...]) -> int:
    """The route that all rows are known to have; 0 (UNSET) if they differ or only the device knows."""
    return int(route[0]) if isinstance(route, tuple) and len(set(route)) == 1 else int(Route.UNSET)


@cache
def ticket_slots(groups: int) -> tuple[mx.array, Iterator[int]]:
    """What the blocks of decode and of the router count in: zeros of `DECODE_SLOTS` slots, and the slots in turn.

    MLX may run calls that do not depend on each other at once, so each gets another slot; a graph of MLX holds about a
    hundred calls, and graphs run one after the other.
    """
    zeros = mx.zeros(cuda_catalog.DECODE_SLOTS * groups, mx.int32) + 0
    mx.eval(zeros)
    return zeros, itertools.cycle(range(cuda_catalog.DECODE_SLOTS))


_NAMES = {getattr(mx, name): name for name in cuda_catalog.DTYPES}


def _dtype_name(x: mx.array) -> str:
    """Name of a dtype that the kernels take, "" of others."""
    return _NAMES.get(x.dtype, "")


def refusal(
    q: mx.array, k: mx.array, v: mx.array, pattern: PatternConfig, prompt_tokens: int | None, family: str | None = None
) -> str:
    """Why no kernel computes such a call on this device; "" if one does."""
    if not q.dtype == k.dtype == v.dtype:
        return f"expected q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    if k.shape != v.shape:
        return f"expected k and v of one shape, got {k.shape} and {v.shape}"
    if prompt_tokens is not None and pattern.name != "streaming":
        return f'expected pattern "streaming" in exact prefill, got "{pattern.name}"'
    return shape_refusal(tuple(q.shape), tuple(k.shape), _dtype_name(q) or str(q.dtype), pattern, family)


def _family_for(q_tokens: int, family: str | None) -> str | None:
    """Which kernels take a call of so many queries."""
    return "decode" if q_tokens <= cuda_catalog.DECODE_TOKENS else family


def shape_refusal(
    q: tuple[int, ...], k: tuple[int, ...], dtype: str, pattern: PatternConfig, family: str | None = None
) -> str:
    """The same by the shapes of q and k and the name of their dtype."""
    B, HQ, L, D = q
    if dtype not in cuda_catalog.DTYPES:
        return f"expected dtype {' or '.join(cuda_catalog.DTYPES)}, got {dtype}"
    if D not in cuda_catalog.HEAD_DIMS or k[0] != B or HQ % k[1] or k[3] != D:
        return f"expected q [B, HQ, L, D] and k [B, HKV, S, D] with D of {cuda_catalog.HEAD_DIMS}, got {q} and {k}"
    kernel = cuda_catalog.find(dtype, D, pattern.block_size, device(), _family_for(L, family))
    if kernel is None:
        return f"no compiled kernel for block size {pattern.block_size} on compute capability {device().major}"
    if kernel.family == "portable" and not cuda_catalog.fits_int32(q, k):
        return f"expected strides of less than 2**31 elements, got shapes {q} and {k}"
    return ""


def full_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float | None = None, kv_tokens: int | None = None, **options: Any
) -> tuple[mx.array, mx.array]:
    """Causal attention.

    Args:
        q: `[B, HQ, L, D]`, bfloat16 or float16; D one of `cuda_catalog.HEAD_DIMS`.
        k: `[B, HKV, capacity, D]`, the dtype of q.
        v: As k.
        scale: Multiplier of the scores, D**-0.5 by default.
        kv_tokens: S: keys in use; all of the buffer by default.
        options: `family` and `run` as in `routed_attention`.

    Returns:
        (out `[B, HQ, L, D]`, lse float32 `[B, HQ, L]`, natural log).

    Raises:
        ValueError: Shapes or dtypes that the kernels do not take.
        RuntimeError: No CUDA device.
    """
    return routed_attention(q, k, v, (int(Route.FULL),), _PLAIN, scale=scale, kv_tokens=kv_tokens, **options)


def sparse_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    pattern: PatternConfig,
    *,
    prompt_tokens: int | None = None,
    scale: float | None = None,
    kv_tokens: int | None = None,
    **options: Any,
) -> tuple[mx.array, mx.array]:
    """Causal attention restricted to `pattern` (`flux_mlx.spec.visible`), skipping what is hidden.

    Args:
        pattern: Which keys a query sees; triangle and xattention in their decode, streaming, only.
        prompt_tokens: Length of the whole prompt in exact prefill; None (chunked calls, decode) means streaming.
        The others, the results and the errors as in `full_attention`.
    """
    sizes = {"prompt_tokens": prompt_tokens, "scale": scale, "kv_tokens": kv_tokens}
    return routed_attention(q, k, v, (int(Route.SPARSE),), pattern, **sizes, **options)


def routed_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    route: mx.array | tuple[int, ...],
    pattern: PatternConfig,
    *,
    prompt_tokens: int | None = None,
    scale: float | None = None,
    kv_tokens: int | None = None,
    family: str | None = None,
    run: Run = cuda_run,
) -> tuple[mx.array, mx.array]:
    """Full or sparse attention by the route of each batch row, read by the kernel: no host synchronisation.

    Args:
        route: int32 `[B]`, codes of `flux_mlx.spec.Route`, or a tuple of B of them, or of one for all rows.
        family: "hopper" or "portable": which kernels of prefill; the first that fits by default.
        run: Prepares the launch.
        The others, the results and the errors as in `sparse_attention`.
    """
    if problem := refusal(q, k, v, pattern, prompt_tokens, family):
        raise ValueError(f"[cuda_kernels] {problem}.")
    tokens = k.shape[2] if kv_tokens is None else kv_tokens
    if not q.shape[2] <= tokens <= k.shape[2]:
        raise ValueError(
            f"[cuda_kernels] expected L <= kv_tokens <= keys in the buffer, got {q.shape[2]}, {tokens}, {k.shape[2]}."
        )
    of_all = _route_of_all(route)
    is_sparse = of_all == Route.SPARSE
    if isinstance(route, tuple):
        route = _route_codes(route * q.shape[0] if len(route) == 1 else route)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_sparse and _is_worth_compacting(tokens, k.shape[2], q.shape[2], pattern):
        k, v = (streaming.compact(x[:, :, :tokens], pattern, q.shape[2]) for x in (k, v))
        tokens = k.shape[2]
    if q.shape[2] <= cuda_catalog.DECODE_TOKENS:
        return _decode(q, k, v, route, pattern, scale, tokens, of_all, run)
    return _prefill(q, k, v, route, pattern, scale, tokens, is_sparse, family, run)


@lru_cache(maxsize=64)
def decoder(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype_name: str, pattern: PatternConfig, scale: float,
    route: Route | tuple[int, ...], run: Run = cuda_run,
) -> Callable[[mx.array, mx.array, mx.array, int], mx.array]:  # fmt: skip
    """Decode of one shape as a function that does next to nothing on the host; made once for all layers.

    Args:
        q_shape: `[B, HQ, L, D]`, L of 8 at most.
        k_shape: `[B, HKV, capacity, D]` of the whole buffers of the cache.
        dtype_name: "bfloat16" or "float16".
        pattern, scale: As in `sparse_attention`.
        route: Of all rows, or of each.
        run: Prepares the launch.

    Returns:
        A function of q `[B, HQ, L, D]`, the buffers k and v, and kv_tokens: out `[B, L, HQ * D]`.

    Raises:
        ValueError: No kernel takes such calls on this device.
    """
    B, _, L, _ = q_shape
    if L > cuda_catalog.DECODE_TOKENS:
        raise ValueError(f"[decoder] expected up to {cuda_catalog.DECODE_TOKENS} queries, got {L}.")
    if problem := shape_refusal(q_shape, k_shape, dtype_name, pattern):
        raise ValueError(f"[decoder] {problem}.")
    codes = tuple(int(code) for code in route) if isinstance(route, tuple) else (int(route),) * B
    prepared = run(_decode_launch(q_shape, k_shape, dtype_name, pattern, scale, _route_of_all(codes)))
    codes, (tickets, slots) = _route_codes(codes), ticket_slots(cuda_catalog.decode_groups(q_shape, k_shape[1]))

    def decode_one(q: mx.array, k: mx.array, v: mx.array, kv_tokens: int) -> mx.array:
        return prepared([q, k, v, codes, tickets], (kv_tokens, next(slots)))[0]

    def decode_some(q: mx.array, k: mx.array, v: mx.array, kv_tokens: int) -> mx.array:
        return decode_one(q.swapaxes(1, 2), k, v, kv_tokens)

    return decode_one if L == 1 else decode_some


def _is_worth_compacting(tokens: int, capacity: int, q_tokens: int, pattern: PatternConfig) -> bool:
    """Whether k is likely a slice that MLX would copy, and what the queries see is much less of it."""
    live = q_tokens + pattern.window_span + pattern.sink_span
    return tokens == capacity and tokens % CACHE_STEP_TOKENS != 0 and tokens > 2 * live


def _prefill(
    q: mx.array, k: mx.array, v: mx.array, route: mx.array, pattern: PatternConfig, scale: float, kv_tokens: int,
    is_sparse: bool, family: str | None, run: Run,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    kernel = cuda_catalog.find(_dtype_name(q), q.shape[3], pattern.block_size, device(), family)
    shapes = tuple(q.shape), tuple(k.shape)
    launch = cuda_catalog.prefill(kernel, device(), *shapes, kv_tokens, pattern, scale, may_be_full=not is_sparse)
    out, lse = run(launch)([q.swapaxes(1, 2), k, v, route], ())[:2]
    return out.swapaxes(1, 2), lse


def _decode_launch(
    q: tuple[int, ...], k: tuple[int, ...], dtype: str, pattern: PatternConfig, scale: float, route_of_all: int
) -> Launch:
    """The same at every length of a cache within its capacity: so are the splits, and with them the bits of out."""
    kernel = cuda_catalog.find(dtype, q[3], pattern.block_size, device(), "decode")
    span = pattern.window_span + pattern.sink_span + q[2] - 1  # of all L queries
    visible = span if route_of_all == Route.SPARSE else k[2]
    return cuda_catalog.decode(kernel, device(), q, k, pattern, scale, visible, route_of_all)


def _decode(
    q: mx.array, k: mx.array, v: mx.array, route: mx.array, pattern: PatternConfig, scale: float, kv_tokens: int,
    route_of_all: int, run: Run,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    (B, HQ, L, D), kv_heads = q.shape, k.shape[1]
    launch = _decode_launch(tuple(q.shape), tuple(k.shape), _dtype_name(q), pattern, scale, route_of_all)
    tickets, slots = ticket_slots(cuda_catalog.decode_groups(tuple(q.shape), kv_heads))
    out, work = run(launch)([q.swapaxes(1, 2), k, v, route, tickets], (kv_tokens, next(slots)))
    low = cuda_catalog.lse_offset(tuple(q.shape), kv_heads, launch.blocks[0])
    return out.reshape(B, L, HQ, D).swapaxes(1, 2), work[low : low + B * HQ * L].reshape(B, HQ, L)
