"""The text: what MLX would hand to the Metal compiler, and what is rewritten in it to compile elsewhere."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from metal_kernels.catalog import Launch

_THREADGROUP_ARRAY = re.compile(r"\bthreadgroup\s+([\w:<>, ]+?)\s+(\w+)\[([^;]*)\];")
_KERNEL = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
_BUFFER = re.compile(r"(const )?(device|constant) (\w+)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]")
_ATTRIBUTE = re.compile(r"(uint3?) (\w+) \[\[\2\]\]")
_INSTANCE = re.compile(r"^template \[\[host_name\(\"\w+\"\)\]\] \[\[kernel\]\] decltype\(\w+(<.*>)\)", re.MULTILINE)


def generated_text(launch: Launch, inputs: list[tuple[tuple[int, ...], str]]) -> str:
    """The complete Metal source that MLX generates for `launch`.

    MLX prints it while a function that calls the kernel is exported, which needs no Metal device.

    Args:
        launch: The launch.
        inputs: (shape, dtype name) of each input, in the kernel's order.
    """
    spec = launch.spec
    kernel = mx.fast.metal_kernel(
        name=spec.name,
        input_names=list(spec.inputs),
        output_names=list(spec.outputs),
        header=spec.header(),
        source=spec.body(),
        ensure_row_contiguous=False,
    )
    template = [(name, getattr(mx, v) if isinstance(v, str) else v) for name, v in launch.template]

    def call(*arrays: mx.array) -> list[mx.array]:
        return kernel(
            inputs=list(arrays),
            template=template,
            grid=launch.grid,
            threadgroup=launch.threadgroup,
            output_shapes=list(launch.output_shapes),
            output_dtypes=[getattr(mx, dtype) for dtype in launch.output_dtypes],
            verbose=True,
        )

    arrays = [mx.zeros(shape, getattr(mx, dtype)) for shape, dtype in inputs]
    printed = _stdout_of(lambda file: mx.export_function(file, call, *arrays))
    return printed[printed.index("```\n") + 4 : printed.rindex("\n```")]


def _stdout_of(action) -> str:
    """What `action(temporary file name)` prints on file descriptor 1, C++ streams included."""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "printed"
        saved = os.dup(1)
        try:
            with printed.open("wb") as file:
                os.dup2(file.fileno(), 1)
                action(str(Path(folder) / "exported.mlxfn"))
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        return printed.read_text()


@dataclass(frozen=True)
class Buffer:
    """One `[[buffer(n)]]` of a generated kernel: its C++ pointer type, and whether the parameter is a reference."""

    name: str
    pointer: str
    is_reference: bool


@dataclass(frozen=True)
class Signature:
    """What the generated kernel is called, its buffers in order, its `[[...]]` attributes, its template arguments."""

    name: str
    buffers: tuple[Buffer, ...]
    attributes: tuple[str, ...]
    template: str


def signature(text: str) -> Signature:
    """Read the kernel's signature from generated text.

    Raises:
        ValueError: The text has no kernel, or a parameter that is neither a buffer nor an attribute.
    """
    found = _KERNEL.search(text)
    if found is None:
        raise ValueError("[signature] expected a [[kernel]] function in the text, got none.")
    buffers, attributes = [], []
    for parameter in found[2].split(",\n"):
        if match := _BUFFER.search(parameter):
            const, space, element, kind, name, index = match.groups()
            if int(index) != len(buffers):
                raise ValueError(f"[signature] expected buffer {len(buffers)}, got {parameter!r}.")
            buffers.append(Buffer(name, f"{const or ''}{space} {element}*", kind == "&"))
        elif match := _ATTRIBUTE.search(parameter):
            attributes.append(match[2])
        else:
            raise ValueError(f"[signature] expected a buffer or an attribute, got {parameter!r}.")
    instance = _INSTANCE.search(text)
    return Signature(found[1], tuple(buffers), tuple(attributes), instance[1] if instance else "")


def rewritten(text: str) -> str:
    """`text` with its declarations of threadgroup arrays replaced by FLUX_THREADGROUP(type, name, count).

    The explicit instantiation at the end, whose attributes only Metal's compiler accepts there, is dropped: the glue
    calls the same instance.
    """
    text = _THREADGROUP_ARRAY.sub(r"FLUX_THREADGROUP(\1, \2, (\3));", text)
    return re.sub(r"^template \[\[host_name.*$", "", text, flags=re.MULTILINE)


def translation_unit(text: str) -> str:
    """C++ source: the shim, the kernel's text, and the glue that calls it from a buffer table."""
    sign = signature(text)
    arguments = [f"{'*' if b.is_reference else ''}({b.pointer})buffers[{i}]" for i, b in enumerate(sign.buffers)]
    arguments += [f"attribute::{name}()" for name in sign.attributes]
    call = f"{sign.name}{sign.template}({', '.join(arguments)});"
    entry = f"static void flux_entry(void** buffers) {{\n  {call}\n}}"
    return f'#include "metal_shim.h"\n{rewritten(text)}\n#include "driver.h"\n{entry}\n'
