"""Settings: every bad value is refused by name, and every good one survives its JSON form."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_mlx.spec import FluxConfig, PatternConfig, Route, RouterConfig, parse_route

BAD_PATTERNS = [
    ("name", "dense"),
    ("block_size", 0),
    ("block_size", 64.0),
    ("block_size", True),
    ("sink_tokens", -1),
    ("window_tokens", 0),
    ("window_tokens", "2048"),
    ("last_tokens", -128),
    ("stride", 0),
    ("threshold", 0.0),
    ("threshold", 1.5),
    ("threshold", float("nan")),
    ("threshold", None),
    ("top_k_blocks", 0),
]
BAD_ROUTERS = [
    ("pool_tokens", 0),
    ("pool_tokens", 1.5),
    ("min_prefill_tokens", 1),
    ("init_bias", float("inf")),
    ("init_bias", "4.5"),
]
ROUTES = [
    ("auto", "auto"),
    (" full ", "full"),
    ("sparse", "sparse"),
    ("0", (0,)),
    ("7,2,2", (2, 7)),
    ("0,6-8", (0, 6, 7, 8)),
    ("3-3, 1", (1, 3)),
]


@pytest.mark.parametrize(("name", "value"), BAD_PATTERNS)
def test_pattern_refuses(name, value):
    with pytest.raises(ValueError, match=rf"\[PatternConfig\] {name}"):
        PatternConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_ROUTERS)
def test_router_refuses(name, value):
    with pytest.raises(ValueError, match=rf"\[RouterConfig\] {name}"):
        RouterConfig(**{name: value})


def test_xattention_needs_a_stride_that_divides_the_block():
    with pytest.raises(ValueError, match="stride must divide block_size, got stride 16 and block_size 40"):
        PatternConfig(name="xattention", block_size=40)
    assert PatternConfig(name="streaming", block_size=40).stride == 16


@pytest.mark.parametrize(
    ("block", "sink", "window", "blocks", "spans"),
    [
        (128, 128, 2048, (1, 16), (128, 2048)),
        (64, 65, 512, (2, 8), (128, 512)),
        (16, 0, 1, (0, 1), (0, 16)),
        (1, 4, 7, (4, 7), (4, 7)),
    ],
)
def test_sizes_round_up_to_blocks(block, sink, window, blocks, spans):
    pattern = PatternConfig(block_size=block, sink_tokens=sink, window_tokens=window)
    assert (pattern.sink_blocks, pattern.window_blocks) == blocks
    assert (pattern.sink_span, pattern.window_span) == spans


@pytest.mark.parametrize(("text", "route"), ROUTES)
def test_route_text(text, route):
    assert parse_route(text) == route
    assert FluxConfig(route=text).route == route


@pytest.mark.parametrize("text", ["", "dense", "1;2", "3-1", "-1", "1-", "1,,2", "0x1", "1.5", "auto,full"])
def test_route_text_refused(text):
    with pytest.raises(ValueError, match="expected auto, full, sparse or a list of full layers"):
        parse_route(text)


@pytest.mark.parametrize("route", [3, None, [1, -1], [1.0], [True]])
def test_route_values_refused(route):
    with pytest.raises(ValueError, match=r"\[FluxConfig\] route"):
        FluxConfig(route=route)


def test_route_names_layers_of_the_model():
    FluxConfig(route=[0, 29]).check_layers(30)
    FluxConfig(route="sparse").check_layers(1)
    with pytest.raises(ValueError, match=r"route names layers \[30\], but the model has layers 0 to 29"):
        FluxConfig(route=[0, 30]).check_layers(30)


def test_route_codes_are_the_ones_stored_in_caches():
    assert [(r.name, int(r)) for r in Route] == [("UNSET", 0), ("FULL", 1), ("SPARSE", 2)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a JSON object, got list"),
        ({"version": 2}, "reads version 1 of the flux section, got 2"),
        ({"patern": {}}, r"unknown keys \['patern'\]"),
        ({"pattern": {"windw": 3}}, r"\[PatternConfig\] unknown keys \['windw'\]"),
        ({"router": 7}, r"\[RouterConfig\] expected a JSON object, got int"),
    ],
)
def test_flux_section_refused(data, message):
    with pytest.raises(ValueError, match=message):
        FluxConfig.from_dict(data)


patterns = st.builds(
    PatternConfig,
    name=st.sampled_from(["streaming", "triangle", "xattention"]),
    block_size=st.sampled_from([16, 64, 128]),
    sink_tokens=st.integers(0, 500),
    window_tokens=st.integers(1, 5000),
    last_tokens=st.integers(0, 300),
    threshold=st.floats(0.0, 1.0, exclude_min=True),
    top_k_blocks=st.none() | st.integers(1, 9),
)
routes = st.sampled_from(["auto", "full", "sparse"]) | st.lists(st.integers(0, 40), max_size=5)
routers = st.builds(RouterConfig, pool_tokens=st.integers(1, 300), init_bias=st.floats(-9, 9))


@given(config=st.builds(FluxConfig, pattern=patterns, router=routers, route=routes))
def test_json_round_trip(config):
    assert FluxConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PatternConfig().block_size = 1
