"""What can be said of the generated Metal text without running it, and the pattern's truth table run alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from flux_mlx.spec import PatternConfig, Route, RouterConfig, visible
from metal_kernels import catalog
from metal_kernels.catalog import Buffer, KernelSpec, Launch
from parity_tests.host_shim import build, text
from parity_tests.host_shim.run import HostRun, as_array
from parity_tests.host_shim.variants import ALL

ATTRIBUTES = {
    "thread_index_in_simdgroup",
    "thread_index_in_threadgroup",
    "simdgroup_index_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
}


def test_every_kernel_is_among_the_variants():
    assert {launch.spec.name for launch, _ in ALL.values()} == set(catalog.KERNELS)


def spaces(name: str) -> dict[str, str]:
    """Address space of each input of a variant that is not a scalar."""
    launch, inputs = ALL[name]
    buffers = text.signature(text.generated_text(launch, inputs)).buffers
    return {b.name: b.pointer.split()[1] for b in buffers if b.name in launch.spec.inputs and not b.is_reference}


def test_both_address_spaces_of_an_input_are_among_the_variants():
    """A route, a block table and the stats of a merge have fewer than 8 elements or not, by the shapes of a call."""
    seen, tables = {}, set()
    for name in (name for name in ALL if name.endswith("float16-80")):
        found, kernel = spaces(name), ALL[name][0].spec.name
        for buffer, space in found.items():
            seen.setdefault((kernel, buffer), set()).add(space)
        if kernel == "prefill_table":
            tables.add((found["counts"], found["indices"]))
    attention = ("prefill", "prefill_table", "decode", "decode_split")
    either = {(kernel, "route") for kernel in attention} | {("decode_merge", "stats")}
    either |= {("prefill_table", f"{part}{name}") for part in ("", "full_") for name in ("counts", "indices")}
    assert {pair for pair, both in seen.items() if len(both) == 2} == either
    assert tables == {("constant", "constant"), ("constant", "device"), ("device", "device")}


@pytest.mark.parametrize("name", ALL)
def test_static_limits(name):
    launch, inputs = ALL[name]
    generated = text.generated_text(launch, inputs)
    sign = text.signature(generated)
    assert len(sign.buffers) <= 31
    assert int(np.prod(launch.threadgroup)) <= 1024
    assert launch.threadgroup_bytes <= 32768
    assert "atomic" not in generated
    assert all(grid % size == 0 for grid, size in zip(launch.grid, launch.threadgroup, strict=True))


@pytest.mark.parametrize("spec", catalog.KERNELS.values(), ids=catalog.KERNELS)
def test_text_follows_the_house_rules(spec):
    header, body = spec.header(), spec.body()
    assert len(body.splitlines()) <= 16, "a body is a call of a few lines; code goes into the header"
    assert not re.search(r"^\s*threadgroup [^*&]*\[", header, re.MULTILINE), "threadgroup arrays belong to the body"
    used = re.findall(r"\b(?:thread|threads|threadgroup|threadgroups|simdgroup)_\w+\b", re.sub(r"//.*", "", body))
    assert "//" not in body, "MLX finds parameters by substring, comments included"
    assert set(used) <= ATTRIBUTES, "names that the host shim does not provide"
    for pointer in re.findall(r"(\w+) \w+\* ", re.sub(r"//.*", "", header)):
        assert pointer in ("device", "constant", "threadgroup", "thread"), f"{pointer} * without an address space"


@pytest.mark.skipif(
    build.may_skip_address_spaces(), reason="clang 18 or newer is not installed (apt-get install clang-19)"
)
@pytest.mark.parametrize("name", [name for name in ALL if name.endswith(("-float16-80", "-bfloat16-256"))])
def test_address_spaces(name):
    launch, inputs = ALL[name]
    assert build.check_address_spaces(text.translation_unit(text.generated_text(launch, inputs))) == ""


def test_catalog_agrees_with_the_specification():
    names = RouterConfig.parameter_shapes(64)
    assert set(catalog.ROUTER_PARAMETERS) == set(names)
    pattern = (catalog.MSL / "pattern.h").read_text()
    router = (catalog.MSL / "router.h").read_text()
    assert catalog.ROUTE_SPARSE == Route.SPARSE
    assert f"kRouteSparse = {int(Route.SPARSE)};" in pattern
    assert f"kRouteFull = {int(Route.FULL)};" in router
    assert f"kQueryRows = {catalog.QUERY_ROWS};" in (catalog.MSL / "prefill.h").read_text()
    assert f"kPoolSlots = {catalog.POOL_SLOTS};" in router
    assert f"kMassBlocks = {catalog.MASS_BLOCKS};" in (catalog.MSL / "block_mass.h").read_text()


@dataclass(frozen=True)
class TruthSpec(KernelSpec):
    """Writes, for every (query, key), whether pattern.h lets the query see the key."""

    def header(self) -> str:
        return (catalog.MSL / "pattern.h").read_text()

    def body(self) -> str:
        return """
const int q_pos = int(threadgroup_position_in_grid.x);
const flux::Rule read = flux::read_rule(rule, route);
const flux::Span one = flux::query_span(read, q_pos, tokens);
const flux::Span all = flux::union_span(read, q_pos, min(q_pos + 4, tokens - 1), tokens);
const int common = flux::common_begin(read, q_pos, min(q_pos + 4, tokens - 1));
for (int k_pos = 0; k_pos < tokens; k_pos++) {
  const int64_t at = int64_t(q_pos) * tokens + k_pos;
  seen[at] = flux::sees(one, k_pos);
  in_union[at] = flux::sees(all, k_pos);
  in_common[at] = k_pos >= common && k_pos <= q_pos;
}
"""


@pytest.mark.parametrize("name", ["streaming", "triangle", "full"])
@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("sink", [0, 2, 7, 40])
@pytest.mark.parametrize("window", [1, 5, 9, 60])
def test_visible_by_truth_table(name, block, sink, window):
    n = 33
    pattern = PatternConfig("streaming" if name == "full" else name, block, sink, window, last_tokens=6)
    dense = (21, 27) if name == "triangle" else (0, 0)
    words = (pattern.block_size, pattern.sink_blocks, pattern.window_blocks, *dense)
    spec = TruthSpec(
        "truth",
        "",
        (),
        (Buffer("rule", "int32", "[5]"), Buffer("route", "int32", "scalar"), Buffer("tokens", "int32", "scalar")),
        tuple(Buffer(output, "int32", "[n, n]") for output in ("seen", "in_union", "in_common")),
        32,
        "(n, 1, 1)",
    )
    launch = Launch(spec, (), (n * 32, 1, 1), (32, 1, 1), ((n, n),) * 3, ("int32",) * 3, 0)
    route = Route.FULL if name == "full" else Route.SPARSE
    seen, union, common = (np.array(x) for x in HostRun()(launch, [as_array(words), int(route), n]))
    positions = np.arange(n)
    expected = visible(pattern, positions[:, None], positions[None, :], 27 if name == "triangle" else None)
    if name == "full":
        expected = np.tri(n, dtype=bool)
    np.testing.assert_array_equal(seen, expected)
    for q in range(n):
        rows = expected[q : q + 5]
        assert not (rows.any(0) & ~union[q].astype(bool)).any(), "the union must hold all that is seen"
        last = min(q + 4, n - 1)
        assert union[q].sum() <= rows.any(0).sum() + block * (last - q), "the union must skip what nobody sees"
        assert not (common[q].astype(bool) & ~rows.all(0)).any(), "common keys are seen by every query"
