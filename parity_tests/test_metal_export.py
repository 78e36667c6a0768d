"""`mx.export_function` over the Metal kernels: calls of known routes are written, the others are refused by MLX."""

from __future__ import annotations

import mlx.core as mx
import pytest

from flux_mlx import attention, kernels
from flux_mlx.spec import PatternConfig, Route

PATTERN = PatternConfig(block_size=16, sink_tokens=16, window_tokens=32)
BLOCKS = PatternConfig(name="xattention", block_size=16, stride=4)

WRITTEN = {
    "full": lambda q, k: kernels.full_attention(q, k, k),
    "sparse": lambda q, k: kernels.sparse_attention(q, k, k, PATTERN),
    "decode": lambda q, k: kernels.sparse_attention(q[:, :, -1:], k, k, PATTERN),
    "decode in pieces": lambda q, k: kernels.sparse_attention(q[:, :, -2:], k, k, PATTERN, splits=3),
    "full by name": lambda q, k: attention.full_attention(q, k, k, impl="metal"),
    "sparse by operations": lambda q, k: attention.sparse_attention(q, k, k, PATTERN, impl="ops"),
}
REFUSED = {
    "a route on the device": (
        lambda q, k: kernels.routed_attention(q, k, k, mx.full((1,), int(Route.SPARSE), mx.int32), PATTERN),
        "Contiguous",
    ),
    "block tables": (
        lambda q, k: kernels.sparse_attention(q[:, :, -40:], k, k, BLOCKS, prompt_tokens=90),
        "Contiguous",
    ),
    "with a gradient": (
        lambda q, k: attention.sparse_attention(q, k, k, PATTERN, impl="metal"),
        "CustomTransforms",
    ),
}


@pytest.fixture
def export(monkeypatch, tmp_path):
    """Export a function of queries and keys; MLX builds Metal launches without a device while it exports."""
    monkeypatch.setattr(kernels, "is_available", lambda: True)
    file = tmp_path / "call.mlxfn"

    def run(function):
        mx.export_function(str(file), function, mx.zeros((1, 4, 40, 64)), mx.zeros((1, 2, 90, 64)))
        return file.read_bytes()

    return run


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_whose_route_is_known_are_written(export, name):
    written = export(WRITTEN[name])
    assert (b"CustomKernel" in written) == ("operations" not in name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_cannot_write_is_one_error(export, name):
    function, primitive = REFUSED[name]
    with pytest.raises(ValueError, match=rf"\[export_function\] Unable to serialize primitive {primitive}"):
        export(function)
