"""The pieces of `flux_mlx.benchmark`: shapes, routes, prompts, the ceiling, the crossover, what is written."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.utils import _get_classes

import flux_mlx
from flux_mlx import benchmark_parts
from flux_mlx.benchmark_crossover import GAIN, bracket, find_crossover, lengths_between
from flux_mlx.benchmark_models import GROUP_SIZE, SHAPES, parameter_bytes, random_model, stock_view
from flux_mlx.benchmark_parts import (
    AttentionShape,
    Ceiling,
    decode_seconds,
    dense,
    prefill_seconds,
    sparse,
    sparse_decode,
    visible_share,
)
from flux_mlx.benchmark_report import check_plot, check_target, write_json
from flux_mlx.benchmark_routes import make_routers_decide, spread_full_layers
from flux_mlx.benchmark_text import Prompts, read_text, word_ids
from flux_mlx.models import routed_layers
from flux_mlx.spec import FluxConfig, Route, visible_mask
from parity_tests.tiny_models import PATTERN, ROUTER, flux_model, prompt

TINY = SHAPES["tiny"]
GRAPH_NODES = 100  # that MLX hands to a CUDA device together
PUBLISHED_PARAMETERS = {"qwen3-4b": 4.02e9, "qwen3-8b": 8.19e9, "llama-3.1-8b": 8.03e9}


@pytest.mark.parametrize(("bits", "bytes_a_weight"), [(16, 4), (8, 1.125), (4, 0.625)])
def test_random_weights_are_stored_as_asked_and_keep_activations_in_size(bits, bytes_a_weight):
    model = random_model(TINY, bits)
    plain = [array for _, array in tree_flatten(random_model(TINY).parameters())]
    matrices, vectors = (sum(a.size for a in plain if (a.ndim > 1) == is_matrix) for is_matrix in (True, False))
    assert parameter_bytes(model) == matrices * bytes_a_weight + 4 * vectors
    logits = model(mx.array([prompt(50)]))
    assert np.isfinite(np.array(logits)).all()
    assert 0.3 < float(logits.std()) < 3


def test_quantised_weights_are_uniform_about_zero():
    projection = random_model(TINY, 4).layers[1].mlp.down_proj
    weight = mx.dequantize(projection.weight, projection.scales, projection.biases, GROUP_SIZE, 4)
    values, counts = np.unique(np.round(np.array(weight), 6), return_counts=True)
    assert len(values) == 16
    assert counts.min() > 0.8 * counts.mean()
    assert abs(float(weight.mean())) < 0.05 * float(weight.std())
    assert float(weight.std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)


def test_random_weights_come_from_the_seed():
    first, again, other = (random_model(TINY, 4, seed=seed).layers[2].mlp.up_proj.weight for seed in (1, 1, 2))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)
    with pytest.raises(ValueError, match=r"\[random_model\] bits must be one of \[4, 8, 16\], got 5"):
        random_model(TINY, 5)


@pytest.mark.parametrize("shape", PUBLISHED_PARAMETERS)
def test_shapes_have_the_published_number_of_parameters(shape):
    model_class, args = _get_classes(SHAPES[shape])
    lazy = model_class(args.from_dict(SHAPES[shape]))  # nothing is computed
    size = sum(array.size for _, array in tree_flatten(lazy.parameters()))
    assert size == pytest.approx(PUBLISHED_PARAMETERS[shape], rel=0.002)


def test_the_stock_view_is_mlx_lms_own_model_over_the_same_arrays():
    flux = flux_mlx.apply(random_model(TINY), FluxConfig(pattern=PATTERN, router=ROUTER, route="sparse"))
    stock, tokens = stock_view(flux), mx.array([prompt(40)])
    assert type(stock) is qwen3.Model
    assert {type(layer.self_attn) for layer in stock.layers} == {qwen3.Attention}
    ours, theirs = (dict(tree_flatten(model.parameters())) for model in (flux, stock))
    assert {name for name in ours if ".router." not in name} == set(theirs)
    assert all(theirs[name] is ours[name] for name in theirs)
    assert mx.array_equal(stock(tokens), random_model(TINY)(tokens))
    assert routed_layers(flux)
    assert not mx.array_equal(stock(tokens), flux(tokens))
    with pytest.raises(ValueError, match=r"\[stock_view\] expected a Flux model, got Model"):
        stock_view(stock)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_the_stock_view_of_a_family_computes_what_stock_computes(family):
    flux, tokens = flux_model(family, route="full"), mx.array([prompt(40)])
    assert mx.array_equal(stock_view(flux)(tokens), flux(tokens))


def test_full_layers_are_spread_over_the_depth():
    assert spread_full_layers(range(36), 0.7) == (0, 3, 6, 9, 13, 16, 19, 22, 26, 29, 32)
    assert spread_full_layers([1, 3, 5, 7, 9], 0.6) == (1, 5)
    assert spread_full_layers([1, 3, 5, 7, 9], 0.6, shift=4) == (3, 9)
    assert spread_full_layers(range(7), 1.0) == ()
    assert spread_full_layers(range(7), 0.0) == tuple(range(7))
    with pytest.raises(ValueError, match=r"omega in \[0, 1\], got 7 and 1.5"):
        spread_full_layers(range(7), 1.5)


def test_routers_run_and_decide_as_they_are_made_to():
    model = flux_model("qwen3")
    for full in ((0, 3), (1,), ()):
        make_routers_decide(model, full)
        cache = model.make_cache()
        flux_mlx.prefill(model, mx.array(prompt(70)), cache)
        assert [i for i, route in enumerate(flux_mlx.routes(cache)) if route == Route.FULL] == list(full)


def test_prompts_tile_the_text_and_rows_go_on():
    prompts = Prompts("abcde", lambda text: [ord(c) for c in text])
    assert bytes(prompts.prompt(7)) == b"abcdeab"
    assert bytes(prompts.prompt(7, row=1)) == b"cdeabcd"
    assert prompts.repeats(10, rows=2) == 4
    with pytest.raises(ValueError, match="no token"):
        Prompts("", lambda text: [])


def test_text_is_read_or_refused(tmp_path):
    text, source = read_text(None)
    assert len(text) > 300_000
    assert "manual" in source
    file = tmp_path / "book.txt"
    file.write_text("Call me Ishmael.")
    assert read_text(str(file)) == ("Call me Ishmael.", "book.txt")
    ids = word_ids("a word, a word", 100)
    assert len(ids) == 8
    assert ids[:3] == ids[5:]
    assert max(ids) < 100
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_text(str(file))
    file.write_text("  ")
    with pytest.raises(ValueError, match="expected text in"):
        read_text(str(file))


def test_visible_share_is_that_of_the_mask():
    mask = visible_mask(PATTERN, 23, 70)
    causal = np.tril(np.ones((70, 70)))[-23:]
    assert visible_share(PATTERN, 23, 70) == pytest.approx(mask.sum() / causal.sum())


def test_the_ceiling_is_amdahls():
    ceiling = Ceiling(stock_s=10.0, dense_layer_s=0.2, visible_share=0.25, layers=30, sparse_layers=20)
    assert ceiling.everything_else_s == pytest.approx(4.0)
    assert ceiling.ideal_s == pytest.approx(4.0 + 10 * 0.2 + 20 * 0.05)
    columns = ceiling.columns(flux_s=8.0, sparse_layer_s=0.1)
    assert columns["ceiling"] == pytest.approx(10 / 7)
    assert columns["speedup"] == pytest.approx(1.25)
    assert columns["fraction_of_ceiling"] == pytest.approx(7 / 8)
    assert columns["sparse_fraction_of_ideal"] == pytest.approx(0.5)
    assert columns["lost_in_sparse_attention_s"] == pytest.approx(20 * 0.05)
    assert columns["lost_elsewhere_s"] == pytest.approx(8.0 - 7.0 - 1.0)
    noisy = Ceiling(stock_s=5.0, dense_layer_s=0.2, visible_share=0.25, layers=30, sparse_layers=20)
    assert noisy.columns(4.0, 0.1)["ceiling"] is None


def test_attention_is_called_as_a_model_calls_it():
    shape = AttentionShape.of(flux_model("qwen3"), batch=2)
    assert (shape.layers, shape.q_heads, shape.kv_heads, shape.head_dim) == (4, 4, 2, 32)
    seen = {"dense": set(), "sparse": set()}

    def watched(name, attend):
        def call(q, kv):
            seen[name].add((q.shape[0], q.shape[2], kv.offset))
            return attend(q, kv)

        return call

    attends = {"dense": watched("dense", dense), "sparse": watched("sparse", sparse(PATTERN, 70))}
    times = prefill_seconds(shape, 70, 32, attends)
    assert seen["dense"] == seen["sparse"] == {(2, 32, 32), (2, 32, 64), (2, 5, 69)}
    assert min(times.values()) > 0
    attends = {"dense": watched("dense", dense), "sparse": watched("sparse", sparse_decode(PATTERN))}
    assert min(decode_seconds(shape, 70, attends).values()) > 0
    assert (2, 1, 70) in seen["sparse"]


class FakeDevice:
    """A host and a device with clocks of their own; work is handed over in graphs, and begins when one is whole."""

    def __init__(self, host_s: float, device_s: float, nodes: int = 1, wait_s: float = 2e-5):
        self.host_s, self.device_s, self.nodes, self.wait_s = host_s, device_s, nodes, wait_s
        self.now = self.free = 0.0
        self.unevaluated = self.calls = 0

    def perf_counter(self) -> float:
        return self.now

    def call(self, x: int, index: int) -> int:
        self.unevaluated += 1
        self.calls += 1
        return index

    def async_eval(self, _: int) -> None:
        while self.unevaluated:
            together = min(self.unevaluated, GRAPH_NODES // self.nodes)
            self.now += together * self.host_s
            self.free = max(self.free, self.now) + together * self.device_s
            self.unevaluated -= together

    def eval(self, x: int) -> None:
        self.async_eval(x)
        self.now = max(self.now, self.free) + self.wait_s


@pytest.mark.parametrize("nodes", [1, 2, 5])
@pytest.mark.parametrize("device_us", [8.5, 20, 50, 100, 183, 550, 4400, 7000, 20_000, 300_000])
def test_the_start_of_a_row_of_calls_does_not_count(device_us, nodes, monkeypatch):
    device = FakeDevice(35e-6, 1e-6 * device_us, nodes)
    monkeypatch.setattr(benchmark_parts, "time", device)
    monkeypatch.setattr(benchmark_parts, "mx", device)
    expected = 1e-6 * max(35, device_us)
    assert benchmark_parts.seconds_a_call(device.call, 0) == pytest.approx(expected, rel=0.006)
    assert device.now < max(0.07, 12 * expected)


@pytest.mark.parametrize("longer_s", [0.4, 0.5])
def test_a_call_never_takes_less_than_nothing(longer_s, monkeypatch):
    times = iter([0.001, 0.001] + 3 * [0.5, longer_s])  # 5 calls and 10
    monkeypatch.setattr(benchmark_parts, "_seconds", lambda *_: next(times))
    assert benchmark_parts.seconds_a_call(None, None) == pytest.approx(longer_s / 10)


def test_longer_and_shorter_rows_are_timed_in_turn(monkeypatch):
    rows = []
    monkeypatch.setattr(benchmark_parts, "_seconds", lambda call, q, calls: rows.append(calls) or 0.001 * calls)
    assert benchmark_parts.seconds_a_call(None, None) == pytest.approx(0.001)
    assert rows == [1, 1] + 3 * [5, 10]


def test_the_bracket_of_a_crossover_forgives_one_lucky_length():
    good, bad = 1 + 2 * GAIN, 1 - GAIN
    assert bracket({100: bad, 200: good, 400: bad, 800: good}) == (400, 800)
    assert bracket({100: good, 200: good}) == (None, 100)
    assert bracket({100: good, 200: bad}) == (200, None)
    assert lengths_between(512, 3000) == [512, 1024, 2048, 3000]
    assert lengths_between(512, 512) == [512]


@pytest.mark.parametrize("true_crossover", [150, 700, 1000, 3000])
def test_the_crossover_is_found_within_its_resolution(true_crossover):
    measured = []

    def measure(tokens):
        measured.append(tokens)
        speedup = 1.5 if tokens >= true_crossover else 0.9
        return {"prompt_tokens": tokens, "prefill": {"speedup": speedup}, "decode": {"speedup": 1.0}}

    found = find_crossover(measure, 100, 2000)
    prefill = found["crossover"]["prefill"]
    assert len(set(measured)) == len(measured) == len(found["rows"]) < 16
    if true_crossover > 2000:
        assert prefill["pays_from_tokens"] is None
    else:
        low, high = prefill["does_not_pay_at_tokens"], prefill["pays_from_tokens"]
        assert low < true_crossover <= high <= low / 0.9 + 1
    assert prefill["least_speedup"] == 0.9
    assert prefill["costs_too_much"]
    assert found["crossover"]["decode"]["pays_from_tokens"] is None
    assert not found["crossover"]["decode"]["costs_too_much"]
    with pytest.raises(ValueError, match="expected 2 <= shortest <= longest, got 9 and 5"):
        find_crossover(measure, 9, 5)


def test_records_are_written_whole(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_targets_are_refused_before_anything_is_measured(tmp_path):
    check_target(None)
    check_target(tmp_path / "new.json")
    with pytest.raises(IsADirectoryError):
        check_target(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        check_target(tmp_path / "none" / "new.json")
    with pytest.raises(ValueError, match=r"--plot draws .png, .svg, .pdf, got plot.jpeg"):
        check_plot(tmp_path / "plot.jpeg")
