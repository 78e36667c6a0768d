"""Runs launches of `flux_mlx.cuda_catalog` on a CPU: decode on the host shim, compiled prefill by Triton's interpreter.

`HostCuda()` is the launcher that `flux_mlx.cuda_kernels` takes. What it hands over is what a device would get: arrays
where they lie, and the launch's scalars by their place.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux_mlx.cuda_catalog import Launch, Source
from parity_tests.host_shim import build
from parity_tests.host_shim.run import View, _data, _execute, dtype_name, read_outputs

_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16", "int32": "int32_t"}
_AXES = {"_shape": "Shape", "_strides": "Strides"}


def _literal(value: int | str) -> str:
    return f"using {{}} = {_TYPES[value]};" if isinstance(value, str) else f"constexpr int {{}} = {value};"


def parameters(kernel: Source) -> list[str]:
    """Names of the generated kernel's parameters, in order: MLX adds shape and strides where the body names them."""
    names = []
    for name in kernel.inputs:
        names += [name, *(name + axes for axes in _AXES if name + axes in kernel.body())]
    return names + list(kernel.outputs)


def generated_text(launch: Launch, dtypes: dict[str, str]) -> str:
    """The kernel's text as MLX generates it (without its own header); `dtypes` of the arrays by name."""
    kernel: Source = launch.kernel
    lines = []
    for name in parameters(kernel):
        axes = [f"const __grid_constant__ {kind} {name}" for suffix, kind in _AXES.items() if name.endswith(suffix)]
        const = "const " if name in kernel.inputs else ""
        lines += axes or [f"{const}{_TYPES[dtypes[name]]}* {name}"]
    constants = "\n".join(_literal(value).format(name) for name, value in launch.arguments)
    signature = f"__global__ void flux_{kernel.name}({', '.join(lines)}) {{"
    return "\n".join([kernel.header(), "namespace mlx::core::cu {", signature, constants, kernel.body(), "}", "}"])


def host_text(launch: Launch, dtypes: dict[str, str]) -> str:
    """`generated_text` as a program of the host shim."""
    arguments = []
    for i, name in enumerate(parameters(launch.kernel)):
        axes = [f"*(const {kind}*)buffers[{i}]" for suffix, kind in _AXES.items() if name.endswith(suffix)]
        arguments += axes or [f"({_TYPES[dtypes[name]]}*)buffers[{i}]"]
    call = f"mlx::core::cu::flux_{launch.kernel.name}({', '.join(arguments)});"
    entry = f"static void flux_entry(void** buffers) {{ {call} }}"
    return f'#include "cuda_shim.h"\n{generated_text(launch, dtypes)}\n#include "driver.h"\n{entry}\n'


def _axes(name: str, array: mx.array | View) -> bytes:
    """Shape or strides as MLX passes them: ten axes, zeros behind."""
    if name.endswith("_shape"):
        return np.array([*array.shape, *[0] * (10 - len(array.shape))], np.int32).tobytes()
    dense = [int(np.prod(array.shape[axis + 1 :])) for axis in range(len(array.shape))]
    strides = array.strides if isinstance(array, View) else dense
    return np.array([*strides, *[0] * (10 - len(strides))], np.int64).tobytes()


@dataclass(frozen=True)
class HostCuda:
    """A launcher for `flux_mlx.cuda_kernels`.

    Args:
        views: Views that stand for inputs of a source kernel, by name: a strided cache.
        sanitize: Run source kernels under AddressSanitizer and UBSan.
        timeout_s: Longest run of a source kernel.
        mutation: (text, its replacement) in `decode.cuh`: a mistake that a test must find.
    """

    views: tuple[tuple[str, View], ...] = ()
    sanitize: bool = False
    timeout_s: int = 300
    mutation: tuple[str, str] = ("", "")

    def __call__(self, launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
        """Run `launch`; outputs start as NaN.

        Raises:
            HostError: A source kernel faulted.
        """
        if isinstance(launch.kernel, Source):
            return self._run_source(launch, inputs)
        from parity_tests.host_shim.cuda_interpreter import run_compiled

        return run_compiled(launch, inputs)

    def _run_source(self, launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
        kernel: Source = launch.kernel
        arrays = dict(zip(kernel.inputs, inputs, strict=True)) | {n: v for n, v in self.views if n in kernel.inputs}
        outputs = list(zip(launch.output_shapes, launch.output_dtypes, strict=True))
        dtypes = {name: dtype_name(array) for name, array in arrays.items()}
        dtypes |= dict(zip(kernel.outputs, launch.output_dtypes, strict=True))
        table, payload = b"", b""
        for name in parameters(kernel):
            if name in kernel.outputs:
                shape, dtype = outputs[kernel.outputs.index(name)]
                table += struct.pack("<IIQ", 1, 0, int(np.prod(shape)) * getattr(mx, dtype).size)
                continue
            base = name.removesuffix("_shape").removesuffix("_strides")
            data = _data(arrays[name]) if name in arrays else _axes(name, arrays[base])
            table += struct.pack("<IIQ", 0, 0, len(data))
            payload += data
        x, y, z = launch.blocks
        sizes = (x * launch.threads, y, z, launch.threads, 1, 1, len(parameters(kernel)))
        before, after = self.mutation
        if before not in kernel.header():
            raise ValueError(f"[HostCuda] expected {before!r} in decode.cuh, and it is not there.")
        text = host_text(launch, dtypes)
        program = build.executable(text.replace(before, after) if before else text, sanitize=self.sanitize)
        result = _execute(Path(program), struct.pack("<9I", 0, 0, *sizes) + table + payload, self.timeout_s)
        return read_outputs(result, outputs)
