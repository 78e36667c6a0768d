"""The script that says what a GPU does while a model runs: its arithmetic, and what it has traced; there is no GPU."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from benchmarks import mlx_timeline
from benchmarks.mlx_timeline import TOKENS, Kernel, device_ceiling, gaps, short, summary
from flux_mlx import exact_prefill
from flux_mlx.benchmark_parts import visible_share
from flux_mlx.models import routed_layers
from flux_mlx.spec import PatternConfig
from parity_tests.tiny_models import flux_model, prompt, stock_model

TRACE = [
    Kernel("void mlx::core::cu::gemm", 100.0, 110.0),
    Kernel("copy", 102.0, 104.0),  # within the first
    Kernel("void kernel_sdpav_2pass<float>", 105.0, 120.0),  # begins before the first ends
    Kernel("flux_decode_bfloat16", 125.0, 128.0),
    Kernel("gemm", 158.0, 160.0),
]
PATTERN = ("--block-size", "8", "--sink-tokens", "8", "--window-tokens", "16")


def test_gaps_are_where_nothing_runs():
    assert list(gaps(TRACE)) == [
        (5.0, "void kernel_sdpav_2pass<float>", "flux_decode_bfloat16"),
        (30.0, "flux_decode_bfloat16", "gemm"),
    ]
    assert list(gaps(TRACE[:1])) == []


def test_names_go_without_what_every_template_says():
    assert short("void mlx::core::cu::(anonymous namespace)::rope<bool>(int)") == "rope<bool>(int)"
    assert len(short("x" * 500)) == mlx_timeline.NAME_CHARACTERS


def test_the_summary_adds_up():
    found = summary(TRACE)
    assert (found["span_us"], found["busy_us"], found["idle_us"]) == (60.0, 25.0, 35.0)
    assert (found["idle_in_long_gaps_us"], found["long_gaps"]) == (30.0, 1)
    assert found["overlapped_us"] == 2.0 + 5.0
    assert found["attention_us"] == 15.0 + 3.0
    assert found["launches"] == 5
    assert found["kernels"][:2] == [
        {"name": "kernel_sdpav_2pass<float>", "launches": 1, "total_us": 15.0, "median_us": 15.0},
        {"name": "gemm", "launches": 2, "total_us": 12.0, "median_us": 6.0},
    ]
    assert [gap["us"] for gap in found["longest_gaps"]] == [30.0, 5.0]


def test_our_own_kernels_are_named_however_short(monkeypatch):
    monkeypatch.setattr(mlx_timeline, "NAMED_KERNELS", 1)
    assert [row["name"] for row in summary(TRACE)["kernels"]] == ["kernel_sdpav_2pass<float>", "flux_decode_bfloat16"]


def test_no_kernels_are_refused():
    with pytest.raises(ValueError, match=r"\[summary\] expected kernels, got none"):
        summary([])


def test_the_ceiling_of_the_device_is_that_of_busy_times():
    stock = {"busy_us": 12700.0, "attention_us": 36 * 183.4}
    share = visible_share(PatternConfig(), 1, 131072)
    found = device_ceiling(stock, {"busy_us": 8340.0}, 36, 25, share)
    ideal = 12700 - 25 * 183.4 * (1 - share)
    assert found["ceiling_of_device"] == pytest.approx(12700 / ideal)
    assert found["fraction_of_device_ceiling"] == pytest.approx(ideal / 8340)
    unknown = device_ceiling(stock | {"attention_us": 0.0}, {"busy_us": 8340.0}, 36, 25, share)
    assert set(unknown.values()) == {None}


@pytest.mark.parametrize("step", [16, 64])
def test_stocks_prefill_ends_where_the_first_token_begins(step):
    model, calls = stock_model("qwen3"), []

    class Watched:
        layers = model.layers

        def __call__(self, tokens, **options):
            calls.append(tokens.shape[1])
            return model(tokens, **options)

    mlx_timeline.stock_prefill(Watched(), mx.array(prompt(50)), step)
    assert calls == ([49] if step == 64 else [16, 16, 16, 1])


def test_flux_prefill_is_exact_prefill_of_the_prompt(monkeypatch):
    caches, run = [], exact_prefill.prefill
    monkeypatch.setattr(
        mlx_timeline, "prefill", lambda *args, **options: caches.append(args[2]) or run(*args, **options)
    )
    mlx_timeline.flux_prefill(flux_model("qwen3"), mx.array(prompt(50)), 16)
    assert {entry.offset for entry in caches[0]} == {49}


def test_rows_of_all_kinds(tmp_path, monkeypatch):
    forced, path = [], tmp_path / "timeline.json"
    monkeypatch.setattr(mlx_timeline, "traced", lambda run: (run(), TRACE)[1])

    def watch(run):
        def watched(model, *args):
            forced.append([attn.forced for attn in routed_layers(model).values()])
            run(model, *args)

        return watched

    for name in ("flux_prefill", "stock_prefill"):
        monkeypatch.setattr(mlx_timeline, name, watch(getattr(mlx_timeline, name)))
    sizes = ("--shape", "tiny", *PATTERN, "--chunk", "32", "-n", "1", "--json", str(path))
    mlx_timeline.main([*sizes, "--prefill", "100", "--decode", "200"])
    rows = json.loads(path.read_text())["rows"]
    prefills, decodes = rows[:5], rows[5:]
    kinds = ["stock", "forced", "routed", "forced, stock's chunks", "routed, stock's chunks"]
    assert [row["kind"] for row in prefills] == kinds
    assert [row["kind"] for row in decodes] == ["stock", "full", "spread"]
    assert [row["of"] for row in rows] == 5 * ["prefill"] + 3 * [f"{TOKENS} tokens decoded"]
    assert all(row["untraced_s"] > 0 and row["busy_us"] == 25.0 for row in rows)
    assert [row["token_busy_us"] for row in decodes] == 3 * [25.0 / TOKENS]
    assert "ceiling_of_device" not in decodes[0]
    assert decodes[1]["ceiling_of_device"] == decodes[1]["fraction_of_device_ceiling"] == 1.0
    assert decodes[2]["ceiling_of_device"] > 1.0
    routed = [None in routes for routes in forced if routes]  # stock's model has none
    assert routed == 2 * (3 * [False] + 3 * [True])  # a run before, one timed, one traced


def test_lengths_are_those_of_prefill_and_of_decode(capsys):
    with pytest.raises(SystemExit):
        mlx_timeline.main(["--lengths", "100"])
    assert "unrecognized arguments: --lengths" in capsys.readouterr().err
