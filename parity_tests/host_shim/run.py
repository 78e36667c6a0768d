"""Runs launches on the host: `run_on_host` is the launcher that `metal_kernels.operations` takes."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_kernels.catalog import Launch
from parity_tests.host_shim import build, text

SCHEDULES = ("fair", "ahead", "behind", "shuffled")


class HostError(RuntimeError):
    """The kernel did what a GPU would not forgive: out-of-bounds access, deadlock, divergence."""


class HostTimeoutError(HostError):
    """The kernel did not end in time: it hangs, or the machine is busy."""


@dataclass(frozen=True)
class View:
    """A strided view of a buffer, as a sliced cache is on the device.

    Args:
        buffer: The whole buffer, of any shape.
        shape: Shape of the view.
        strides: In elements.
        offset: First element of the view in the buffer.
    """

    buffer: mx.array
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the elements."""
        return self.buffer.dtype


def dtype_name(array: mx.array | View) -> str:
    """ "float32" for mx.float32, and so on."""
    return str(array.dtype).rpartition(".")[2]


def to_bytes(array: mx.array) -> bytes:
    """The elements in row-major order."""
    array = mx.contiguous(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


def from_bytes(data: bytes, shape: tuple[int, ...], dtype: str) -> mx.array:
    """Inverse of `to_bytes`."""
    if dtype == "bfloat16":
        return mx.array(np.frombuffer(data, np.uint16).reshape(shape)).view(mx.bfloat16)
    return mx.array(np.frombuffer(data, dtype).reshape(shape))


def as_array(value: Any) -> mx.array | View:
    """What MLX makes of an input: numbers become 0-d arrays, tuples int32 vectors."""
    if isinstance(value, tuple):
        return mx.array(value, mx.int32)
    if isinstance(value, (int, float)):
        return mx.array(value, mx.float32 if isinstance(value, float) else mx.int32)
    return value


_SOURCES: dict[tuple, str] = {}


def source_of(launch: Launch, arrays: list[mx.array | View]) -> str:
    """The translation unit of MLX's text for `launch`. Of the shapes it knows only rank 0 and fewer than 8 elements."""
    shapes = [tuple(array.shape) for array in arrays]
    kinds = tuple((len(s) == 0, int(np.prod(s)) < 8, dtype_name(a)) for s, a in zip(shapes, arrays, strict=True))
    key = launch.spec, launch.template, kinds
    if key not in _SOURCES:
        inputs = [(shape, dtype_name(array)) for shape, array in zip(shapes, arrays, strict=True)]
        _SOURCES[key] = text.translation_unit(text.generated_text(launch, inputs))
    return _SOURCES[key]


def _metadata(name: str, array: mx.array | View) -> bytes:
    """The bytes of NAME_shape (int32) or NAME_strides (int64)."""
    if name.endswith("_shape"):
        return np.array(array.shape, np.int32).tobytes()
    if isinstance(array, View):
        return np.array(array.strides, np.int64).tobytes()
    strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(len(array.shape))]
    return np.array(strides, np.int64).tobytes()


def _data(array: mx.array | View) -> bytes:
    if isinstance(array, View):
        return to_bytes(array.buffer)[array.offset * array.buffer.itemsize :]
    return to_bytes(array)


def is_dense(array: mx.array | View) -> bool:
    """Whether the elements lie in row-major order, one behind the other."""
    if isinstance(array, View):
        dense = [int(np.prod(array.shape[axis + 1 :])) for axis in range(len(array.shape))]
        return list(array.strides) == dense
    return memoryview(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).c_contiguous


def _refuse_strided(launch: Launch, arrays: list[mx.array | View]) -> None:
    """HostError if an input has strides that the kernel does not read: a device would read other elements."""
    for name, array in zip(launch.spec.inputs, arrays, strict=True):
        if not launch.spec.takes_strides(name) and not is_dense(array):
            raise HostError(f"{launch.spec.name} reads {name} as dense, and it is not.")


def _job(launch: Launch, sign: text.Signature, arrays: dict[str, Any], schedule: str, seed: int) -> tuple[bytes, list]:
    """The job file of driver.h, and (shape, dtype) of the outputs."""
    outputs = dict(zip(launch.spec.outputs, zip(launch.output_shapes, launch.output_dtypes, strict=True), strict=True))
    table, payload = b"", b""
    for buffer in sign.buffers:
        if buffer.name in outputs:
            shape, dtype = outputs[buffer.name]
            table += struct.pack("<IIQ", 1, 0, int(np.prod(shape)) * getattr(mx, dtype).size)
            continue
        base = buffer.name.removesuffix("_shape").removesuffix("_strides")
        data = _data(arrays[buffer.name]) if buffer.name in arrays else _metadata(buffer.name, arrays[base])
        table += struct.pack("<IIQ", 0, 0, len(data))
        payload += data
    sizes = (*launch.grid, *launch.threadgroup, len(sign.buffers))
    return struct.pack("<9I", SCHEDULES.index(schedule), seed, *sizes) + table + payload, list(outputs.values())


@dataclass(frozen=True)
class HostRun:
    """A launcher for `metal_kernels.operations`.

    Args:
        schedule: One of SCHEDULES.
        seed: Of the shuffled schedule.
        sanitize: Run under AddressSanitizer and UBSan.
        timeout_s: Longest run of a kernel.
    """

    schedule: str = "fair"
    seed: int = 0
    sanitize: bool = False
    timeout_s: int = 300

    def __call__(self, launch: Launch, inputs: list[Any]) -> list[mx.array]:
        """Run `launch`; outputs hold NaN (all bits set) where the kernel wrote nothing.

        Raises:
            HostError: The kernel faulted; the message says how.
        """
        arrays = [as_array(value) for value in inputs]
        _refuse_strided(launch, arrays)
        return self.run_source(source_of(launch, arrays), launch, arrays)

    def run_source(self, source: str, launch: Launch, arrays: list[Any]) -> list[mx.array]:
        """Run translation unit `source`, which may be a mutant of the launch's own."""
        program = build.executable(source, sanitize=self.sanitize)
        named = dict(zip(launch.spec.inputs, arrays, strict=True))
        job, outputs = _job(launch, text.signature(source), named, self.schedule, self.seed)
        result = _execute(program, job, self.timeout_s)
        (scratch_bytes,) = struct.unpack_from("<Q", result)
        if scratch_bytes > (launch.threadgroup_bytes + 15) // 16 * 16 + 32:
            raise HostError(f"{launch.spec.name} takes {scratch_bytes} bytes of threadgroup memory, more than listed.")
        return read_outputs(result, outputs)


def read_outputs(result: bytes, outputs: list[tuple[tuple[int, ...], str]]) -> list[mx.array]:
    """The arrays of `outputs`, shape and dtype each, that a program wrote one after the other behind 8 bytes."""
    arrays, start = [], 8
    for shape, dtype in outputs:
        size = int(np.prod(shape)) * getattr(mx, dtype).size
        arrays.append(from_bytes(result[start : start + size], shape, dtype))
        start += size
    return arrays


def _execute(program: Path, job: bytes, timeout_s: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job", Path(folder) / "result"
        job_file.write_bytes(job)
        command = [str(program), str(job_file), str(result_file)]
        environment = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout_s, env=environment)
        except subprocess.TimeoutExpired:
            raise HostTimeoutError(f"the kernel did not end within {timeout_s} s") from None
        if done.returncode:
            raise HostError(f"exit code {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
        return result_file.read_bytes()


run_on_host = HostRun()
