"""The objective and its schedules: draws, penalty, ascent, means."""

from __future__ import annotations

import math

import pytest
import torch

from cuda_reference.objective import (
    SparsityPenalty,
    gumbel_route,
    logistic_noise,
    sample_divergence,
    sample_nll,
    task_means,
)
from cuda_reference.recipe import load_recipe, recipe_from_dict
from cuda_reference.schedules import Schedules


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gap", [-2.0, 0.0, 1.5])
def test_hard_draws_are_full_with_the_probability_of_the_softmax(gap):
    logits = torch.tensor([0.3, 0.3 + gap]).expand(40_000, 2)
    z = gumbel_route(logits, logistic_noise((40_000,), generator()), tau=0.7)
    assert set(z.tolist()) == {0.0, 1.0}
    assert z.mean().item() == pytest.approx(1 / (1 + math.exp(-gap)), abs=0.01)


def test_straight_through_has_the_soft_gradient():
    logits, noise = torch.tensor([[0.2, 0.9], [0.4, -1.0]]), torch.tensor([0.1, -0.3])
    gradients = []
    for hard in (True, False):
        x = logits.clone().requires_grad_()
        gumbel_route(x, noise, tau=1.3, hard=hard).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert gradients[0][0, 1] > 0 > gradients[0][0, 0]


def test_without_noise_the_decision_is_that_of_inference():
    logits = torch.tensor([[0.0, 1e-3], [1e-3, 0.0], [0.5, 0.5]])
    assert gumbel_route(logits, None, tau=1.0).tolist() == [1.0, 0.0, 0.0]


def test_penalty_is_the_formula():
    penalty = SparsityPenalty({"a": 0.7, "b": 1.0, "c": 0.5}, generator())
    assert penalty.multipliers.min() >= 0
    assert penalty.multipliers.max() <= 0.5
    with torch.no_grad():
        penalty.multipliers.copy_(torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]]))
    omega, task = torch.tensor([0.5, 0.9, 0.8]), torch.tensor([0, 0, 1])
    first = (1 * 0.2 + 3 * 0.04 + 1 * 0.2 + 3 * 0.04) / 2
    second = 2 * 0.2 + 4 * 0.04
    assert penalty(omega, task).item() == pytest.approx((first + second) / 2)


def test_multipliers_ascend_and_stay_positive():
    penalty = SparsityPenalty({"a": 0.7, "b": 0.2}, generator())
    before = penalty.multipliers.detach().clone()
    optimiser = torch.optim.AdamW([{"params": [penalty.multipliers], "maximize": True, "weight_decay": 0.0}], lr=0.1)
    penalty(torch.tensor([0.1]), torch.tensor([0])).backward()
    optimiser.step()
    assert (penalty.multipliers[:, 0] > before[:, 0]).all()
    with torch.no_grad():
        penalty.multipliers.sub_(10.0)
    penalty.keep_positive()
    assert (penalty.multipliers == 0).all()


def test_task_means_leave_absent_tasks_out():
    overall, by_task = task_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3)
    assert overall.item() == 3.5
    assert by_task[0] == 2.0
    assert by_task[1].isnan()


def test_sample_nll_weighs_samples_not_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    nll = sample_nll(logits, torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1]), 2)
    assert nll.tolist() == pytest.approx([(math.log(2) + math.log(4)) / 2, -math.log(0.9)])


def test_divergence_is_of_the_teacher_and_vanishes_on_it():
    teacher = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    ours = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.6, 0.4]])).requires_grad_()
    sample = torch.tensor([0, 0, 1])
    found = sample_divergence(ours, teacher, sample, 2, rows=2)
    second = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert found.tolist() == pytest.approx([second / 2, 0.9 * math.log(1.5) + 0.1 * math.log(0.25)], abs=1e-6)
    found.sum().backward()
    assert torch.allclose(ours.grad[0], torch.zeros(2), atol=1e-7)
    assert sample_divergence(teacher, teacher, sample, 2).abs().max() < 1e-6


def test_schedules_reach_their_ends():
    s = Schedules(noise_share=0.7, warmup_share=0.2, lr_floor=0.1)
    assert (s.tau(0), s.tau(0.6), s.tau(1)) == (1.5, 1.0, 1.0)
    assert s.tau(0.3) == pytest.approx(1.25)
    assert (s.noise(0.5), s.noise(1.0)) == (1.0, 0.0)
    assert s.noise(0.85) == pytest.approx(0.5)
    assert Schedules().noise(1.0) == 1.0
    assert (s.lr(0), s.lr(0.1), s.lr(0.2)) == (0.0, 0.5, 1.0)
    assert s.lr(1.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="warmup_share must be a share"):
        Schedules(warmup_share=2.0)


@pytest.mark.parametrize("name", ["smollm2", "smollm2-unbalanced", "published"])
def test_shipped_recipes_are_read(name):
    recipe = load_recipe(name, ["seed=3", "optimiser.steps=7", "data.tasks.code=0.5"])
    assert (recipe.seed, recipe.optimiser.steps, recipe.data.tasks["code"]) == (3, 7, 0.5)
    assert recipe_from_dict(recipe.to_dict()).to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.stepz=1", "no settings"),
        ("targets.code=2.0", "lie in"),
        ('loss="mse"', "loss must be"),
        ("start={single=[1]}", "start needs"),
        ("calibration_tokens=[2048, 384]", "a shortest and a longest"),
        ("start_confidence=0.5", "start_confidence must"),
        ("data.tasks.poetry=1", "target for every task"),
        ("seed", "name=value"),
        ("seed.x=1", "looks for a table 'seed', which is 0"),
        ('seed="a"', "seed must be of type int, got 'a'"),
        ("hard=1", "hard must be of type bool, got 1"),
        ("optimiser.lr=true", "lr must be of type float, got True"),
        ("start=1", "start must be of type Mapping, got 1"),
        ("optimiser=1", "OptimiserConfig must be a table of settings, got 1"),
        ("seed=one", "not TOML"),
        ("pattern.window_tokens=0", "window_tokens"),
    ],
)
def test_bad_settings_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("smollm2", [override])


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bad.toml").write_bytes(b"seed = 1\n# \xff")
    with pytest.raises(ValueError, match=r"bad\.toml or an override is not TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_calibration_may_have_lengths_of_its_own():
    recipe = load_recipe("smollm2", ["calibration_tokens=[384, 640]"])
    data = recipe.for_calibration().data
    assert (data.shortest_tokens, data.longest_tokens, data.tasks) == (384, 640, recipe.data.tasks)
    assert load_recipe("smollm2", ["calibration_tokens=[]"]).for_calibration().data == recipe.data


def test_an_unknown_recipe_is_named():
    with pytest.raises(FileNotFoundError, match="smollm2"):
        load_recipe("no-such-recipe")
