"""The scripts behind the MLX path's figures run on tiny shapes; the predictions' arithmetic is checked by hand."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import apple_prediction, mlx_host_time, mlx_prediction, mlx_report, mlx_router_cost
from benchmarks.mlx_prediction import QWEN3_4B, QWEN3_8B, SMALL, Machine
from flux_mlx import benchmark, kernel_policy
from flux_mlx.benchmark_models import SHAPES
from flux_mlx.benchmark_parts import visible_share
from flux_mlx.spec import PatternConfig

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "benchmarks" / "mlx_cuda.sh"
SIZES = ("--shape", "tiny", "--block-size", "8", "--sink-tokens", "8", "--window-tokens", "16", "--chunk", "32")

WIDE = ("--block-size", "32", "--sink-tokens", "32", "--window-tokens", "64", "--chunk", "512")


def rows_of(script: str, tmp_path: Path, *arguments: str) -> dict:
    path = tmp_path / f"{script}.json"
    importlib.import_module(f"benchmarks.{script}").main([*SIZES, *arguments, "--json", str(path)])
    return json.loads(path.read_text())


def test_sparse_layer(tmp_path):
    record = rows_of("mlx_sparse_layer", tmp_path, "--lengths", "100", "--decode-lengths", "64", "128")
    prefill, short, long = record["rows"]
    assert prefill["ideal_s"] == pytest.approx(prefill["dense_s"] * prefill["visible_share"])
    assert prefill["fraction_of_ideal"] == pytest.approx(prefill["ideal_s"] / prefill["sparse_s"])
    assert record["sparse_decode_longest_over_shortest"] == pytest.approx(long["sparse_s"] / short["sparse_s"])


def test_exact_cost_compares_equal_routes(tmp_path):
    (row,) = rows_of("mlx_exact_cost", tmp_path, "--lengths", "100", "-n", "2")["rows"]
    assert row["hidden_buffer_bytes"] == 100 * 128 * 4
    assert row["runs"]["exact, spread"]["sparse_layers"] == 3
    assert row["runs"]["exact, full"]["sparse_layers"] == 0
    assert row["exact_over_chunked_spread"] > 0
    assert row["peak_over_allowed_full"] > 0


def test_router_cost_is_that_of_neighbouring_runs(tmp_path, monkeypatch):
    switched_off = []
    use = kernel_policy.use_cuda_router

    def noted(*call):
        switched_off.append(frozenset(kernel_policy.RECORD.switched_off))
        return use(*call)

    monkeypatch.setattr(kernel_policy, "use_cuda_router", noted)
    (row,) = rows_of("mlx_router_cost", tmp_path, "--lengths", "100", "-n", "3")["rows"]
    sparse = {kind: run["sparse_layers"] for kind, run in row["runs"].items()}
    assert sparse == dict.fromkeys(("as used", "operations", "forced", "routes at hand", "apart", "routers aside"), 3)
    times = [row["runs"][kind]["all_prefill_s"] for kind in ("as used", "operations", "forced")]
    used, operations = (np.median(np.divide(mine, times[2])) - 1 for mine in times[:2])
    assert (row["share"], row["share_of_operations"]) == pytest.approx((used, operations))
    assert row["router_s_of_operations"] == pytest.approx(np.median(np.subtract(times[1], times[2])))
    ratios = np.divide(times[0], times[2]) - 1
    assert row["share_interval"] == pytest.approx((min(ratios), max(ratios)))  # of three rounds no less
    assert not row["has_kernels"]
    assert set(switched_off) == {frozenset(), frozenset({"router"})}
    assert not kernel_policy.RECORD.switched_off


@pytest.mark.parametrize("n", [6, 30, 100])
def test_the_interval_of_a_median_holds_it_95_times_of_100(n):
    draws = np.random.default_rng(n).standard_cauchy((2000, n))
    held = [low <= 0 <= high for low, high in map(mlx_router_cost.median_interval, draws)]
    assert 0.945 < np.mean(held) < 0.985


def test_stock_commands_run_stock_beside_both_kinds_of_routes(tmp_path):
    (row,) = rows_of("mlx_stock_commands", tmp_path, "--lengths", "100", "-n", "3")["rows"]
    assert {kind: run["sparse_layers"] for kind, run in row["runs"].items()} == {"stock": 0, "forced": 3, "routed": 3}
    stock, forced, routed = (row["runs"][kind]["all_first_token_s"] for kind in ("stock", "forced", "routed"))
    assert row["first_token_speedup_forced"] == pytest.approx(np.median(np.divide(stock, forced)))
    assert row["first_token_speedup_routed"] == pytest.approx(np.median(np.divide(stock, routed)))
    assert row["prefill_speedup_routed"] > 0
    assert not row["is_dense"]


def test_evict_holds_less_and_keep_as_much_as_stock(tmp_path):
    (row,) = rows_of("mlx_kv_memory", tmp_path, *WIDE, "--lengths", "2000", "-n", "1")["rows"]
    assert row["evict_over_stock"] < 0.6
    assert row["keep_over_stock"] > 0.95


def test_sparse_layers_stay_small_in_a_long_prompt(tmp_path):
    short, long = rows_of("mlx_million", tmp_path, "--lengths", "600", "1500")["rows"]
    assert short["largest_sparse_cache_bytes"] == long["largest_sparse_cache_bytes"] > 0
    assert [layer["route"] for layer in long["layers"]] == ["FULL", "SPARSE", "SPARSE", "SPARSE"]
    assert long["layers"][0]["cache_bytes"] > 1.5 * short["layers"][0]["cache_bytes"]
    assert long["peak_bytes"] >= max(layer["held_bytes"] for layer in long["layers"])


def test_decode_is_timed_over_filled_caches(tmp_path):
    record = rows_of("mlx_decode", tmp_path, "--lengths", "300", "-n", "2", "--omegas", "0.5", "1")
    half, whole = record["rows"]
    assert (half["sparse_layers"], whole["sparse_layers"]) == (2, 4)
    for row in (half, whole):
        assert row["speedup"] == pytest.approx(row["stock_token_s"] / row["keep_token_s"], rel=0.5)
        assert row["evict_token_s"] > 0
        assert 0 < row["visible_share"] < 1


def test_scripts_refuse_targets_that_cannot_be_written(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rows_of("mlx_router_cost", tmp_path / "none")
    assert "there is no directory" in capsys.readouterr().err


def stage_commands() -> dict[str, str]:
    text = DRIVER.read_text()
    batch = re.search(r"^batch\(\) { (compare .*); }$", text, re.MULTILINE)[1].replace("$1", "32K")
    found = dict(re.findall(r"^    ([\w-]+)\) (.*?) ;;", text, re.MULTILINE))
    return found | {"batch": batch}


def test_the_driver_lists_its_stages():
    done = subprocess.run(["sh", str(DRIVER), "list"], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(stage_commands())
    refused = subprocess.run(["sh", str(DRIVER), str(ROOT), "none"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no stage none" in refused.stderr


@pytest.mark.parametrize(("python", "code"), [("echo", 0), ("false", 1)])
def test_the_driver_goes_on_after_a_failure_and_tells_of_it(tmp_path, python, code):
    environment = os.environ | {"PYTHON": python, "MLX_PTX_CACHE_DIR": str(tmp_path / "ptx")}
    command = ["sh", str(DRIVER), str(tmp_path), "layer", "short"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code
    assert ("failed: layer short" in done.stderr) == bool(code)
    log = (tmp_path / "mlx_cuda.log").read_text()
    assert log.count(" took ") == 2
    assert ("-m benchmarks.mlx_sparse_layer --lengths 32K 128K" in log) != bool(code)


def test_the_driver_names_records_as_the_report_does(tmp_path):
    environment = os.environ | {"PYTHON": "echo", "MLX_PTX_CACHE_DIR": str(tmp_path / "ptx")}
    wanted = {f"mlx_{stage.replace('-', '_')}" for stage in stage_commands()}
    assert wanted >= {*mlx_report.COMPARED, *mlx_report.LATER}
    subprocess.run(["sh", str(DRIVER), str(tmp_path), *stage_commands()], env=environment, check=True)
    written = re.findall(r"--json \S+/(\w+)\.json", (tmp_path / "mlx_cuda.log").read_text())
    assert set(written) == wanted


@pytest.mark.parametrize("stage", stage_commands())
def test_the_drivers_commands_are_ones_that_the_scripts_take(stage, monkeypatch):
    kind, *words = shlex.split(stage_commands()[stage].replace("$json", "out.json"))
    if kind == "compare":
        args = benchmark.setup_arg_parser().parse_args(["--shape", "qwen3-8b", "--show-routes", *words])
        assert args.omega in (0.7, 0.77)
        return
    module = importlib.import_module(f"benchmarks.{words[0]}")
    seen = []
    monkeypatch.setattr(module, "parse", lambda made, argv: seen.append(made.parse_args(argv)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.main(words[1:])
    assert seen[0].json == Path("out.json")


@pytest.mark.parametrize(("shape", "name"), [(QWEN3_8B, "qwen3-8b"), (QWEN3_4B, "qwen3-4b"), (SMALL, "small")])
def test_predicted_shapes_are_the_measured_ones(shape, name):
    config = SHAPES[name]
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
    sizes += ("num_key_value_heads", "head_dim")
    ours = (shape.layers, shape.hidden, shape.intermediate, shape.vocabulary, shape.q_heads, shape.kv_heads)
    assert (*ours, shape.head_dim) == tuple(config[size] for size in sizes)


def test_predictions_are_operations_over_rates():
    assert QWEN3_8B.layer_weights == 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288
    machine = Machine("", {16: 100.0}, 50.0, 1000.0, 0.001, 0.5)
    tokens = 8192
    dense = 4 * 4096 * tokens * (tokens + 1) / 2 / 50e12
    assert mlx_prediction.attention_s(QWEN3_8B, machine, tokens, None) == pytest.approx(dense)
    share = visible_share(PatternConfig(), tokens, tokens)
    sparse = mlx_prediction.attention_s(QWEN3_8B, machine, tokens, PatternConfig())
    assert sparse == pytest.approx(dense * share / 0.5)
    saved = mlx_prediction.prefill_s(QWEN3_8B, machine, 16, tokens) - mlx_prediction.prefill_s(
        QWEN3_8B, machine, 16, tokens, 20
    )
    assert saved == pytest.approx(20 * (dense - sparse) - mlx_prediction.router_s(QWEN3_8B, machine, 16))
    keys = 36 * tokens * 4096
    one = 0.001 + (2 * QWEN3_8B.read_weights + keys) / 1e12
    assert mlx_prediction.token_s(QWEN3_8B, machine, 16, tokens) == pytest.approx(one)


def test_the_stages_are_the_drivers_and_fit_into_a_sitting_of_half_an_hour():
    assert list(mlx_prediction.stages()) == list(stage_commands())
    assert 60 + sum(mlx_prediction.stages().values()) < 1800


def test_a_comparison_takes_its_warm_up_and_a_batch_takes_stocks_masks():
    prompts = sum(mlx_prediction.prefill_s(QWEN3_8B, mlx_prediction.H100, 4, 4096, n) for n in (0, 25))
    none, one = (mlx_prediction.compare_s(4, 4096, 25, trials, 0) for trials in (0, 1))
    assert one - none == pytest.approx(prompts)
    assert none > prompts
    masks = 8 * 32 * (2048 * 2048 + 2048 * 4096) * 2
    assert mlx_prediction.masks_s(4096, 8) == pytest.approx(36 * 6 * masks / 3e12)
    rows = [mlx_prediction.compare_s(4, 4096, 25, 1, 0, rows=n) for n in (1, 8)]
    assert rows[1] == pytest.approx(8 * rows[0] + 2 * 36 * 6 * masks / 3e12)


def test_the_page_shows_what_the_arithmetic_says():
    page = (ROOT / "docs" / "speed.md").read_text()
    reached = apple_prediction.reached_on_m4_max()
    tables = [mlx_prediction.known_table(), mlx_prediction.runs_table(), mlx_prediction.stages_table()]
    tables.append(mlx_prediction.short_table())
    tables += apple_prediction.as_text(apple_prediction.predictions(reached), reached).split("\n\n")[1:]
    assert all(table in page for table in tables)


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "speed.md").read_text()
    assert all(table in page for table in mlx_report.tables())


def rows_shown(table: str) -> list[list[str]]:
    """Cells of a markdown table without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def compared(tmp_path: Path, stage: str, *arguments: str) -> dict:
    path = tmp_path / f"mlx_{stage}.json"
    benchmark.main([*SIZES, *arguments, "-n", "1", "-g", "2", "--omega", "0.75", "--json", str(path)])
    return json.loads(path.read_text())


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    """A folder of records beside those that the page has shown from the start."""
    for path in mlx_report.FOLDER.glob("mlx_*.json"):
        if path.stem not in mlx_report.LATER and path.stem != "mlx_4bit_256k":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(mlx_report, "FOLDER", tmp_path)
    return tmp_path


def test_a_record_that_comes_later_adds_its_table(records):
    before = mlx_report.tables()
    rows_of("mlx_stock_commands", records, "--lengths", "100", "-n", "1")
    (records / "mlx_stock_commands.json").rename(records / "mlx_commands.json")
    assert mlx_report.tables() == [*before, mlx_report.commands_table()]
    whole = compared(records, "4bit_256k", "--lengths", "64")
    assert mlx_report.prefill_table().startswith(before[0])
    added = rows_shown(mlx_report.prefill_table())[-1]
    assert added[:2] == ["16", "64"]
    assert added[3] == f"{whole['rows'][0]['stock']['prefill_s']['median']:.2f}"


def test_the_table_of_stocks_commands(records):
    (row,) = rows_of("mlx_stock_commands", records, "--lengths", "100", "-n", "2")["rows"]
    (records / "mlx_stock_commands.json").rename(records / "mlx_commands.json")
    ((tokens, *cells),) = rows_shown(mlx_report.commands_table())
    times = [row["runs"][kind]["prefill_s"] for kind in ("stock", "forced", "routed")]
    ratios = [row[f"prefill_speedup_{kind}"] for kind in ("forced", "routed")]
    ratios += [row[f"first_token_speedup_{kind}"] for kind in ("forced", "routed")]
    assert tokens == "100"
    assert [float(cell) for cell in cells] == pytest.approx(times + ratios, abs=0.006)


def test_the_table_of_a_batch(records):
    (row,) = compared(records, "batch", "--batch-size", "2", "--lengths", "64")["rows"]
    (cells,) = rows_shown(mlx_report.batch_table())
    assert cells[:2] == ["2", "64"]
    assert float(cells[4]) == pytest.approx(row["prefill"]["speedup"], abs=0.006)
    assert float(cells[6]) == pytest.approx(2 / row["stock"]["token_s"]["median"], abs=0.6)
    row["decode"]["ceiling"] = None
    (records / "mlx_batch.json").write_text(json.dumps({"rows": [row]}))
    assert rows_shown(mlx_report.batch_table())[0][9] == ""


def test_the_table_of_a_million_tokens(records):
    short, long = rows_of("mlx_million", records, "--lengths", "300", "600")["rows"]
    shown = rows_shown(mlx_report.million_table())
    assert [cells[0] for cells in shown] == ["300", "600"]
    assert shown[0][7] == shown[1][7] == f"{short['largest_sparse_cache_bytes'] / 1e6:.2f}"
    sparse = np.median([layer["seconds"] for layer in long["layers"][1:]])
    assert float(shown[1][8]) == pytest.approx(1e6 * sparse / 600, abs=6e-4)


def test_the_table_of_the_crossover(records):
    found = compared(records, "crossover", "--crossover", "--lengths", "8", "16")
    by_length, by_phase = (rows_shown(table) for table in mlx_report.crossover_table().split("\n\n"))
    assert [int(cells[0]) for cells in by_length] == [row["prompt_tokens"] for row in found["rows"]]
    assert [float(cells[1]) for cells in by_length] == pytest.approx(
        [row["prefill"]["speedup"] for row in found["rows"]], abs=6e-4
    )
    prefill = found["crossover"]["prefill"]
    expected = [str(prefill[name] or "none measured") for name in ("pays_from_tokens", "does_not_pay_at_tokens")]
    assert by_phase[0][:3] == ["prefill", *expected]
    assert [cells[0] for cells in by_phase] == ["prefill", "decode"]


def test_a_token_s_time_is_split_into_its_parts(tmp_path):
    rows = rows_of("mlx_host_time", tmp_path, "--lengths", "300", "-g", "3")["rows"]
    assert [row["kind"] for row in rows] == ["stock", "full", "spread", "sparse", "sparse, evict"]
    for row in rows:
        assert min(row[part] for part in mlx_host_time.PARTS) > 0
        assert row["total_s"] >= 0.9 * row["build_s"]


def test_the_predicted_crossover_is_one():
    machine = Machine("", {4: 10.0}, 10.0, 500.0, 0.003, 0.8)
    tokens = mlx_prediction.crossover_tokens(QWEN3_8B, machine, 4, 25)

    def gain(length: int) -> float:
        stock = mlx_prediction.prefill_s(QWEN3_8B, machine, 4, length)
        return stock / mlx_prediction.prefill_s(QWEN3_8B, machine, 4, length, 25)

    assert gain(tokens) >= 1.02 > gain(tokens - 64)


def test_every_chip_has_its_sources_and_the_record_is_the_one_of_today():
    record = json.loads((ROOT / "benchmarks" / "apple_prediction.json").read_text())
    assert record["what"] == "predicted, not measured"
    assert {chip["name"] for chip in record["chips"]} == {"M2 Ultra", "M3 Ultra", "M4 Max", "M5", "M5 Max"}
    assert all("://" in record["sources"][chip["name"]] for chip in record["chips"])
    now = json.loads(json.dumps(apple_prediction.predictions(apple_prediction.reached_on_m4_max())))
    assert record["rows"] == [pytest.approx(row) for row in now]
    assert all(abs(check["predicted"] / check["public"] - 1) < 0.1 for check in record["checks"])
