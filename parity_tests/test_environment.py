"""Variables of the environment: what their values do, and how bad ones are refused."""

from __future__ import annotations

import mlx.core as mx
import pytest

from flux_mlx import cuda_kernels, doctor, environment, kernel_policy, kernels
from flux_mlx.spec import PatternConfig
from parity_tests.cuda_cases import AMPERE
from parity_tests.tiny_models import flux_model

PATTERN = PatternConfig(block_size=64, sink_tokens=64, window_tokens=128)
Q, K = mx.zeros((1, 4, 1, 64), mx.float16), mx.zeros((1, 2, 4000, 64), mx.float16)


@pytest.fixture(autouse=True)
def _fresh_switch():
    environment.kernels_are_on.cache_clear()
    yield
    environment.kernels_are_on.cache_clear()


@pytest.fixture(params=["metal", "cuda"])
def device(request, monkeypatch):
    """Pretend that there is a GPU whose kernels are right, and that nothing was counted."""
    there = kernels if request.param == "metal" else cuda_kernels
    monkeypatch.setattr(there, "is_available", lambda: True)
    monkeypatch.setattr(cuda_kernels, "device", lambda: AMPERE)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(kernel_policy, "RECORD", kernel_policy.Record())
    monkeypatch.setattr(kernel_policy, "calibration", dict)
    monkeypatch.setattr(kernel_policy, "gpu_generation", lambda: 15)
    monkeypatch.setattr(kernel_policy, "self_test", lambda variant, run: "")
    return request.param


@pytest.mark.parametrize("word", [None, "", "on"])
def test_kernels_are_used_unless_switched_off(device, monkeypatch, word):
    monkeypatch.delenv("FLUX_MLX_KERNELS", raising=False)
    if word is not None:
        monkeypatch.setenv("FLUX_MLX_KERNELS", word)
    assert kernel_policy.choose(Q, K, K, PATTERN) == device
    assert kernel_policy.use_cuda_router("float16", 64) == (device == "cuda")


def test_the_switch_leaves_everything_to_operations(device, monkeypatch):
    monkeypatch.setenv("FLUX_MLX_KERNELS", "off")
    for q_tokens in (1, 300):
        q = mx.zeros((1, 4, q_tokens, 64), mx.float16)
        assert kernel_policy.choose(q, K, K, PATTERN) == "ops"
    assert not kernel_policy.use_cuda_router("float16", 64)
    assert set(kernel_policy.RECORD.calls) == {"ops: FLUX_MLX_KERNELS is off"}


def test_other_words_are_refused(device, monkeypatch, capsys):
    monkeypatch.setenv("FLUX_MLX_KERNELS", "0")
    message = r"\[FLUX_MLX_KERNELS\] expected on or off, got '0'"
    for call in (environment.check_environment, lambda: kernel_policy.choose(Q, K, K, PATTERN)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(SystemExit):
        doctor.main([])
    assert "[FLUX_MLX_KERNELS] expected on or off, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "shown"), [("", "on"), ("off", "off")])
def test_the_doctor_shows_the_switch_and_its_help_the_variables(monkeypatch, capsys, word, shown):
    monkeypatch.setenv("FLUX_MLX_KERNELS", word)
    assert doctor.device()["FLUX_MLX_KERNELS"] == shown
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in environment.VARIABLES)
    assert "FLUX_MLX_CALIBRATION" in environment.VARIABLES


def test_a_model_computes_alike_without_kernels(monkeypatch):
    tokens = mx.arange(70)[None] % 50
    answers = []
    for word in ("on", "off"):
        monkeypatch.setenv("FLUX_MLX_KERNELS", word)
        environment.kernels_are_on.cache_clear()
        model = flux_model()
        answers.append(model(tokens, cache=model.make_cache()))
    assert mx.allclose(*answers, atol=1e-3)


def test_a_bad_route_names_its_variable(monkeypatch):
    monkeypatch.setenv("FLUX_MLX_ROUTE", "bogus")
    with pytest.raises(ValueError, match=r"^\[FLUX_MLX_ROUTE\] expected auto, full, sparse .*; got 'bogus'\.$"):
        environment.check_environment()
    monkeypatch.setenv("FLUX_MLX_ROUTE", "0,2-3")
    assert environment.forced_route() == (0, 2, 3)
    monkeypatch.delenv("FLUX_MLX_ROUTE")
    assert environment.forced_route() is None
