import itertools
import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnas.common.errors import UsageError
from qnas.common.resources import stems
from qnas.latency.device import device_names, load_device
from qnas.latency.device_table import compute_table
from qnas.nn.mixed_block import Choice, FactoredMixture, Gated, Grid, IndependentChoice, Route
from qnas.nn.modes import WeightsMode
from qnas.nn.supernet import (
    Factors,
    LimitTensors,
    Supernet,
    even_logits,
    expected_latency,
    expected_latency_of_pairs,
    largest_ratio,
    limit_tensors,
    log_probabilities,
    probabilities,
    renormalise_pair,
    sample_pairs,
    sample_path,
)
from qnas.solver.limits import count_limit, latency_limit
from qnas.spaces.arch import Arch, arch_from_indices, sample_arch
from qnas.spaces.block_order import block_labels, place_blocks_first, runs_of
from qnas.spaces.lower import count_macs, lower, smallest_resolution_px
from qnas.spaces.space import SearchSpace, load_space, parse_space
from qnas.training.optimizer import make_optimizer, weight_step

SPACES = [name for name in stems("search_spaces", ".yaml") if not load_space(name).is_fixed]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four positions of 5, 3, 1 and 4 candidates."""
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    return torch.randn(mask.shape, generator=generator(seed), dtype=torch.float64), mask


def make_supernet(space: SearchSpace, weights: WeightsMode = "independent") -> Supernet:
    torch.manual_seed(0)
    return Supernet(space, 10, generator(), weights)


class Scale(nn.Module):
    """A toy candidate whose output is known."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def toy_choice(factors: tuple[float, ...]) -> Choice:
    choice = IndependentChoice([])
    for i, factor in enumerate(factors):
        choice.add_module(str(i), Scale(factor))
    return choice


def test_gate_gradient_equals_the_closed_form() -> None:
    factors = (0.5, -1.5, 2.0, 3.0, 0.1)
    logits, mask = random_logits()
    logits.requires_grad_()
    x = torch.randn(6, 3, generator=generator(1), dtype=torch.float64)
    target = torch.randn(6, 3, generator=generator(2), dtype=torch.float64)
    for seed in range(5):
        sample = sample_pairs(logits, mask, generator(seed))
        path = sample.paths[0]
        assert isinstance(path, Gated)
        y = toy_choice(factors)(x, path)
        (gradient,) = torch.autograd.grad(((y - target) ** 2).sum(), logits, retain_graph=True)
        outer = 2 * (factors[path.candidates[path.active]] * x - target)  # dL/dy: only the active one counts
        gates = [float((factors[k] * x * outer).sum()) for k in path.candidates]
        exponentials = [math.exp(float(logits[0, k].detach())) for k in path.candidates]
        q = [e / sum(exponentials) for e in exponentials]
        expected = torch.zeros_like(logits)
        for i, j in itertools.product(range(2), range(2)):
            expected[0, path.candidates[i]] += gates[j] * q[j] * ((i == j) - q[i])
        torch.testing.assert_close(gradient, expected)


def test_a_pairs_output_is_the_active_candidates() -> None:
    logits, mask = random_logits()
    x = torch.randn(2, 3, dtype=torch.float64)
    factors = (0.5, -1.5, 2.0, 3.0, 0.1)
    seen = set()
    for seed in range(20):
        path = sample_pairs(logits, mask, generator(seed)).paths[0]
        assert isinstance(path, Gated)
        seen.add(path.active)
        torch.testing.assert_close(toy_choice(factors)(x, path), factors[path.candidates[path.active]] * x)
    assert seen == {0, 1}


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_unsampled_candidates_keep_their_probabilities_exactly(temperature: float) -> None:
    for seed in range(10):
        alpha, mask = random_logits(seed)
        before = probabilities(alpha / temperature, mask)
        sample = sample_pairs(alpha / temperature, mask, generator(seed))
        old = alpha / temperature
        # an arbitrary large update of the pairs
        rows = sample.rows[:, None]
        alpha[rows, sample.pairs] += 3 * torch.randn(sample.pairs.shape, dtype=torch.float64)
        renormalise_pair(alpha, old, sample, temperature)
        after = probabilities(alpha / temperature, mask)
        untouched = mask.clone()
        untouched[rows, sample.pairs] = False
        torch.testing.assert_close(after[untouched], before[untouched], rtol=1e-12, atol=0)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after.sum(1), torch.ones(4, dtype=torch.float64))


def test_a_position_without_a_choice_is_never_paired() -> None:
    logits, mask = random_logits()
    sample = sample_pairs(logits, mask, generator())
    assert sample.rows.tolist() == [0, 1, 3]
    assert sample.paths[2] == 0


def test_pairs_are_two_different_candidates_of_the_position() -> None:
    logits, mask = random_logits()
    logits[0] = torch.tensor([200.0, 0, 0, 0, 0])  # the others' probabilities underflow to zero
    for seed in range(50):
        sample = sample_pairs(logits, mask, generator(seed))
        for row, (first, second) in zip(sample.rows.tolist(), sample.pairs.tolist(), strict=True):
            assert first != second
            assert mask[row, first]
            assert mask[row, second]


def test_paths_are_drawn_by_their_probabilities() -> None:
    logits, mask = random_logits()
    p = probabilities(logits, mask)
    rng = generator()
    counts = torch.zeros_like(p)
    draws = 4000
    for _ in range(draws):
        for row, index in enumerate(sample_path(logits, mask, rng)):
            assert isinstance(index, int)
            counts[row, index] += 1
    assert (counts / draws - p).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_expected_latency_is_the_mean_over_all_networks() -> None:
    logits, mask = random_logits()
    cells = torch.rand(mask.shape, generator=generator(3), dtype=torch.float64) * mask
    p = probabilities(logits, mask)
    mean = 0.0
    for choice in itertools.product(*(range(int(n)) for n in mask.sum(1))):
        weight = math.prod(float(p[row, i]) for row, i in enumerate(choice))
        mean += weight * (0.7 + sum(float(cells[row, i]) for row, i in enumerate(choice)))
    assert float(expected_latency(logits, mask, 0.7, cells)) == pytest.approx(mean, rel=1e-12)


def test_latency_gradient_equals_finite_differences() -> None:
    logits, mask = random_logits()
    cells = torch.rand(mask.shape, generator=generator(3), dtype=torch.float64) * mask
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(expected_latency(logits, mask, 0.7, cells), logits)
    step = 1e-6
    for row, column in itertools.product(range(4), range(5)):
        moved = logits.detach().clone()
        moved[row, column] += step
        up = float(expected_latency(moved, mask, 0.7, cells))
        moved[row, column] -= 2 * step
        down = float(expected_latency(moved, mask, 0.7, cells))
        assert float(gradient[row, column]) == pytest.approx((up - down) / (2 * step), abs=1e-8)


def test_pair_latency_has_the_full_value_and_the_gradient_of_moving_within_the_pair() -> None:
    logits, mask = random_logits()
    cells = torch.rand(mask.shape, generator=generator(3), dtype=torch.float64) * mask
    logits.requires_grad_()
    sample = sample_pairs(logits, mask, generator())
    value = expected_latency_of_pairs(logits, mask, 0.7, cells, sample)
    full = expected_latency(logits.detach(), mask, 0.7, cells)
    torch.testing.assert_close(value.detach(), full, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value, logits)
    step = 1e-5
    for row, pair in zip(sample.rows.tolist(), sample.pairs.tolist(), strict=True):
        others = [i for i in range(5) if i not in pair]
        assert torch.count_nonzero(gradient[row, others]) == 0
        for i in pair:
            change = []
            for sign in (1, -1):
                moved = logits.detach().clone()
                moved[row, i] += sign * step
                renormalise_pair(moved, logits.detach(), sample)
                change.append(float(expected_latency(moved, mask, 0.7, cells)))
            assert float(gradient[row, i]) == pytest.approx((change[0] - change[1]) / (2 * step), abs=1e-8)


def even_case(shares: Sequence[float]) -> tuple[LimitTensors, Tensor]:
    """Limits that lie this far between what the least and what uniform probabilities take."""
    _, mask = random_logits()
    cells = torch.rand((len(shares), *mask.shape), generator=generator(3), dtype=torch.float64) * mask
    fixed = torch.full((len(shares),), 0.2, dtype=torch.float64)
    least = fixed + cells.masked_fill(~mask, torch.inf).amin(2).sum(1)
    uniform = expected_latency(torch.zeros(mask.shape, dtype=torch.float64), mask, fixed, cells)
    return LimitTensors(fixed, cells, least + torch.tensor(shares) * (uniform - least)), mask


def entropy(logits: Tensor, mask: Tensor) -> float:
    log_p = log_probabilities(logits, mask)
    return -float((log_p.exp() * log_p.masked_fill(~mask, 0.0)).sum())


def test_probabilities_are_even_where_the_limits_allow_it() -> None:
    limits, mask = even_case([1.01, 2.0])
    p = probabilities(even_logits(limits, mask), mask)
    torch.testing.assert_close(p, probabilities(torch.zeros_like(p), mask), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shares", [[0.6], [0.05], [0.5, 0.7], [0.6, 1.5]])
def test_nothing_more_even_is_within_the_limits(shares: list[float]) -> None:
    limits, mask = even_case(shares)
    logits = even_logits(limits, mask)
    expected = expected_latency(logits, mask, limits.fixed, limits.cells)
    assert (expected <= limits.limit * (1 + 1e-4)).all()
    assert float((expected / limits.limit).max()) == pytest.approx(1.0, abs=1e-4)
    even, rng, tried = entropy(logits, mask), generator(1), 0
    for _ in range(2000):
        other = logits + 0.3 * torch.randn(mask.shape, generator=rng, dtype=torch.float64)
        if (expected_latency(other, mask, limits.fixed, limits.cells) <= expected).all():
            tried += 1
            assert entropy(other, mask) < even
    assert tried > 50


def test_a_limit_that_one_network_alone_keeps_is_kept_nearly() -> None:
    limits, mask = even_case([0.0])
    expected = expected_latency(even_logits(limits, mask), mask, limits.fixed, limits.cells)
    assert float(expected[0] / limits.limit[0]) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("device", list(device_names()))
def test_the_latency_gradient_reaches_identity(device: str, tiny_space: SearchSpace) -> None:
    table = compute_table(load_device(device), tiny_space)
    supernet = make_supernet(tiny_space)
    limits = limit_tensors((latency_limit(table, table.slowest_ms),))
    total = expected_latency(supernet.alpha, supernet.mask, limits.fixed, limits.cells).sum()
    (gradient,) = torch.autograd.grad(total, supernet.alpha)
    for row, position in enumerate(tiny_space.positions):
        # identity is free, so probability that moves to it makes the network faster
        assert float(gradient[row, position.names.index("identity")]) < 0


def count_calls(supernet: Supernet) -> list[str]:
    calls: list[str] = []
    for name, part in supernet.parts.items():
        if isinstance(part, Choice):
            for candidate, module in part.named_children():
                module.register_forward_hook(lambda *_, key=f"{name}/{candidate}": calls.append(key))
    return calls


def test_a_weight_step_runs_and_changes_only_one_path(tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space)
    calls = count_calls(supernet)
    weights = supernet.weights
    before = [w.detach().clone() for w in weights]
    names = {id(p): name for name, p in supernet.named_parameters()}
    optimizer = make_optimizer(weights, 1e-2, 0.1)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    weight_step(lambda x: supernet(x, [1, 4, 0, 1]), optimizer, images, labels, 0.1)
    assert calls == ["1_1/quadra_k3_e4", "1_2/identity", "2_1/quadra_k3_e2", "2_2/identity"]
    changed = {
        names[id(w)] for w, old in zip(weights, before, strict=True) if not torch.equal(w.detach(), old)
    }
    candidates = {".".join(n.split(".")[1:3]) for n in changed if n.split(".")[2].startswith("quadra")}
    assert candidates == {"1_1.quadra_k3_e4", "2_1.quadra_k3_e2"}
    assert any(n.startswith("parts.stem") for n in changed)


def test_an_architecture_pass_runs_two_candidates_a_position(tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space)
    calls = count_calls(supernet)
    sample = sample_pairs(supernet.alpha, supernet.mask, generator())
    supernet(torch.randn(2, 3, 8, 8), sample.paths).sum().backward()
    expected = {
        f"{position.name.replace('.', '_')}/{position.names[i]}"
        for position, pair in zip(tiny_space.positions, sample.pairs.tolist(), strict=True)
        for i in pair
    }
    assert len(calls) == 8
    assert set(calls) == expected


def test_an_architecture_pass_gives_every_pair_a_gradient(tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space)
    sample = sample_pairs(supernet.alpha, supernet.mask, generator())
    loss = F.cross_entropy(supernet(torch.randn(8, 3, 8, 8), sample.paths), torch.arange(8))
    (gradient,) = torch.autograd.grad(loss, supernet.alpha)
    rows = sample.rows[:, None]
    assert (gradient[rows, sample.pairs] != 0).all()
    # within a pair what one gains the other loses
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("weights", get_args(WeightsMode))
@pytest.mark.parametrize("name", SPACES)
def test_subnet_matches_supernet(name: str, weights: WeightsMode) -> None:
    space = load_space(name)
    has_other_blocks = any(
        c.kind not in ("quadra", "identity") for p in space.positions for c in p.candidates
    )
    if weights == "nested" and (space.norm == "batchnorm" or has_other_blocks):
        with pytest.raises(UsageError, match="`weights='shared'`"):
            make_supernet(space, weights)
        return
    supernet = make_supernet(space, weights).eval()
    rng = np.random.default_rng(0)
    px = max(32, smallest_resolution_px(space))
    x = torch.randn(2, 3, px, px)
    for _ in range(2):
        arch = sample_arch(space, rng)
        with torch.no_grad():
            expected = supernet(x, list(arch.indices(space)))
            torch.testing.assert_close(supernet.subnet(arch, 10).eval()(x), expected)


# Two stages of one shape make one run of three positions; the last has its candidates in another order.
REORDERED = """\
schema: qnas.space/1
name: reordered
source: made for tests
input: {channels: 3, resolution_px: 8}
norm: batchnorm
activation: relu6
stem: {channels: 8, kernel: 3, stride: 2}
transition: block
candidates: [{block: mbconv, kernel: [3, 5], expansion: 2}, {block: identity}]
stages:
  - {channels: 8, positions: 2, stride: 1}
  - channels: 8
    positions: 1
    stride: 1
    candidates: [{block: identity}, {block: mbconv, kernel: [5, 3], expansion: 2}]
head: {classes: 10}
"""


@pytest.mark.parametrize("weights", ["independent", "shared"])
def test_a_network_is_the_same_wherever_its_blocks_stand(weights: WeightsMode) -> None:
    space = parse_space(REORDERED, "reordered.yaml")
    supernet = make_supernet(space, weights).eval()
    labels = block_labels(space)
    assert len(runs_of(labels)) == 1
    x = torch.randn(2, 3, 8, 8)
    outputs: dict[tuple[int, ...], Tensor] = {}
    for path in itertools.product(range(3), repeat=3):
        with torch.no_grad():
            y = supernet(x, path)
            arch = arch_from_indices(space, path)
            torch.testing.assert_close(supernet.subnet(arch, 10).eval()(x), y)
        first = place_blocks_first(labels, path)
        torch.testing.assert_close(y, outputs.setdefault(first, y), rtol=0, atol=0)
    assert len(outputs) == 1 + 2 + 4 + 8
    different = torch.stack(list(outputs.values())).flatten(1)
    assert (torch.cdist(different, different) + torch.eye(len(outputs)) > 1e-6).all()


def test_a_path_trains_the_first_positions_of_its_stages(tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space)
    identity = [len(position.candidates) - 1 for position in tiny_space.positions]
    supernet(torch.randn(2, 3, 8, 8), [identity[0], 1, identity[2], identity[3]]).sum().backward()
    trained = {name.split(".")[1] for name, w in supernet.named_parameters() if w.grad is not None}
    assert "1_1" in trained
    assert not trained & {"1_2", "2_1", "2_2"}


def test_a_pair_that_moves_has_the_gradient_of_where_it_runs(
    tiny_space: SearchSpace,
) -> None:
    supernet, x = make_supernet(tiny_space), torch.randn(2, 3, 8, 8)
    identity = [len(position.candidates) - 1 for position in tiny_space.positions]
    gradients = []
    for moves in (False, True):
        gates = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        pair = Gated((1, identity[0]), 0, gates)
        ends: list[Route] = [identity[0], pair] if moves else [pair, identity[1]]
        supernet(x, [*ends, identity[2], identity[3]]).square().sum().backward()
        gradients.append(gates.grad)
    assert gradients[0] is not None
    assert (gradients[0] != 0).all()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_masked_candidates_have_no_probability() -> None:
    logits, mask = random_logits()
    p = probabilities(logits, mask)
    assert torch.count_nonzero(p[~mask]) == 0
    assert torch.isneginf(log_probabilities(logits, mask)[~mask]).all()


def test_too_many_paths_are_our_mistake(tiny_space: SearchSpace) -> None:
    with pytest.raises(AssertionError, match="more routes than positions"):
        make_supernet(tiny_space)(torch.randn(1, 3, 8, 8), [0, 0, 0, 0, 0])


def test_of_several_limits_each_has_its_expected_amount_and_the_furthest_exceeded_counts(
    tiny_space: SearchSpace,
) -> None:
    table = compute_table(load_device("vpu"), tiny_space)
    supernet = make_supernet(tiny_space)
    limits = (latency_limit(table, table.fastest_ms * 1.1), count_limit(tiny_space, "macs", 1e9))
    fixed, cells, limit = limit_tensors(limits)
    # where one network is certain, its own latency and MACs
    arch = sample_arch(tiny_space, np.random.default_rng(3))
    certain = torch.zeros_like(supernet.alpha)
    for row, index in zip(certain, arch.indices(tiny_space), strict=True):
        row[index] = 100.0
    expected = expected_latency(certain, supernet.mask, fixed, cells)
    macs = count_macs(lower(tiny_space, arch))
    assert expected.tolist() == pytest.approx([table.latency_ms(arch.indices(tiny_space)), macs])
    ratio = largest_ratio(expected, limit)
    assert float(ratio) == pytest.approx(float(expected[0]) / limits[0].limit)
    sample = sample_pairs(certain, supernet.mask, generator())
    torch.testing.assert_close(
        expected_latency_of_pairs(certain, supernet.mask, fixed, cells, sample), expected
    )


GRIDS = [
    Grid((3, 5), (2, 4), ((0, 0), (0, 1), (1, 0), (1, 1), None)),
    Grid((7,), (2, 3, 4), ((0, 2), (0, 1), (0, 0))),
    Grid((3,), (2,), ((0, 0),)),
    Grid((3,), (2,), (None, (0, 0))),
]


def test_a_nested_candidates_probability_is_the_product_of_its_factors() -> None:
    factors = Factors(GRIDS)
    alpha = torch.randn(4, sum(factors.sizes), generator=generator(), dtype=torch.float64)
    log_p = factors(alpha)
    for row, grid in enumerate(GRIDS):
        kernels, expansions, blocks = torch.split(alpha[row], factors.sizes)
        kernels, expansions = (
            torch.softmax(kernels[: len(grid.kernels)], 0),
            torch.softmax(expansions[: len(grid.expansions)], 0),
        )
        count = len(grid.kernels) * len(grid.expansions)
        odds = float((blocks[1] - blocks[0]).exp()) / count
        identity = odds / (1 + odds) if None in grid.places else 0.0
        total = 0.0
        for column, place in enumerate(grid.places):
            block = 0.0 if place is None else kernels[place[0]] * expansions[place[1]]
            expected = identity if place is None else (1 - identity) * block
            assert float(log_p[row, column].exp()) == pytest.approx(float(expected), rel=1e-12)
            total += float(expected)
        assert total == pytest.approx(1.0, rel=1e-12)
    # they need no softmax any more
    mask = torch.arange(5) < torch.tensor([len(grid.places) for grid in GRIDS])[:, None]
    torch.testing.assert_close(log_probabilities(log_p, mask)[mask], log_p[mask])


def test_a_nested_supernets_mixture_has_the_factors_of_its_probabilities(tiny_space: SearchSpace) -> None:
    supernet = make_supernet(tiny_space, "nested")
    torch.nn.init.normal_(supernet.alpha, generator=generator(1))
    p = probabilities(supernet.logits(0.5), supernet.mask)
    for row, (position, route) in enumerate(zip(tiny_space.positions, supernet.mixture(0.5), strict=True)):
        assert isinstance(route, FactoredMixture)
        for column, candidate in enumerate(position.candidates):
            kernels, expansions = ((3, 5), (2, 4)) if len(position.candidates) == 5 else ((3,), (2,))
            expected = 1 - route.block
            if candidate.block != "identity":
                kernel = route.kernels[kernels.index(candidate.sizes["kernel"])]
                expansion = route.expansions[expansions.index(candidate.sizes["expansion"])]
                expected = route.block * kernel * expansion
            torch.testing.assert_close(p[row, column], expected)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_equal_nested_parameters_make_all_candidates_equally_likely(
    temperature: float, tiny_space: SearchSpace
) -> None:
    supernet = make_supernet(tiny_space, "nested")
    torch.nn.init.constant_(supernet.alpha, 0.3)
    p = probabilities(supernet.logits(temperature), supernet.mask)
    torch.testing.assert_close(p, supernet.mask / supernet.mask.sum(1, keepdim=True).double())


@pytest.mark.parametrize("weights", ["shared", "nested"])
def test_smaller_candidates_cost_a_shared_supernet_no_parameters(
    weights: WeightsMode, tiny_space: SearchSpace
) -> None:
    largest = Arch(("quadra_k5_e4", "quadra_k5_e4", "quadra_k3_e2", "quadra_k3_e2"))
    network = make_supernet(tiny_space).subnet(largest, 10)
    count = sum(p.numel() for p in make_supernet(tiny_space, weights).weights)
    assert count == sum(p.numel() for p in network.parameters())
