from dataclasses import replace
from itertools import pairwise
from math import isfinite
from typing import get_args

import pytest
import torch

from qnas.search.config import LatencyLoss
from qnas.search.penalty import SETTLED, Multiplier, penalised, settle

SCALES_MS = [10.0**exponent for exponent in range(-3, 5)]


def loss_and_gradients(
    form: LatencyLoss, expected_ms: float, budget_ms: float, strength: float
) -> tuple[float, float, float]:
    """Return the loss, and its gradients by the task's loss and by the expected latency."""
    task = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    expected = torch.tensor(expected_ms, dtype=torch.float64, requires_grad=True)
    loss = penalised(form, task, expected, budget_ms, strength)
    by_task, by_latency = torch.autograd.grad(loss, (task, expected))
    return float(loss.detach()), float(by_task), float(by_latency)


@pytest.mark.parametrize("form", get_args(LatencyLoss))
@pytest.mark.parametrize("budget_ms", SCALES_MS)
@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0, 2.0, 100.0])
def test_a_slower_network_costs_more_at_every_scale(
    form: LatencyLoss, budget_ms: float, ratio: float
) -> None:
    loss, by_task, by_latency = loss_and_gradients(form, ratio * budget_ms, budget_ms, 1.5)
    assert torch.isfinite(torch.tensor([loss, by_task, by_latency])).all()
    assert by_latency > 0
    assert by_task > 0
    assert loss_and_gradients(form, 1.01 * ratio * budget_ms, budget_ms, 1.5)[0] > loss


@pytest.mark.parametrize("form", ["multiplier", "add-linear"])
def test_the_pressure_does_not_depend_on_the_unit(form: LatencyLoss) -> None:
    # a network twice as slow as the budget is as bad on a GPU of microseconds as on a CPU of seconds
    losses = [loss_and_gradients(form, 2 * t, t, 1.5) for t in SCALES_MS]
    for (loss, by_task, by_latency), t in zip(losses, SCALES_MS, strict=True):
        assert loss == pytest.approx(losses[0][0])
        assert by_task == 1.0
        assert by_latency * t == pytest.approx(1.5 if form == "multiplier" else 0.1)


def test_on_the_budget_the_penalty_adds_nothing() -> None:
    for t in SCALES_MS:
        assert loss_and_gradients("multiplier", t, t, 7.0)[0] == 2.0
        assert loss_and_gradients("add-linear", t, t, 7.0)[0] == 2.0
        assert loss_and_gradients("mul-log", t, t, 7.0)[0] == pytest.approx(0.2 * 2.0)


def test_a_negative_multiplier_presses_towards_slower_networks() -> None:
    assert loss_and_gradients("multiplier", 2.0, 3.0, -1.5)[2] < 0


def test_only_the_multiplier_form_uses_the_strength() -> None:
    for form in get_args(LatencyLoss):
        weak, strong = (loss_and_gradients(form, 2.0, 3.0, strength)[2] for strength in (0.5, 1.0))
        assert (strong == 2 * weak) if form == "multiplier" else (strong == weak)


def after(multiplier: Multiplier, share: float, steps: int = 1, budget_ms: float = 30.0) -> Multiplier:
    """Return the multiplier after steps at this share of the budget."""
    for _ in range(steps):
        multiplier = multiplier.after(share * budget_ms, budget_ms, task_norm=1.0)
    return multiplier


@pytest.mark.parametrize("budget_ms", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("violation", [0.02, 0.3])
def test_the_multiplier_rises_above_the_budget_and_falls_below_it(budget_ms: float, violation: float) -> None:
    above, below = [Multiplier()], [Multiplier()]
    for _ in range(200):
        above.append(after(above[-1], 1 + violation, budget_ms=budget_ms))
        below.append(after(below[-1], 1 - violation, budget_ms=budget_ms))
    assert above[1].value > 0 > below[1].value
    assert all(next_.value >= one.value for one, next_ in pairwise(above))
    assert all(next_.value <= one.value for one, next_ in pairwise(below))
    assert after(Multiplier(), 1.0, budget_ms=budget_ms).value == 0


def test_a_lasting_small_violation_is_met_with_growing_pressure() -> None:
    once = after(Multiplier(), 1.02)
    assert after(once, 1.02, steps=50).value > 1.2 * once.value


def test_far_from_the_budget_no_pressure_is_saved_up() -> None:
    # else the search would shoot past the budget by what was gathered on the way to it
    fresh, travelled = Multiplier(), after(Multiplier(), 3.0, steps=1000)
    assert after(travelled, 1.0).value == after(fresh, 1.0).value == 0


@pytest.mark.parametrize(("high", "low"), [(1.05, 0.95), (2.0, 0.2), (1e6, 1e-6)])
def test_the_multiplier_is_bounded_and_leaves_its_bound_at_once(high: float, low: float) -> None:
    multiplier = Multiplier()
    for _ in range(3000):
        multiplier = after(multiplier, high)
        assert multiplier.value <= multiplier.bound
    assert multiplier.value == multiplier.bound
    assert after(multiplier, 0.95).value < multiplier.bound
    for _ in range(6000):
        multiplier = after(multiplier, low)
        assert multiplier.value >= -multiplier.bound
    assert multiplier.value == -multiplier.bound
    assert after(multiplier, 1.05).value > -multiplier.bound


def test_at_value_one_the_latencys_gradient_is_as_long_as_the_tasks() -> None:
    for task_norm, latency_norm in [(1e-3, 2.0), (5.0, 1e-4)]:
        multiplier = Multiplier(value=1.0, task_norm=task_norm)
        assert multiplier.strength(latency_norm) * latency_norm == pytest.approx(task_norm)
        assert replace(multiplier, value=-2.0).strength(latency_norm) == pytest.approx(
            -2 * multiplier.strength(latency_norm)
        )
    # before a task's gradient was seen, and where no candidate changes the latency
    assert Multiplier(value=1.0).strength(2.0) == 0
    assert isfinite(Multiplier(value=1.0, task_norm=1.0).strength(0.0))


def test_the_tasks_gradient_is_a_moving_average() -> None:
    multiplier = Multiplier().after(30.0, 30.0, task_norm=4.0)
    assert multiplier.task_norm == 4.0
    norms = []
    for _ in range(200):
        multiplier = multiplier.after(30.0, 30.0, task_norm=1.0)
        assert multiplier.task_norm is not None
        norms.append(multiplier.task_norm)
    assert all(4.0 > one > next_ >= 1.0 for one, next_ in pairwise(norms))
    assert norms[0] > 3.5
    assert norms[-1] == pytest.approx(1.0, rel=1e-3)


def test_a_multiplier_is_a_value() -> None:
    before = Multiplier()
    after(before, 1.3)
    assert before == Multiplier()


def choices(sharpness: float, positions: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return architecture parameters, all but the first position's decided this much, and latencies."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.randn(positions, 4, generator=generator, dtype=torch.float64)
    alpha[1:] *= sharpness
    return alpha.requires_grad_(), torch.rand(positions, 4, generator=generator, dtype=torch.float64)


def expected(alpha: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return 0.5 + (alpha.softmax(1) * cells).sum()


def off(alpha: torch.Tensor, cells: torch.Tensor, budget: float) -> float:
    """Return by what share the expected amount misses the budget."""
    return abs(float(expected(alpha.detach(), cells)) / budget - 1)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_settled_parameters_keep_the_budget(sharpness: float, share: float) -> None:
    alpha, cells = choices(sharpness)
    low, high = cells.min(1).values.sum(), cells.max(1).values.sum()
    budget = float(0.5 + low + share * (high - low))
    for _ in range(40):  # a call that ends early is followed by one at the next step of a search
        settle(alpha, lambda: expected(alpha, cells) / budget, longest=0.5)
    assert off(alpha, cells, budget) < SETTLED
    # and settled ones are left alone
    before = alpha.detach().clone()
    settle(alpha, lambda: expected(alpha, cells) / budget, longest=0.5)
    assert torch.equal(alpha, before)


def test_to_settle_a_little_the_undecided_position_gives_way() -> None:
    alpha, cells = choices(sharpness=20.0)
    before = alpha.detach().softmax(1)
    budget = float(expected(alpha.detach(), cells)) * 0.98
    settle(alpha, lambda: expected(alpha, cells) / budget, longest=0.5)
    moved = (alpha.detach().softmax(1) - before).abs().sum(1)
    assert off(alpha, cells, budget) < SETTLED
    assert float(moved[0]) > 10 * float(moved[1:].max())


def test_of_two_amounts_the_one_further_over_its_limit_settles() -> None:
    alpha, cells = choices(sharpness=1.0)
    _, others = choices(sharpness=1.0, seed=1)

    def ratios() -> torch.Tensor:
        return torch.stack([expected(alpha, cells) / 3.0, expected(alpha, others) / 3.2])

    settle(alpha, lambda: ratios().max(), longest=0.5)
    assert abs(float(ratios().max().detach()) - 1) < SETTLED


def test_a_budget_out_of_reach_is_approached_in_bounded_steps() -> None:
    alpha, cells = choices(sharpness=1.0)
    fastest = float(0.5 + cells.min(1).values.sum())
    settle(alpha, lambda: expected(alpha, cells) / (0.9 * fastest), longest=0.5)
    assert fastest <= float(expected(alpha.detach(), cells)) < 1.1 * fastest
    assert torch.isfinite(alpha).all()
