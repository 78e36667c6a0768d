"""`flux_mlx.benchmark` as a user runs it, on shapes that take no time."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from flux_mlx import benchmark
from flux_mlx.benchmark_models import SHAPES, random_model, stock_view
from flux_mlx.benchmark_routes import make_routers_decide
from flux_mlx.benchmark_runs import Work, run_flux, run_stock
from flux_mlx.models import set_route
from parity_tests.tiny_directories import flux_directory
from parity_tests.tiny_models import flux_model, prompt

SIZES = ("--block-size", "8", "--sink-tokens", "8", "--window-tokens", "16", "--chunk", "32")
QUICK = ("--shape", "tiny", *SIZES, "-g", "3", "-n", "2")
KV_BYTES_A_TOKEN = 4 * 2 * 2 * 32 * 4  # layers, k and v, KV heads, D, float32


def run(*arguments: str) -> None:
    benchmark.main([*QUICK, *arguments])


def test_the_record_holds_both_sides_and_their_ceilings(tmp_path, capsys):
    path = tmp_path / "record.json"
    run("--lengths", "64", "100", "--json", str(path), "--show-routes")
    record = json.loads(path.read_text())
    assert record["complete"]
    assert record["model"]["weights"] == "random"
    assert record["settings"]["omega"] == 0.7
    assert [row["prompt_tokens"] for row in record["rows"]] == [64, 100]
    for row in record["rows"]:
        assert (row["layers"], row["routed_layers"], row["sparse_layers"], row["omega"]) == (4, 4, 3, 0.75)
        for side in ("stock", "flux"):
            figures = row[side]
            assert 0 < figures["prefill_s"]["min"] <= figures["prefill_s"]["median"] <= figures["prefill_s"]["max"]
            assert figures["first_token_s"]["median"] > figures["prefill_s"]["min"]
            assert figures["decode_tokens_per_s"]["median"] > 0
            assert figures["peak_bytes"] > record["model"]["bytes"]
        assert row["stock"]["kv_bytes"] >= KV_BYTES_A_TOKEN * row["prompt_tokens"]
        for phase in ("prefill", "decode"):
            assert 0 < row[phase]["visible_share"] < 1
            assert row[phase]["dense_layer_s"] > 0
    shown = capsys.readouterr().out
    assert "ceiling" in shown
    assert "64: 3 of 4 routed layers sparse; full: 0; sparse: 1,2,3" in shown


def test_a_batch_takes_routes_of_its_own_in_each_row(tmp_path, capsys):
    path = tmp_path / "record.json"
    run("--lengths", "80", "--batch-size", "3", "--bits", "4", "--json", str(path))
    (row,) = json.loads(path.read_text())["rows"]
    assert [line.partition(";")[0] for line in row["routes"]] == ["3 of 4 routed layers sparse"] * 3
    assert len(set(row["routes"])) == 3
    assert row["stock"]["kv_bytes"] >= 3 * KV_BYTES_A_TOKEN * 79


def test_evict_shows_in_the_allocators_bytes(tmp_path, capsys):
    path = tmp_path / "record.json"
    run("--lengths", "1500", "--kv-policy", "evict", "-n", "1", "--chunk", "512", "--json", str(path))
    record = json.loads(path.read_text())
    assert record["settings"]["kv_policy"] == "evict"
    assert record["rows"][0]["kv_bytes_share"] < 0.7


def test_the_crossover_is_reported(tmp_path, capsys):
    path = tmp_path / "record.json"
    run("--lengths", "40", "80", "--crossover", "--json", str(path), "-n", "1")
    record = json.loads(path.read_text())
    assert {40, 80} <= {row["prompt_tokens"] for row in record["rows"]}
    assert record["crossover"]["prefill"]["least_speedup"] > 0
    assert "decode: pays" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
def test_a_plot_is_drawn(tmp_path, capsys):
    path = tmp_path / "plot.svg"
    run("--lengths", "40", "70", "--plot", str(path))
    assert "Amdahl" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["plot.svg"]


def test_a_flux_directory_keeps_its_routes_and_pattern(tmp_path, capsys):
    directory = flux_directory(tmp_path / "tiny")
    path = tmp_path / "record.json"
    text = tmp_path / "prompt.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 3)
    arguments = ("--model", str(directory), "--prompt", str(text), "--lengths", "60", "-g", "3", "-n", "1")
    benchmark.main([*arguments, "--route", "1,3", "--json", str(path), "--show-routes"])
    record = json.loads(path.read_text())
    assert record["model"]["name"] == "tiny"
    assert record["text"]["source"] == "prompt.txt"
    assert record["rows"][0]["text_used"] == pytest.approx(60 / record["text"]["tokens"])
    assert (
        record["pattern"]["block_size"]
        == json.loads((directory / "config.json").read_text())["flux"]["pattern"]["block_size"]
    )
    assert "60: 2 of 4 routed layers sparse; full: 1,3; sparse: 0,2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", "64", "--omega", "1.5"), "expected a share in [0, 1], got '1.5'"),
        (("--lengths", "1"), "expected tokens, 2 or more, like 512, 32K or 1M; got '1'"),
        (("--lengths", "3G"), "got '3G'"),
        (("--lengths", "64", "-g", "1"), "expected an integer of 2 or more, got '1'"),
        (("--lengths", "64", "--omega", "0.5", "--route", "full"), "exclude each other"),
        (("--lengths", "64", "--kv-policy", "evict", "-b", "2"), "evict serves one row at a time"),
        (("--lengths", "64", "--route", "7"), "[7] are not routed layers"),
        (("--lengths", "64", "--json", "{tmp}"), "got the directory"),
        (("--lengths", "64", "--json", "{tmp}/none/x.json"), "there is no directory"),
        (("--lengths", "64", "--plot", "{tmp}/x.txt"), "--plot draws .png"),
        (("--lengths", "64", "--prompt", "{tmp}/none.txt"), "none.txt"),
        (("--lengths", "64", "--block-size", "0"), "block_size must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(*(word.format(tmp=tmp_path) for word in arguments))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plots_without_matplotlib_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run("--lengths", "64", "--plot", str(tmp_path / "x.png"))
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_lengths_are_read_with_units():
    assert [benchmark.length(text) for text in ("512", "32K", "256k", "1M")] == [512, 32768, 262144, 1 << 20]


@pytest.mark.parametrize("search", [(), ("--crossover",)])
def test_both_sides_generate_and_a_cut_run_leaves_what_it_had(tmp_path, monkeypatch, capsys, search):
    path = tmp_path / "record.json"
    compare = benchmark.compare

    def cut(bench, tokens):
        if tokens > 64:
            raise KeyboardInterrupt
        return compare(bench, tokens)

    monkeypatch.setattr(benchmark, "compare", cut)
    with pytest.raises(KeyboardInterrupt):
        run("--lengths", "64", "90", "--json", str(path), *search)
    record = json.loads(path.read_text())
    assert not record["complete"]
    assert ("crossover" in record) == bool(search)
    assert [row["prompt_tokens"] for row in record["rows"]] == [64]


def test_a_share_of_mlxs_memory_limit_holds_for_the_runs_only(monkeypatch, capsys):
    compare, usual, seen = benchmark.compare, mx.set_memory_limit(0), []
    mx.set_memory_limit(usual)

    def noted(bench, tokens):
        seen.append(mx.set_memory_limit(0))
        mx.set_memory_limit(seen[-1])
        return compare(bench, tokens)

    monkeypatch.setattr(benchmark, "compare", noted)
    for share in ((), ("--memory-share", "0.66")):
        run("--lengths", "40", *share)
    assert seen == [usual, int(0.66 * usual)]
    assert mx.set_memory_limit(usual) == usual


def test_memory_that_runs_out_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def fail(bench, tokens):
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr(benchmark, "compare", fail)
    with pytest.raises(SystemExit) as stopped:
        run("--lengths", "64", "--json", str(tmp_path / "record.json"))
    assert stopped.value.code == 1
    assert "stopped: [malloc] Unable to allocate; MLX held at most " in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 2])
def test_runs_measure_what_they_are_named_for(rows):
    flux = flux_model("qwen3")
    stock = stock_view(flux)
    work = Work([prompt(90, seed) for seed in range(rows)], generation_tokens=4, prefill_step_size=32)
    make_routers_decide(flux, (0, 2))
    by_router = run_flux(flux, work)
    assert by_router.sparse_layers == 2
    assert len(by_router.routes) == rows
    for run_of in (by_router, run_stock(stock, work)):
        assert 0 < run_of.prefill_s < run_of.first_token_s
        assert run_of.token_s > 0
        kv_bytes = rows * 90 * KV_BYTES_A_TOKEN
        assert 0.9 * kv_bytes < run_of.kv_bytes < run_of.peak_bytes
    set_route(flux, "full")
    assert run_flux(flux, work).sparse_layers == 0


def test_only_stocks_batch_takes_its_own_step(monkeypatch):
    flux, sizes = flux_model("qwen3"), []
    stock = stock_view(flux)
    plain = type(stock).__call__

    def sized(self, inputs, *rest, **named):
        sizes.append(inputs.shape)
        return plain(self, inputs, *rest, **named)

    monkeypatch.setattr(type(stock), "__call__", sized)
    work = Work([prompt(65, seed) for seed in range(2)], 2, prefill_step_size=32, batch_step_size=16)
    run_stock(stock, work)
    assert set(sizes) == {(2, 16), (2, 1)}
    sizes.clear()
    run_stock(stock, replace(work, prompts=work.prompts[:1]))
    assert (1, 32) in sizes


def test_the_smallest_prompt_runs_on_both_sides():
    flux = flux_model("llama")
    work = Work([prompt(2)], generation_tokens=2, prefill_step_size=32)
    for found in (run_flux(flux, work), run_stock(stock_view(flux), work)):
        assert found.first_token_s > found.prefill_s > 0


def test_shapes_are_built_by_mlx_lm():
    assert type(random_model(SHAPES["tiny"])).__module__ == "mlx_lm.models.qwen3"
    assert mx.isfinite(random_model(SHAPES["small"], 8)(mx.array([[1, 2, 3]]))).all()
