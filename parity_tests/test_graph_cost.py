"""A decoding step of a Flux model is less graph than stock's, in every kind of layer: counted by the benchmark."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from benchmarks import mlx_graph_cost, mlx_host_time
from flux_mlx.routed_block import RoutedBlock

LAYERS = 4


@pytest.fixture(scope="module", params=[4, 16])
def bits(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def rows(bits, tmp_path_factory) -> dict[str, dict]:
    """What the script finds, by kind of layers."""
    path = tmp_path_factory.mktemp("graph") / "found.json"
    mlx_graph_cost.main(["--shape", "tiny", "--bits", str(bits), "-g", "2", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["layers"] == LAYERS
    return {row["kind"]: row for row in record["rows"]}


def test_every_kind_of_layer_is_less_than_stocks(bits, rows):
    stock, full, sparse = (rows[kind]["nodes_a_layer"] for kind in ("stock", "full", "sparse"))
    views_of_products = {4: 0, 16: 3 * 7}[bits]  # of weights, inputs and outputs
    assert stock - full == 4 + views_of_products  # queries, keys, values and outputs are not transposed either
    assert full - sparse == 3  # nor sliced, and the kernel writes what the output projection reads
    assert rows["sparse, evict"]["nodes_a_layer"] == full
    assert sparse < rows["spread"]["nodes_a_layer"] < full
    assert min(row["least_build_s"] for row in rows.values()) > 0


def test_no_kind_of_node_is_flux_alone(rows):
    stock = rows["stock"]["nodes"]
    for row in rows.values():
        for name, count in row["nodes"].items():
            if not name.startswith("Compiled"):  # whose names tell what they are made of
                assert count <= stock.get(name, 0), f"{row['kind']}: {name}"
        compiled = [
            sum(n for name, n in found.items() if name.startswith("Compiled")) for found in (row["nodes"], stock)
        ]
        assert compiled == [LAYERS, LAYERS]


def test_host_time_says_how_far_full_layers_are_from_stock(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    arguments = ["--shape", "tiny", "--lengths", "300", "-g", "1", "--json", str(path)]
    mlx_host_time.main(arguments)
    assert json.loads(path.read_text())["logits_over_stock"]["300"] == {"stock_again": 0.0, "full": 0.0}
    step = RoutedBlock.decode_token
    monkeypatch.setattr(RoutedBlock, "decode_token", lambda self, *args: 1.001 * step(self, *args))
    mlx_host_time.main(arguments)
    found = json.loads(path.read_text())["logits_over_stock"]["300"]
    assert found["stock_again"] == 0.0 < found["full"] < 0.1


def test_what_was_replaced_is_put_back():
    before = mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention
    with mlx_graph_cost.cuda_graphs():
        assert mx.fast.rope is not before[1]
    assert before == (mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention)
