"""The router's CUDA kernels on the host shim: against the specification, with planted mistakes, as models call them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("triton")

import flux_mlx
from flux_mlx import cuda_catalog, cuda_kernels, cuda_router, kernel_policy, spec
from flux_mlx.kernel_self_test import Variant, self_test
from flux_mlx.models import routed_layers
from flux_mlx.router_training import TrainableAffine, make_trainable
from flux_mlx.spec import Route, RouterConfig
from metal_kernels.catalog import ROUTER_PARAMETERS
from parity_tests.backends import NUMPY
from parity_tests.cuda_cases import AMPERE, H100
from parity_tests.host_shim.cuda_source import HostCuda
from parity_tests.host_shim.run import SCHEDULES, HostError
from parity_tests.test_router_parity import RouterCase
from parity_tests.tiny_models import VOCABULARY, flux_model, prompt
from parity_tests.tolerances import NEAR_TIE, Reference, network_reference

HEAD_DIMS = (8, 16, 24, 80)


@pytest.fixture(autouse=True)
def _ampere(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "device", lambda: AMPERE)


def parameters_of(weights: dict[str, np.ndarray]) -> list[mx.array]:
    return [mx.array(weights[name]) for name in ROUTER_PARAMETERS]


def rows_of(case: RouterCase, run: HostCuda) -> tuple[mx.array, mx.array, tuple[tuple[int, int], ...]]:
    """What a cache holds of the case's prompts, row by row: NaN where it holds nothing."""
    queries, P = mx.array(case.queries()).astype(getattr(mx, case.dtype)), case.pool_tokens
    held = min(P, case.tokens)
    ends = [cuda_router.mean_over_heads(row, run=run) for row in queries]
    nothing = mx.full((P - held, case.head_dim), float("nan"))
    prefix = mx.stack([mx.concatenate([rows[:P], nothing]) for rows in ends])
    recent = mx.stack([mx.concatenate([nothing, rows[-P:]]) for rows in ends])
    return prefix, recent, ((held, held),) * case.batch


def check(case: RouterCase, run: HostCuda) -> int:
    """Rows, logits and decisions against the specification; the number of near-ties."""
    queries, weights = case.queries(), case.weights()
    prefix, recent, counts = rows_of(case, run)
    held = counts[0][0]
    means, baseline = queries.mean(axis=2, dtype=float), queries.mean(axis=2, dtype=np.float32)
    last = slice(case.pool_tokens - held, None)
    for part, rows in ((slice(None, held), prefix[:, :held]), (slice(-held, None), recent[:, last])):
        Reference(means[:, part], baseline[:, part], "float32").check("rows", np.array(rows))
    codes, logits = cuda_router.decide(prefix, recent, counts, parameters_of(weights), run=run)
    oracle = spec.route_logits(weights, spec.pool_queries(queries, case.pool_tokens))
    pooled = NUMPY.router.pool_queries(queries, case.dtype, case.pool_tokens)
    network_reference(oracle, NUMPY.router.route_logits(weights, pooled)).check("route logits", np.array(logits))
    ties = 0
    for margin, got, expected in zip(oracle[:, 1] - oracle[:, 0], codes.tolist(), spec.decide(oracle), strict=True):
        ties += abs(margin) < NEAR_TIE
        assert abs(margin) < NEAR_TIE or got == expected
    return ties


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_against_the_specification(data):
    pool = data.draw(st.sampled_from([1, 3, 10]))
    case = RouterCase(
        batch=data.draw(st.integers(1, 3)),
        tokens=data.draw(st.integers(1, 3 * pool)),
        heads=data.draw(st.sampled_from([1, 4, 9, 33])),
        head_dim=data.draw(st.sampled_from(HEAD_DIMS)),
        pool_tokens=pool,
        dtype=data.draw(st.sampled_from(cuda_catalog.ROUTER_DTYPES)),
        seed=data.draw(st.integers(0, 2**32 - 1)),
    )
    check(case, HostCuda(schedule=data.draw(st.sampled_from(SCHEDULES))))


@pytest.mark.parametrize(
    ("head_dim", "heads", "dtype"),
    [(64, 9, "float16"), (96, 24, "bfloat16"), (128, 32, "bfloat16"), (256, 5, "float32")],
)
def test_real_sizes(head_dim, heads, dtype):
    assert check(RouterCase(1, 203, heads, head_dim, 100, dtype, 7), HostCuda()) == 0


def test_within_memory():
    """Also where a head dim leaves threads without a part."""
    check(RouterCase(2, 7, 3, 20, 4, "bfloat16", 3), HostCuda(sanitize=True))


@pytest.mark.parametrize("schedule", ["behind", "shuffled"])
def test_logits_do_not_depend_on_the_order_of_blocks(schedule):
    case = RouterCase(3, 11, 4, 16, 5, "float16", 1)
    rows, parameters = rows_of(case, HostCuda()), parameters_of(case.weights())
    both = [cuda_router.decide(*rows, parameters, run=HostCuda(schedule=how))[1] for how in ("fair", schedule)]
    assert mx.array_equal(*both).item()


def last_layer(low: float, high: float) -> list[mx.array]:
    """Parameters of a router for D = 8 whose logits are these, whatever it reads."""
    shapes = RouterConfig.parameter_shapes(8)
    weights = {name: mx.zeros(shapes[name]) for name in ROUTER_PARAMETERS}
    return list((weights | {"head.4.bias": mx.array(np.float32([low, high]))}).values())


@pytest.mark.parametrize(
    ("low", "high", "route"),
    [
        (3, 3, Route.SPARSE),
        (3, np.nextafter(np.float32(3), np.float32(9)), Route.FULL),
        (np.nan, 3, Route.FULL),
        (3, np.nan, Route.FULL),
    ],
)
def test_ties_are_sparse_and_what_is_no_number_is_full(low, high, route):
    rows = mx.zeros((1, 2, 8))
    codes, logits = cuda_router.decide(rows, rows, ((2, 2),), last_layer(low, high), run=HostCuda())
    np.testing.assert_array_equal(np.array(logits), np.float32([[low, high]]))
    assert codes.dtype == mx.int32
    assert codes.tolist() == [route]


def test_a_row_that_pooled_nothing():
    """A batch holds it beside rows that did: its decision is not used, and must not fault."""
    rows = mx.zeros((2, 3, 8))
    _, logits = cuda_router.decide(rows, rows, ((0, 0), (3, 3)), last_layer(1, 2), run=HostCuda(sanitize=True))
    np.testing.assert_array_equal(np.array(logits), [[1, 2]] * 2)


def test_what_the_kernels_do_not_take():
    rows, parameters = mx.zeros((1, 2, 8)), last_layer(0, 1)
    with pytest.raises(ValueError, match=r"expected queries \[T, HQ, D\], got shape \(2, 8\)"):
        cuda_router.mean_over_heads(rows[0])
    with pytest.raises(ValueError, match="expected D a multiple of 4 up to 256, got 260"):
        cuda_router.mean_over_heads(mx.zeros((2, 2, 260)))
    with pytest.raises(ValueError, match=r"expected queries of dtype .*, got int32"):
        cuda_router.mean_over_heads(mx.zeros((2, 2, 8), mx.int32))
    for counts in (((3, 2),), ((2, 2),) * 2, ((0, -1),)):
        with pytest.raises(ValueError, match="B pairs of counts up to P"):
            cuda_router.decide(rows, rows, counts, parameters)
    with pytest.raises(ValueError, match="expected float32 prefix and recent"):
        cuda_router.decide(rows.astype(mx.float16), rows, ((2, 2),), parameters)
    for wrong in (parameters[:-1], [x.astype(mx.float16) for x in parameters], parameters[::-1]):
        with pytest.raises(ValueError, match="expected float32 parameters of shapes"):
            cuda_router.decide(rows, rows, ((2, 2),), wrong)


def test_launches():
    """A block a token; on an H100 half of the multiprocessors share the encoder and a quarter the head."""
    pool = cuda_router._pool_launch(H100, "bfloat16", (200, 32, 128))
    assert (pool.kernel.suffix, pool.blocks, pool.output_shapes) == ("cubin", (200, 1, 1), ((200, 128),))
    encode, head = cuda_router._network_launches(H100, (2, 100, 128))
    assert (encode.blocks, head.blocks) == ((64, 2, 1), (32, 2, 1))
    assert [name for name, _ in head.kernel.scalars[len(head.arguments) :]] == ["slot"]
    assert encode.output_shapes == ((2, 64, 256),)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_kernels_write_to_the_gpu_s_own_memory_only(batch):
    """MLX keeps arrays of up to 8 bytes in a pool that host and GPU share; a slice is where the whole array is."""
    launches = []

    def run(launch):
        def call(inputs, late):
            launches.append(launch)
            return [
                mx.zeros(x, getattr(mx, y)) for x, y in zip(launch.output_shapes, launch.output_dtypes, strict=True)
            ]

        return call

    rows = mx.zeros((batch, 2, 8))
    cuda_router.mean_over_heads(mx.zeros((1, 2, 4)), run=run)
    codes, logits = cuda_router.decide(rows, rows, ((2, 1),) * batch, last_layer(0, 1), run=run)
    assert [launch.kernel.family for launch in launches] == ["router_pool", "router_encode", "router_decide"]
    for launch in launches:
        for shape, dtype in zip(launch.output_shapes, launch.output_dtypes, strict=True):
            assert np.prod(shape) * getattr(mx, dtype).size > 8
    assert (codes.shape, logits.shape) == ((batch,), (batch, 2))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_the_host_gives_to_kernels_is_copied_to_a_buffer_that_never_was_the_host_s(monkeypatch, batch):
    array, made = mx.array, []
    with monkeypatch.context() as patch:
        patch.setattr(mx, "array", lambda *args: made.append(array(*args)) or made[-1])
        given = cuda_kernels._route_codes.__wrapped__((2,) * batch)
    np.testing.assert_array_equal(np.array(given), np.full(batch, 2, np.int32))
    assert given.dtype == mx.int32
    assert len(made) == 1
    assert made[0].nbytes == 4 * batch


@pytest.mark.parametrize("counts", [((2, 2), (2, 2), (2, 2)), ((3, 1), (2, 3), (0, 0))])
def test_rows_of_unlike_counts_are_encoded_one_by_one(monkeypatch, counts):
    weights = RouterCase(3, 9, 2, 16, 3, "float32", 2).weights()
    prefix, recent = (mx.array(np.random.default_rng(i).standard_normal((3, 3, 16), np.float32)) for i in range(2))
    launched: Counter[str] = Counter()

    def run(launch):
        launched[launch.kernel.family] += 1
        return HostCuda()(launch)

    codes, logits = cuda_router.decide(prefix, recent, counts, parameters_of(weights), run=run)
    assert launched == {"router_encode": 1 if len(set(counts)) == 1 else 3, "router_decide": 1}
    for b, (n, m) in enumerate(counts):
        ends = np.concatenate([np.array(prefix[b, :n]), np.array(recent[b, 3 - m :])])
        expected = spec.route_logits(weights, ends.sum(axis=0, keepdims=True, dtype=float) / max(1, n + m))
        np.testing.assert_allclose(np.array(logits[b : b + 1]), expected, atol=1e-4)
        assert [Route(codes[b].item())] == spec.decide(expected)


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 64), ("float32", 80)])
def test_self_tests(dtype, head_dim):
    assert self_test(Variant("router", dtype, head_dim, backend="cuda"), HostCuda()) == ""


@pytest.mark.parametrize(("family", "output"), [("router_pool", 0), ("router_decide", 0), ("router_decide", 1)])
def test_a_self_test_sees_a_wrong_result(family, output):
    def wrong(launch):
        def call(inputs, late):
            results = HostCuda()(launch)(inputs, late)
            if launch.kernel.family == family:
                results[output] = 3 - results[output] if results[output].dtype == mx.int32 else 1.001 * results[output]
            return results

        return call

    assert "differs" in self_test(Variant("router", "float16", 16, backend="cuda"), wrong)


@pytest.mark.skipif(cuda_kernels.is_available(), reason="this machine has a CUDA device")
def test_mlx_takes_the_calls(monkeypatch):
    """MLX without CUDA refuses a launch only after its arguments have the right types."""
    monkeypatch.setattr(cuda_kernels, "is_available", lambda: True)
    rows = mx.zeros((1, 2, 8))
    with pytest.raises(RuntimeError, match="No CUDA back-end"):
        cuda_router.mean_over_heads(rows)
    with pytest.raises(RuntimeError, match="No CUDA back-end"):
        cuda_router.decide(rows, rows, ((2, 2),), last_layer(0, 1))
    encoded = mx.zeros((1, 4, 16))
    _, head = cuda_router._network_launches(AMPERE, (1, 2, 8))
    tickets, slots = cuda_kernels.ticket_slots(1)
    with pytest.raises(RuntimeError, match="No CUDA back-end"):
        cuda_kernels.cuda_run(head)([encoded, *last_layer(0, 1)[3:], tickets], (next(slots),))


@pytest.fixture
def device(monkeypatch):
    """Pretend that there is a CUDA device whose kernels are right, and that nothing was counted."""
    monkeypatch.setattr(kernel_policy, "RECORD", kernel_policy.Record())
    monkeypatch.setattr(cuda_kernels, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(kernel_policy, "self_test", lambda variant, run: "")


def test_the_policy(device, monkeypatch):
    use = kernel_policy.use_cuda_router
    assert use("bfloat16", 128)
    assert not use("bfloat16", 130)
    with kernel_policy.without("router"):
        assert not use("bfloat16", 128)
    assert use("float32", 64)
    monkeypatch.setattr(kernel_policy, "self_test", lambda variant, run: "wrong")
    with pytest.warns(RuntimeWarning, match="wrong"):
        assert not use("float16", 128)
    assert kernel_policy.RECORD.calls == {
        "cuda": 2, "ops: unsupported dtype or head dim": 1, "ops: router switched off": 1, "ops: self-test failed": 1,
    }  # fmt: skip
    monkeypatch.setattr(cuda_kernels, "device", lambda: cuda_catalog.Device(7, 5, 40, 1 << 20))
    assert kernel_policy.router_variant("float16", 64) is None


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """Routers run by kernels, on the host; attention does not. What was launched."""
    seen: Counter[str] = Counter()

    def run(launch):
        seen[launch.kernel.family] += 1
        return HostCuda()(launch)

    monkeypatch.setattr(kernel_policy, "use_cuda_router", lambda *_: "router" not in kernel_policy.RECORD.switched_off)
    for name in ("mean_over_heads", "decide"):
        monkeypatch.setattr(cuda_router, name, partial(getattr(cuda_router, name), run=run))
    return seen


def exact(model: Any) -> list[Any]:
    cache = model.make_cache()
    for turn, tokens in enumerate((70, 30)):  # the second is pooled with the first one's start
        flux_mlx.prefill(model, mx.array(prompt(tokens, turn)), cache, prefill_step_size=32)
    return cache


def chunked(model: Any) -> list[Any]:
    cache, tokens = model.make_cache(), mx.array([prompt(50, 3), prompt(50, 4)]) % VOCABULARY
    for first in (0, 20, 29):  # the last but one is too short to be pooled
        mx.eval(model(tokens[:, first : (first + 20) if first != 20 else 29], cache=cache))
    return cache


@pytest.mark.parametrize("fill", [exact, chunked])
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_models_route_alike_by_kernels_and_by_operations(launched, fill, family):
    model = flux_model(family)
    with kernel_policy.without("router"):
        expected = fill(model)
        taken = flux_mlx.routes(expected)
    assert not launched
    cache = fill(model)
    assert flux_mlx.routes(cache) == taken
    decisions = launched["router_decide"]
    assert decisions == launched["router_encode"] == len(cache) * 2
    pools = 4 * len(cache) if fill is chunked else 2 * len(cache)
    if fill is exact and family == "qwen3":  # either end apart, but in the last layer
        pools += 2 * (len(cache) - 1)
    assert launched["router_pool"] == pools
    for entry, other in zip(cache, expected, strict=True):
        np.testing.assert_allclose(np.array(entry.pooled()), np.array(other.pooled()), atol=1e-5)


def test_routers_that_were_changed_are_left_to_operations(launched):
    """Wrapped by LoRA, or of another dtype; opened to trainers they are still what they were."""
    model = flux_model()
    attns = routed_layers(model)
    make_trainable(attns.values())
    attns[1].router.head[0] = attns[1].router.head[0].to_lora()
    attns[2].router.encoder[0].weight = attns[2].router.encoder[0].weight.astype(mx.float16)
    assert isinstance(attns[0].router.head[0], TrainableAffine)
    cache = exact(model)
    assert all(route in (Route.FULL, Route.SPARSE) for layer in flux_mlx.routes(cache) for route in np.ravel(layer))
    assert launched["router_decide"] == 2 * (len(cache) - 2)


MUTATIONS = {
    "a head lost": ("if (first + i * lanes + lane < heads)", "if (first + i * lanes + lane < heads - 1)"),
    "one turn of heads": ("first += kHeadsAtOnce * lanes", "first += heads"),
    "one turn of rows": ("first += kRowsAtOnce * part.lanes", "first += count"),
    "one turn of a product": ("i += 128", "i += inputs"),
    "the last head twice": ("if (first + i * lanes + lane < heads)", "if (true)"),
    "sum of the heads": ("const float count = float(heads)", "const float count = 1.0f"),
    "no barrier before heads are joined": ("quad, lane, lanes);\n  __syncthreads();", "quad, lane, lanes);"),
    "last pooled token twice": ("if (first + i * part.lanes + part.lane < count)", "if (true)"),
    "recent from its start": ("int64_t(pool_tokens - recent_tokens)", "int64_t(0)"),
    "prefix for recent": ("add_rows(recent + first", "add_rows(prefix + first"),
    "as many recent rows as of the prefix": ("* channels, recent_tokens", "* channels, prefix_tokens"),
    "rows of another row": ("int64_t(blockIdx.y) * pool_tokens * channels", "int64_t(0)"),
    "mean over the prefix": ("const int tokens = prefix_tokens + recent_tokens", "const int tokens = prefix_tokens"),
    "no barrier before parts are joined": ("= sum;\n  __syncthreads();\n  float4 total", "= sum;\n  float4 total"),
    "a part lost": ("lane < part.lanes; lane++", "lane < part.lanes - 1; lane++"),
    "no barrier before units": (
        "__syncthreads();\n  const int warp = threadIdx.x / 32, u", "const int warp = threadIdx.x / 32, u",
    ),
    "no barrier behind units": ("bias[unit]);\n  }\n  __syncthreads();", "bias[unit]);\n  }"),
    "half a product": ("int distance = 16", "int distance = 8"),
    "ReLU for SiLU": ("return x / (1.0f + expf(-x))", "return fmaxf(x, 0.0f)"),
    "units of another block": ("units + blockIdx.x * kUnits;\n    float sum", "units;\n    float sum"),
    "first bias left out": ("silu(sum + bias[unit])", "silu(sum)"),
    "SiLU behind the encoder": ("2 * channels, false, desk", "2 * channels, true, desk"),
    "no SiLU before the last layer": ("gridDim.x, channels, true, desk", "gridDim.x, channels, false, desk"),
    "encoder of another row": ("encoded + row * encoder_blocks", "encoded + 0 * encoder_blocks"),
    "merged by the first to come": ("gridDim.x - 1) == gridDim.x - 1;", "gridDim.x - 1) == 0;"),
    "tickets kept": ("take_ticket(ticket, gridDim.x - 1)", "take_ticket(ticket, gridDim.x + 7)"),
    "tickets of other rows": ("gridDim.y + row, desk", "gridDim.y, desk"),
    "work of other rows": ("work += row * gridDim.x * channels", "work += 0"),
    "logits swapped": ("logits[0] = desk.logits[0]", "logits[0] = desk.logits[1]"),
    "a tie is full": ("desk.logits[0] >= desk.logits[1]", "desk.logits[0] > desk.logits[1]"),
    "what is no number is sparse": ("desk.logits[0] >= desk.logits[1]", "!(desk.logits[0] < desk.logits[1])"),
    "biases prefetched past their end": ("if (first < count) {", "if (first < count + 999) {"),
    "prefetch past the end": ("i < kUnits * inputs; i += kThreads", "i < 9999 * inputs; i += kThreads"),
}  # fmt: skip


def decide_with(mutation: tuple[str, str], schedule: str) -> None:
    """Check many heads, many channels and many rows (several turns of a thread); rows that hold less; alike logits."""
    run = HostCuda(mutation=mutation, schedule=schedule)
    check(RouterCase(1, 2, 50, 80, 1, "float16", 5), run)
    rows = mx.array(np.random.default_rng(0).standard_normal((1, 2100, 8)), mx.float32)
    parameters = RouterCase(1, 1, 1, 8, 1, "float32", 5).weights()
    logits = cuda_router.decide(rows, rows, ((2100, 0),), parameters_of(parameters), run=run)[1]
    expected = spec.route_logits(parameters, np.array(rows).mean(axis=1, dtype=float))
    np.testing.assert_allclose(np.array(logits), expected, rtol=1e-4, atol=1e-4)
    case = RouterCase(2, 9, 2, 8, 6, "float16", 5)
    check(case, run)
    prefix, recent, _ = rows_of(case, HostCuda())
    prefix[1, 3:], recent[1, :4] = float("nan"), float("nan")
    logits = cuda_router.decide(prefix, recent, ((6, 6), (3, 2)), parameters_of(case.weights()), run=run)[1]
    pooled = [mx.concatenate(rows).mean(axis=0) for rows in ((prefix[0], recent[0]), (prefix[1, :3], recent[1, 4:]))]
    expected = spec.route_logits(case.weights(), np.array(mx.stack(pooled)))
    np.testing.assert_allclose(np.array(logits), expected, rtol=1e-4, atol=1e-4)
    for high in (3.0, float("nan")):
        codes, _ = cuda_router.decide(prefix, recent, ((6, 6), (3, 2)), last_layer(3.0, high), run=run)
        assert codes.tolist() == [Route.SPARSE if high == 3.0 else Route.FULL] * 2


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_mistakes_are_found(mutation):
    with pytest.raises((AssertionError, HostError)):
        [decide_with(mutation, schedule) for schedule in ("behind", "shuffled")]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_mistake(schedule):
    decide_with(("", ""), schedule)
