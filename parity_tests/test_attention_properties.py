"""Every attention property on every backend: on named edge cases, then on drawn ones."""

import pytest

from parity_tests.properties import PROPERTIES, for_all
from parity_tests.strategies import EDGES, cases


@pytest.mark.parametrize("edge", EDGES)
def test_edge(backend, edge):
    case = EDGES[edge]
    if not backend.supports(case):
        pytest.skip(f"{backend.name} does not take: {edge}")
    for check in PROPERTIES.values():
        check(backend, case)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(backend, name):
    drawn = cases(backend.dtypes, backend.head_dims, backend.block_sizes).filter(backend.supports)
    for_all(backend, drawn, PROPERTIES[name])
