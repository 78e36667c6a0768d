"""Runs a compiled prefill launch by Triton's interpreter: the portable kernel with the launch's grid and scalars."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch

from cuda_reference import triton_prefill
from cuda_reference.export_ptx import POINTERS
from flux_mlx.cuda_catalog import Launch


def _to_torch(x: mx.array) -> torch.Tensor:
    """Dense; bfloat16 as float32, which the interpreter can multiply."""
    x = mx.contiguous(x)
    return torch.from_numpy(np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x))


def run_compiled(launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """Outputs of the launch; they start as NaN.

    Raises:
        ValueError: The launch is not of the portable kernel, the only one that Triton can interpret.
    """
    kernel = launch.kernel
    if kernel.family != "portable":
        raise ValueError(f"[run_compiled] expected the portable kernel, got {kernel.name}.")
    tensors = [_to_torch(x) for x in inputs]
    outputs = [torch.full(shape, float("nan"), dtype=torch.float32) for shape in launch.output_shapes]
    outputs[0] = outputs[0].to(tensors[0].dtype)
    by_name = dict(launch.arguments) | dict(zip((*kernel.inputs, *kernel.outputs), tensors + outputs, strict=True))
    tiles = triton_prefill.tile_options_of(2, kernel.head_dim)
    by_name |= {"BLOCK": kernel.block_size, "D": kernel.head_dim, "BLOCK_D": kernel.head_dim, **tiles}
    names = [name for name in triton_prefill.routed_kernel.arg_names if name in POINTERS or name in by_name]
    triton_prefill.routed_kernel[launch.blocks](**{name: by_name[name] for name in names})
    return [mx.array(x.numpy()).astype(getattr(mx, d)) for x, d in zip(outputs, launch.output_dtypes, strict=True)]
