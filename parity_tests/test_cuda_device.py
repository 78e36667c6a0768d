"""The CUDA kernels inside MLX on a real device; skipped where there is none."""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np
import pytest

import flux_mlx
from flux_mlx import attention, cuda_catalog, cuda_kernels, cuda_router, doctor, kernel_policy, kernel_self_test
from flux_mlx.models import routed_layers
from flux_mlx.router import LayerRouter
from flux_mlx.router_decision import Decision
from flux_mlx.spec import PatternConfig, Route, RouterConfig
from parity_tests.tiny_models import flux_model, prompt
from parity_tests.token_by_token import ON_DEVICES, by_steps_and_by_own_calls

if not cuda_kernels.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PATTERN = PatternConfig(block_size=128, sink_tokens=128, window_tokens=256)


def draw(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.random.normal(shape, dtype)


@pytest.mark.parametrize("variant", doctor.all_variants(), ids=str)
def test_self_test(variant):
    assert kernel_self_test.self_test(variant) == ""


@pytest.mark.parametrize("q_tokens", [1, 8, 200])
def test_a_sliced_cache_and_its_buffer_give_the_same_bits(q_tokens):
    q, keys, values = draw(2, 8, q_tokens, 128), draw(2, 2, 1024, 128), draw(2, 2, 1024, 128)
    sliced = cuda_kernels.sparse_attention(q, keys[:, :, :900], values[:, :, :900], PATTERN)[0]
    whole = cuda_kernels.sparse_attention(q, keys, values, PATTERN, kv_tokens=900)[0]
    assert mx.array_equal(sliced, whole).item()


def test_a_decoder_gives_the_bits_of_the_public_function_call_by_call_and_at_once():
    keys, values = draw(1, 2, 1024, 128), draw(1, 2, 1024, 128)
    queries = [draw(1, 8, 1, 128) for _ in range(64)]
    decode = cuda_kernels.decoder((1, 8, 1, 128), (1, 2, 1024, 128), "bfloat16", PATTERN, 128**-0.5, Route.SPARSE)
    wanted = []
    for q in queries:
        wanted.append(cuda_kernels.sparse_attention(q, keys, values, PATTERN, kv_tokens=900)[0].reshape(1, 1, -1))
        mx.eval(wanted[-1])
    for _ in range(20):  # more calls than there are slots
        found = [decode(q, keys, values, 900) for q in queries]
        mx.eval(found)
        assert mx.array_equal(mx.stack(found), mx.stack(wanted)).item()


def test_decode_beside_stock_kernels_of_the_same_graph():
    """Graphs of one shape, in which stock attention and ours take each other's place."""
    k, v, q = draw(1, 2, 512, 64), draw(1, 2, 512, 64), draw(1, 8, 1, 64)
    decode = cuda_kernels.decoder((1, 8, 1, 64), (1, 2, 512, 64), "bfloat16", PATTERN, 0.125, Route.SPARSE)

    def ours(x: mx.array) -> mx.array:
        return decode(x, k, v, 512).reshape(q.shape)

    def stock(x: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(x, k, v, scale=0.125)

    def row(*calls) -> np.ndarray:
        x = q
        for call in calls:
            x = call(x * 2)
        return np.array(x.astype(mx.float32))

    first = row(ours, ours, stock), row(stock, ours, ours), row(ours, stock, ours)
    for _ in range(3):
        again = row(ours, ours, stock), row(stock, ours, ours), row(ours, stock, ours)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def is_shared_with_the_host(x: mx.array) -> bool:
    """Whether the memory of `x` is managed, as MLX makes what the host writes or reads."""
    source = "if (threadIdx.x == 0) address[0] = reinterpret_cast<unsigned long long>(x);"
    where = mx.fast.cuda_kernel("where_is", ["x"], ["address"], source, ensure_row_contiguous=False)
    (address,) = where(
        inputs=[x], output_shapes=[(1,)], output_dtypes=[mx.uint64], grid=(32, 1, 1), threadgroup=(32, 1, 1)
    )
    flag = ctypes.c_uint(2)
    is_managed = 8  # CU_POINTER_ATTRIBUTE_IS_MANAGED
    assert not ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(flag), is_managed, ctypes.c_uint64(address.item())
    )
    return bool(flag.value)


def test_what_every_block_reads_lies_in_the_gpu_s_own_memory():
    """Also where MLX has buffers of that size at hand that were the host's."""
    was_the_host_s = [mx.array([i, i, i, i], mx.int32) for i in range(8)]
    assert is_shared_with_the_host(mx.array([1, 2, 3, 4], mx.int32))
    del was_the_host_s
    made = [cuda_kernels.device_array((i, i + 1)) for i in range(4)]
    assert not any(map(is_shared_with_the_host, made))
    assert [x.tolist() for x in made] == [[i, i + 1] for i in range(4)]


@pytest.mark.parametrize("q_tokens", [1, 200])
def test_routes_of_the_device_and_of_the_host_give_the_same_bits(q_tokens):
    q, k, v = draw(2, 8, q_tokens, 128), draw(2, 2, 900, 128), draw(2, 2, 900, 128)
    codes = (int(Route.SPARSE), int(Route.FULL))
    by_host = cuda_kernels.routed_attention(q, k, v, codes, PATTERN)
    by_device = cuda_kernels.routed_attention(q, k, v, mx.array(codes, mx.int32), PATTERN)
    assert all(mx.array_equal(a, b).item() for a, b in zip(by_host, by_device, strict=True))


def test_sixty_four_thousand_tokens_agree_with_stock():
    q, k, v = (draw(1, heads, 65536, 128) for heads in (4, 1, 1))
    out = attention.full_attention(q, k, v, impl="cuda")
    stock = attention.full_attention(q, k, v, impl="ops")
    assert mx.abs(out - stock).max().item() < kernel_self_test.TOLERANCE["bfloat16"]


def test_gradients_are_those_of_operations():
    q, k, v = (draw(1, heads, 700, 64, dtype=mx.float16) for heads in (2, 1, 1))

    def gradient(impl: str) -> np.ndarray:
        loss = mx.grad(lambda x: attention.sparse_attention(x, k, v, PATTERN, impl=impl).astype(mx.float32).sum())
        return np.array(loss(q).astype(mx.float32))

    np.testing.assert_allclose(gradient("cuda"), gradient("ops"), rtol=2e-3, atol=1e-5)  # float16, sums in any order


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 128), ("float16", 64), ("float32", 96)])
def test_a_router_agrees_with_operations_call_by_call_and_at_once(dtype, head_dim):
    """More calls than there are slots of tickets; three batch rows, one of which pooled less."""
    prefix, recent = (mx.random.normal((3, 100, head_dim)) for _ in range(2))
    routers = [LayerRouter(head_dim, RouterConfig(), seed) for seed in range(40)]
    for router in routers:
        router.head[-1].weight = mx.random.normal(router.head[-1].weight.shape)
    counts = ((100, 100), (100, 100), (31, 7))
    pooled = [mx.concatenate([prefix[b, :n], recent[b, 100 - m :]]).mean(axis=0) for b, (n, m) in enumerate(counts)]
    wanted = mx.stack([router(mx.stack(pooled)) for router in routers])
    alone = []
    for router in routers:
        alone.append(cuda_router.decide(prefix, recent, counts, router.affine_parameters()))
        mx.eval(alone[-1])
    codes, logits = (mx.stack(parts) for parts in zip(*alone, strict=True))
    assert mx.allclose(logits, wanted, rtol=1e-2, atol=1e-2).item()  # operations round float32 to TF32
    for _ in range(30):
        found = [cuda_router.decide(prefix, recent, counts, router.affine_parameters()) for router in routers]
        mx.eval(found)
        for got, expected in zip(zip(*found, strict=True), (codes, logits), strict=True):
            assert mx.array_equal(mx.stack(got), expected).item()
    queries = mx.random.normal((200, 32, head_dim)).astype(getattr(mx, dtype))
    by_kernel, by_operations = cuda_router.mean_over_heads(queries), queries.astype(mx.float32).mean(axis=1)
    assert mx.allclose(by_kernel, by_operations, atol=1e-5).item()


def test_a_prompt_is_routed_alike_by_kernels_and_by_operations():
    """Exact prefill over several chunks: decisions are handed over beside the first chunk's keys."""
    model = flux_model("qwen3", head_dim=64)
    tokens = mx.array(prompt(300))

    def run() -> tuple[list, list]:
        cache = model.make_cache()
        flux_mlx.prefill(model, tokens, cache, prefill_step_size=16)
        return flux_mlx.routes(cache), [np.array(entry.pooled()) for entry in cache]

    with kernel_policy.without("router"):
        routes, pools = run()
    before = kernel_policy.RECORD.calls["cuda"]
    for _ in range(5):
        found, pooled = run()
        assert found == routes
        for got, want in zip(pooled, pools, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-2)
    assert kernel_policy.RECORD.calls["cuda"] >= before + 5 * 2 * len(pools)


@pytest.mark.parametrize("tokens", [900, 773])
def test_a_prompt_whose_routes_stay_on_the_device_is_that_of_the_host(monkeypatch, tokens):
    """Full and sparse layers in turn, bfloat16; the second prompt's last chunk is decoded. Decisions are read once."""
    if cuda_catalog.find("bfloat16", 64, PATTERN.block_size, cuda_kernels.device(), "hopper") is None:
        pytest.skip("on this GPU the host reads routes: full attention is stock's")
    model = flux_model("qwen3", pattern=PATTERN, head_dim=64)
    model.set_dtype(mx.bfloat16)
    for index, attn in routed_layers(model).items():
        attn.router.set_dtype(mx.float32)
        last = attn.router.head[-1]
        last.weight, last.bias = mx.zeros_like(last.weight), mx.array([0.0, 9.0 * (index % 2)])
    reads, read = [], Decision.read
    monkeypatch.setattr(Decision, "read", lambda decision: reads.append(1) or read(decision))

    def run() -> tuple[list[Route], np.ndarray, int]:
        cache = model.make_cache()
        last = flux_mlx.prefill(model, mx.array(prompt(tokens)), cache, prefill_step_size=256)
        waits = len(reads)
        reads.clear()
        return flux_mlx.routes(cache), np.array(model(last[None], cache=cache)[0, -1].astype(mx.float32)), waits

    with monkeypatch.context() as patch:
        patch.setattr(kernel_policy, "choose_undecided", lambda *_: "ops")
        routes, logits, waits = run()
    assert routes == [Route.FULL if index % 2 else Route.SPARSE for index in range(len(routes))]
    assert waits == len(routes)
    for _ in range(3):
        found, got, waits = run()
        assert found == routes
        assert waits == 1
        assert np.abs(got - logits).max() <= 5e-2 * np.abs(logits).max()


@pytest.mark.parametrize("case", ON_DEVICES, ids=str)
def test_tokens_by_compiled_steps(monkeypatch, case):
    by_steps, by_own_calls = by_steps_and_by_own_calls(monkeypatch, *case)
    allowed = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}[case[1]]  # of the largest logit
    assert np.abs(by_steps - by_own_calls).max() <= allowed * np.abs(by_own_calls).max()
