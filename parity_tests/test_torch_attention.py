"""The public attention functions of Torch: what they refuse, that a named implementation stays, and the gradients."""

from __future__ import annotations

import pytest
import torch

from cuda_reference.attention import full_attention, sparse_attention
from flux_mlx.spec import PatternConfig

PATTERN = PatternConfig(block_size=8, sink_tokens=8, window_tokens=16)
BLOCKS = PatternConfig(name="xattention", block_size=8, stride=4)


def sparse(*qkv, **options):
    return sparse_attention(*qkv, PATTERN, **options)


def tensors(q=(1, 4, 3, 64), k=(1, 2, 50, 64), v=None, dtype=torch.float32, k_dtype=None, device="cpu"):
    shapes = (q, k, k if v is None else v)
    return [
        torch.zeros(s, dtype=d, device=device) for s, d in zip(shapes, (dtype, k_dtype or dtype, dtype), strict=True)
    ]


@pytest.mark.parametrize("attend", [full_attention, sparse])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (4, 3, 64)}, r"expected q to be a tensor \[B, H, L, D\], got shape \(4, 3, 64\)"),
        ({"q": (1, 5, 3, 64)}, "k has 2 heads, which does not divide q's 5"),
        ({"q": (1, 4, 51, 64)}, "q has 51 tokens, more than k's 50"),
        ({"q": (2, 4, 3, 64)}, r"got \(2, 4, 3, 64\) and \(1, 2, 50, 64\)"),
        ({"q": (1, 4, 3, 32)}, r"got \(1, 4, 3, 32\) and \(1, 2, 50, 64\)"),
        ({"k": (1, 2, 0, 64)}, "expected non-empty"),
        ({"v": (1, 2, 49, 64)}, r"k has shape \(1, 2, 50, 64\), but v has \(1, 2, 49, 64\)"),
        ({"dtype": torch.int32}, "expected a float dtype, got torch.int32"),
        ({"k_dtype": torch.float16}, "k is torch.float16 on cpu, but q is torch.float32 on cpu"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(attend, shapes, message):
    with pytest.raises(ValueError, match=message):
        attend(*tensors(**shapes))


def test_tensors_of_two_devices_are_refused():
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"v is torch\.float32 on meta, but q is torch\.float32 on cpu"):
        full_attention(q, k, v.to("meta"))


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "1"])
def test_scales_that_are_no_positive_number_are_refused(scale):
    with pytest.raises(ValueError, match=r"\[full_attention\] scale must be a positive finite number, got"):
        full_attention(*tensors(), scale=scale)


def test_patterns_and_prompts_are_checked():
    with pytest.raises(ValueError, match=r"\[sparse_attention\] expected a PatternConfig, got str"):
        sparse_attention(*tensors(), "streaming")
    with pytest.raises(ValueError, match=r"prompt_tokens must be an integer or None, got 3\.0"):
        sparse(*tensors(), prompt_tokens=3.0)


@pytest.mark.parametrize(
    ("changes", "impl", "message"),
    [
        ({}, "metal", r"impl must be one of \['eager', 'triton'\] or None, got 'metal'"),
        ({"dtype": torch.float64}, "triton", "impl='triton': expected float16, bfloat16 or float32, got torch.float64"),
        ({"q": (1, 4, 3, 60), "k": (1, 2, 50, 60)}, "triton", "a multiple of 8 and at most 256, got 60"),
        ({"q": (1, 4, 3, 264), "k": (1, 2, 50, 264)}, "triton", "a multiple of 8 and at most 256, got 264"),
    ],
)
@pytest.mark.parametrize("attend", [full_attention, sparse])
def test_an_implementation_asked_for_by_name_is_never_replaced(attend, changes, impl, message):
    with pytest.raises(ValueError, match=message):
        attend(*tensors(**changes), impl=impl)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="expected CUDA tensors, or TRITON_INTERPRET=1 on a CPU, got tensors on cpu"):
        full_attention(*tensors(), impl="triton")


def gradients(attend, impl, sizes, lse_weight):
    """(dq, dk, dv) of a random sum of out and lse."""
    generator = torch.Generator().manual_seed(sum(sizes))
    kv_heads, group, q_tokens, kv_tokens, head_dim = sizes
    shapes = ((2, kv_heads * group, q_tokens, head_dim), *[(2, kv_heads, kv_tokens, head_dim)] * 2)
    qkv = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    out, lse = attend(*qkv, impl=impl, return_lse=True)
    weights = [torch.randn(x.shape, generator=generator) for x in (out, lse)]
    total = (out * weights[0]).sum() + lse_weight * (lse * weights[1]).sum()
    return torch.autograd.grad(total, qkv)


@pytest.mark.parametrize("attend", [full_attention, sparse], ids=["full", "streaming"])
@pytest.mark.parametrize(
    ("sizes", "lse_weight"), [((1, 2, 20, 45, 64), 0.0), ((1, 1, 37, 37, 16), 1.0), ((2, 1, 3, 50, 24), 0.5)]
)
def test_gradients_of_the_kernels_are_those_of_eager(attend, sizes, lse_weight):
    pytest.importorskip("triton")
    kernels, eager = (gradients(attend, impl, sizes, lse_weight) for impl in ("triton", "eager"))
    for name, actual, expected in zip("qkv", kernels, eager, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"d{n}: {text}")


def test_chosen_blocks_have_no_gradient_in_triton():
    pytest.importorskip("triton")
    q, k, v = (x.requires_grad_() for x in tensors(q=(1, 2, 16, 16), k=(1, 1, 16, 16)))
    with pytest.raises(ValueError, match="impl='triton' has no gradient for chosen blocks; use impl='eager'"):
        sparse_attention(q, k, v, BLOCKS, prompt_tokens=16, impl="triton")
