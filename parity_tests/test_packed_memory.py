"""What a packed step holds in float32: some rows, some heads, the rows of the pools, not a copy of everything."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cuda_reference import packed_attention
from cuda_reference.data_packing import TILE, pack
from cuda_reference.data_prompts import TASKS
from cuda_reference.objective import sample_divergence, sample_nll
from cuda_reference.packed_attention import _RouteGradient
from cuda_reference.packed_model import _pool
from parity_tests.test_data_packing import made

HQ, D, VOCABULARY = 6, 8, 50


class LargestFloat32(TorchDispatchMode):
    """Notes the most elements of a float32 tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
        return out


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_losses_hold_some_rows_at_a_time(kind):
    """And are those of all rows at once, with their gradient, to the bit."""
    sample = torch.arange(41) // 14
    targets = torch.arange(41) if kind == "nll" else normal(41, VOCABULARY, seed=1)
    loss = sample_nll if kind == "nll" else sample_divergence
    found = []
    for rows in (8, 41):
        logits = normal(41, VOCABULARY).requires_grad_()
        with LargestFloat32() as largest:
            values = loss(logits, targets, sample, 3, rows=rows)
            values.square().sum().backward()
        found.append((values.detach(), logits.grad))
        assert largest.elements == rows * VOCABULARY
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert found[0][1].abs().max() > 0


@pytest.mark.parametrize("by_head", [False, True])
def test_pools_take_their_rows_before_they_are_float32(by_head):
    packed = pack(made([130, 300]), TASKS, 10, 5 * TILE)
    queries = normal(1, 5 * TILE, HQ, D).requires_grad_()
    with LargestFloat32() as largest:
        pooled = _pool(queries, packed, by_head)
        pooled.sum().backward()
    assert largest.elements == 2 * 20 * HQ * D
    rows = queries.detach()[0].float()
    rows = rows.transpose(0, 1) if by_head else rows.mean(1)[None]
    assert torch.equal(pooled, (rows[:, packed.pool_rows] * packed.pool_weights[..., None]).sum(2).flatten(0, 1))
    seen = queries.grad[0].float().abs().sum((1, 2)) > 0
    assert torch.equal(seen.nonzero().flatten(), packed.pool_rows.unique())


@pytest.mark.parametrize("groups", [1, HQ])
def test_the_gradient_of_a_route_holds_some_heads_at_a_time(monkeypatch, groups):
    monkeypatch.setattr(packed_attention, "ELEMENTS_PER_STEP", 4 * 30 * D)
    chosen, difference, grad = (normal(1, HQ, 30, D, seed=i) for i in range(3))
    z, group = torch.ones(groups, 2).requires_grad_(), torch.arange(30) // 20
    out = _RouteGradient.apply(chosen, difference, z, group)
    with LargestFloat32() as largest:
        out.backward(grad)
    assert largest.elements == 4 * 30 * D
    by_row = (grad.double() * difference.double()).sum((0, 3))
    expected = torch.stack([by_row[:, group == g].sum(1) for g in range(2)], dim=1)
    expected = expected if groups > 1 else expected.sum(0, keepdim=True)
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-5, atol=1e-4)
