"""Every attention property on every backend: on named edge cases, then on drawn ones."""

from dataclasses import replace

import pytest

from parity_tests.properties import PROPERTIES, every_output_is_written, for_all
from parity_tests.strategies import EDGES, cases


@pytest.mark.parametrize("edge", EDGES)
def test_edge(backend, edge):
    case = EDGES[edge]
    if not backend.supports(case):
        pytest.skip(f"{backend.name} does not take: {edge}")
    if backend.is_slow:
        every_output_is_written(backend, replace(case, batch=1, group=min(case.group, 2)))
        return
    for check in PROPERTIES.values():
        check(backend, case)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(backend, name, record_property):
    for_all(backend, cases(backend).filter(backend.supports), PROPERTIES[name]).report(record_property)
