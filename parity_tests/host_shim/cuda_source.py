"""Runs launches of `flux_mlx.cuda_catalog` on a CPU: CUDA C++ on the host shim, Triton's prefill by its interpreter.

`HostCuda()` is the launcher that `flux_mlx.cuda_kernels` takes. What it hands over is what a device would get: dense
arrays, and the launch's scalars by their place.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from cuda_reference import export_decode, export_router
from flux_mlx.cuda_catalog import Compiled, Launch
from flux_mlx.cuda_kernels import Prepared
from parity_tests.host_shim import build
from parity_tests.host_shim.run import SCHEDULES, HostError, _data, _execute, read_outputs

_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "int32": "int", "float32": "float"}
_OF_ROLE = {"work": "float", "route": "int", "tickets": "unsigned"}
_FORMATS = {"int32": "<i", "float32": "<f"}


def _kernel_text(kernel: Compiled) -> str:
    """The CUDA text with its headers, but for those whose PTX the host shim replaces."""
    is_decode = kernel.family == "decode"
    source = export_decode.SOURCE if is_decode else export_router.source_of(kernel.family)
    text = source.read_text()
    for header in {*export_decode.HEADERS, *export_router.HEADERS}:
        own = "" if header.name in ("warp.cuh", "loads.cuh") else header.read_text().replace("#pragma once", "")
        text = text.replace(f'#include "{header.name}"', own)
    return text


def _pointer(kernel: Compiled, name: str) -> str:
    """C++ type of the elements of an input or output."""
    is_of_router = kernel.family.startswith("router") and name != "queries"
    return _OF_ROLE.get(name, "float" if is_of_router else _TYPES[kernel.dtype])


def host_text(kernel: Compiled, mutation: tuple[str, str] = ("", "")) -> str:
    """A kernel in CUDA C++ as a program of the host shim; `mutation`: a text and its replacement.

    Raises:
        ValueError: The text is not there.
    """
    source, (before, after) = _kernel_text(kernel), mutation
    if before not in source:
        raise ValueError(f"[host_text] expected {before!r} in the text of {kernel.name}, and it is not there.")
    if before:
        source = source.replace(before, after)
    names = (*kernel.inputs, *kernel.outputs)
    arguments = [f"({_pointer(kernel, name)}*)buffers[{i}]" for i, name in enumerate(names)]
    for i, (_, kind) in enumerate(kernel.scalars):
        arguments.append(f"*({_TYPES[kind]}*)buffers[{len(names) + i}]")
    macros = {"FLUX_T": _TYPES[kernel.dtype], "FLUX_D": kernel.head_dim, "FLUX_ENTRY": kernel.name}
    return "\n".join(
        [
            '#include "cuda_shim.h"',
            *(f"#define {name} {value}" for name, value in macros.items()),
            source,
            '#include "driver.h"',
            f"static void flux_entry(void** buffers) {{ {kernel.name}({', '.join(arguments)}); }}\n",
        ]
    )


@dataclass(frozen=True)
class HostCuda:
    """A launcher for `flux_mlx.cuda_kernels`.

    Args:
        sanitize: Run CUDA C++ under AddressSanitizer and UBSan.
        timeout_s: Longest run of a kernel in CUDA C++.
        schedule: Of its threads and blocks, one of `host_shim.run.SCHEDULES`.
        mutation: (text, its replacement) in CUDA C++: a mistake that a test must find.
    """

    sanitize: bool = False
    timeout_s: int = 300
    schedule: str = "fair"
    mutation: tuple[str, str] = ("", "")

    def __call__(self, launch: Launch) -> Prepared:
        """A function of inputs and late scalars that runs `launch`; outputs start as NaN.

        Raises:
            HostError: The kernel faulted, or left tickets behind.
        """
        if launch.kernel.family == "decode" or launch.kernel.family.startswith("router"):
            return lambda inputs, late=(): self._run_text(launch, inputs, late)
        from parity_tests.host_shim.cuda_interpreter import run_compiled

        return lambda inputs, late=(): run_compiled(launch, inputs)

    def _run_text(self, launch: Launch, inputs: list[mx.array], late: Sequence[int]) -> list[mx.array]:
        kernel = launch.kernel
        table, payload = b"", b""
        for name, array in zip(kernel.inputs, inputs, strict=True):
            table += struct.pack("<IIQ", 2 if name == "tickets" else 0, 0, array.nbytes)
            payload += _data(array)
        outputs = list(zip(launch.output_shapes, launch.output_dtypes, strict=True))
        for shape, dtype in outputs:
            table += struct.pack("<IIQ", 1, 0, int(np.prod(shape)) * getattr(mx, dtype).size)
        values = [*(value for _, value in launch.arguments), *late]
        for (_, kind), value in zip(kernel.scalars, values, strict=True):
            table += struct.pack("<IIQ", 0, 0, 4)
            payload += struct.pack(_FORMATS[kind], value)
        x, y, z = launch.blocks
        buffers = len(inputs) + len(outputs) + len(values)
        header = (SCHEDULES.index(self.schedule), 0, x * kernel.threads, y, z, kernel.threads, 1, 1, buffers)
        program = build.executable(host_text(kernel, self._mutation_of(kernel)), sanitize=self.sanitize)
        result = _execute(Path(program), struct.pack("<9I", *header) + table + payload, self.timeout_s)
        written = [(x.shape, "int32") for name, x in zip(kernel.inputs, inputs, strict=True) if name == "tickets"]
        results = read_outputs(result, [*written, *outputs])
        if written and results.pop(0).any().item():
            raise HostError(f"{kernel.name} left tickets behind, which the next call would count.")
        return results

    def _mutation_of(self, kernel: Compiled) -> tuple[str, str]:
        """The mutation, if this kernel's text has its place; the other kernels of a test stay right."""
        return self.mutation if self.mutation[0] in _kernel_text(kernel) else ("", "")
