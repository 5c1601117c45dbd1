import itertools
import math
from collections import Counter
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.gradients import GRADIENTS
from qnas.nn.mixed_block import FactoredMixture, Gated
from qnas.nn.modes import GradientForm, WeightsMode, gradient_for
from qnas.nn.supernet import LimitTensors, Supernet, expected_latency, limit_tensors, probabilities
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.spaces.block_order import block_labels, take_first_places
from qnas.spaces.space import SearchSpace

SAMPLED: list[GradientForm] = ["two-path", "all-paths", "gumbel"]
WEIGHTS: dict[GradientForm, WeightsMode] = {
    "two-path": "independent",
    "all-paths": "shared",
    "gumbel": "independent",
    "exact": "nested",
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_supernet(space: SearchSpace, form: GradientForm) -> Supernet:
    """A supernet whose probabilities differ, by its form's weights, in double precision."""
    torch.manual_seed(0)
    supernet = Supernet(space, 10, generator(), WEIGHTS[form]).double()
    with torch.no_grad():
        supernet.alpha.copy_(torch.randn(supernet.alpha.shape, generator=generator(7), dtype=torch.float64))
    return supernet


def limits_of(space: SearchSpace) -> Limits:
    table = compute_table(load_device("vpu"), space)
    return (latency_limit(table, table.slowest_ms), count_limit(space, "params", 1e9))


def tensors_of(space: SearchSpace, supernet: Supernet) -> LimitTensors:
    return limit_tensors(limits_of(space))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8, generator=generator(3), dtype=torch.float64), torch.arange(4)


def softmax_gradient(gates: Tensor, p: Tensor) -> Tensor:
    """dL/dlogits of probabilities that enter the loss with these gradients."""
    return p * (gates - (gates * p).sum())


# Of one position whose task is linear, L = sum_k g_k v_k, every expectation can be written down.
VALUES = torch.tensor([0.7, -1.1, 0.4, 2.0, -0.3], dtype=torch.float64)


def linear_task_gradient(supernet: Supernet, form: GradientForm, temperature: float, seed: int) -> Tensor:
    step = GRADIENTS[form](supernet, temperature, generator(seed))
    route = step.routes[0]
    assert isinstance(route, Gated)
    loss = (route.gates * VALUES[list(route.candidates)]).sum()
    (gradient,) = torch.autograd.grad(loss, supernet.alpha)
    assert torch.count_nonzero(gradient[1:]) == 0
    return gradient[0]


def test_the_mean_of_two_path_gradients_is_that_of_all_pairs(tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space, "two-path")
    p = probabilities(supernet.logits(), supernet.mask)[0].detach()
    expected = torch.zeros(5, dtype=torch.float64)
    for i, j in itertools.permutations(range(5), 2):
        chance = p[i] * p[j] / (1 - p[i])  # drawn without replacement
        pair = [i, j]
        expected[pair] += chance * softmax_gradient(VALUES[pair], p[pair] / p[pair].sum())
    draws = torch.stack([linear_task_gradient(supernet, "two-path", 1.0, seed) for seed in range(1500)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_all_paths_has_the_gradient_of_the_expected_loss_at_every_draw(
    temperature: float, tiny_space: SearchSpace
) -> None:
    supernet = make_supernet(tiny_space, "all-paths")
    mean = (probabilities(supernet.logits(temperature), supernet.mask)[0] * VALUES).sum()
    (expected,) = torch.autograd.grad(mean, supernet.alpha)
    for seed in range(5):
        got = linear_task_gradient(supernet, "all-paths", temperature, seed)
        torch.testing.assert_close(got, expected[0])


def test_gumbel_has_the_gradient_of_the_softmax_with_its_noise(tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space, "gumbel")
    for seed in range(5):
        step = GRADIENTS["gumbel"](supernet, 0.5, generator(seed))
        route = step.routes[0]
        assert isinstance(route, Gated)
        noise = -torch.empty_like(supernet.alpha).exponential_(generator=generator(seed)).log()
        noisy = (supernet.alpha.detach() / 0.5 + noise)[0]
        assert route.active == int(noisy.argmax())
        expected = softmax_gradient(VALUES, torch.softmax(noisy, 0)) / 0.5
        torch.testing.assert_close(linear_task_gradient(supernet, "gumbel", 0.5, seed), expected)


@pytest.mark.parametrize("form", ["all-paths", "gumbel"])
def test_the_active_candidate_is_drawn_by_its_probability(
    form: GradientForm, tiny_space: SearchSpace
) -> None:
    supernet = make_supernet(tiny_space, form)
    p = probabilities(supernet.logits(0.5), supernet.mask)[0].detach()
    random, draws = generator(), 1500
    counts: Counter[int] = Counter()
    for _ in range(draws):
        route = GRADIENTS[form](supernet, 0.5, random).routes[0]
        assert isinstance(route, Gated)
        counts[route.candidates[route.active]] += 1
    for index in range(5):
        assert abs(counts[index] / draws - float(p[index])) < 4 * (0.25 / draws) ** 0.5


def test_all_paths_gradient_is_that_of_networks_of_the_other_candidates(tiny_space: SearchSpace) -> None:
    """dL/dg_k by differences: a little of candidate k's output added to the active one's."""
    supernet = make_supernet(tiny_space, "all-paths")
    images, labels = batch()
    step = GRADIENTS["all-paths"](supernet, 1.0, generator(1))
    loss = F.cross_entropy(supernet(images, step.routes), labels)
    gates = [route.gates for route in step.routes if isinstance(route, Gated)]
    got = torch.autograd.grad(loss, gates)
    small = 1e-5
    active = [route.candidates[route.active] for route in step.routes if isinstance(route, Gated)]
    places = take_first_places(block_labels(tiny_space), active)
    assert places != sorted(places)  # of a block that moves as well
    for i, route in enumerate(step.routes):
        assert isinstance(route, Gated)
        part = supernet.parts[tiny_space.positions[places[i]].name.replace(".", "_")]
        for k in route.candidates:
            losses = []
            for amount in (small, -small):
                hook = part.register_forward_hook(
                    lambda module, inputs, y, k=k, amount=amount: (
                        y + amount * module.run_candidate(inputs[0], k)
                    )
                )
                losses.append(float(F.cross_entropy(supernet(images, step.routes), labels).detach()))
                hook.remove()
            assert float(got[i][k]) == pytest.approx((losses[0] - losses[1]) / (2 * small), abs=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_exact_gradient_equals_finite_differences(temperature: float, tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space, "exact")
    images, labels = batch()

    def loss() -> Tensor:
        step = GRADIENTS["exact"](supernet, temperature, generator())
        return F.cross_entropy(supernet(images, step.routes), labels)

    (gradient,) = torch.autograd.grad(loss(), supernet.alpha)
    small = 1e-5
    for row, column in itertools.product(*map(range, supernet.alpha.shape)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                supernet.alpha[row, column] += sign * small
                values.append(float(loss()))
                supernet.alpha[row, column] -= sign * small
        assert float(gradient[row, column]) == pytest.approx((values[0] - values[1]) / (2 * small), abs=1e-8)
    step, p = GRADIENTS["exact"](supernet, temperature, generator()), supernet.logits(temperature).exp()
    route = step.routes[0]
    assert isinstance(route, FactoredMixture)
    torch.testing.assert_close(route.block, 1 - p[0, tiny_space.positions[0].names.index("identity")])
    # every choice has one at every step
    used = torch.tensor([[True] * 6] * 2 + [[False] * 4 + [True] * 2] * 2)
    assert torch.equal(gradient != 0, used)


@pytest.mark.parametrize("form", get_args(GradientForm))
def test_the_latency_reaches_identity_whatever_was_drawn(form: GradientForm, tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space, form)
    limits = tensors_of(tiny_space, supernet)
    identities = [position.names.index("identity") for position in tiny_space.positions]
    seen: set[bool] = set()
    for seed in range(12):
        step = GRADIENTS[form](supernet, 1.0, generator(seed))
        for amount in step.expected(limits):
            (gradient,) = torch.autograd.grad(amount, supernet.alpha, retain_graph=True)
            for row, (index, route) in enumerate(zip(identities, step.routes, strict=True)):
                if isinstance(route, Gated) and index not in route.candidates:
                    assert form == "two-path"
                    continue
                # it is free: probability that moves to it lowers every amount
                assert gradient[row, -1 if form == "exact" else index] < 0
                if isinstance(route, Gated):
                    seen.add(route.candidates[route.active] == index)
    assert seen == ({True, False} if form != "exact" else set())


@pytest.mark.parametrize("form", get_args(GradientForm))
def test_the_expected_amounts_are_the_probabilities(form: GradientForm, tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space, form)
    limits = tensors_of(tiny_space, supernet)
    step = GRADIENTS[form](supernet, 0.7, generator())
    expected = expected_latency(supernet.logits(0.7), supernet.mask, limits.fixed, limits.cells)
    assert expected.shape == (2,)
    torch.testing.assert_close(step.expected(limits), expected)


def test_after_a_two_path_update_the_others_have_their_probabilities_back(tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space, "two-path")
    for form in SAMPLED:
        before = probabilities(supernet.logits(0.5), supernet.mask).detach()
        step = GRADIENTS[form](supernet, 0.5, generator(2))
        drawn = torch.zeros_like(supernet.mask)
        for row, route in enumerate(step.routes):
            assert isinstance(route, Gated)
            drawn[row, list(route.candidates)] = True
        with torch.no_grad():
            supernet.alpha[drawn] += torch.randn(
                int(drawn.sum()), generator=generator(4), dtype=torch.float64
            )
        updated = supernet.alpha.detach().clone()
        step.after_update(supernet)
        after = probabilities(supernet.logits(0.5), supernet.mask).detach()
        assert not torch.allclose(after, before)
        if form == "two-path":
            others = supernet.mask & ~drawn
            assert others.any()
            torch.testing.assert_close(after[others], before[others], rtol=1e-12, atol=0)
        else:
            assert torch.equal(supernet.alpha.detach(), updated)


def test_forms_that_do_not_go_with_the_weights_are_refused_with_the_fix() -> None:
    assert gradient_for("independent", None) == gradient_for("shared", None) == "two-path"
    assert gradient_for("nested", None) == gradient_for("nested", "exact") == "exact"
    assert gradient_for("shared", "gumbel") == "gumbel"
    with pytest.raises(ValueError, match="`gradient='two-path'`: expected 'exact'"):
        gradient_for("nested", "two-path")
    with pytest.raises(ValueError, match="`gradient='exact'` needs `weights='nested'`, got 'shared'"):
        gradient_for("shared", "exact")
