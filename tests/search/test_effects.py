"""Effects of candidates on the held-out loss: fitted to known losses, and measured with a supernet."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.normalisation import normalise
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.table import LatencyTable
from qnas.search.config import SearchConfig
from qnas.search.effects import (
    IMAGES,
    NETWORKS_PER_EFFECT,
    TOGETHER,
    WINDOW,
    count_effects,
    draw_networks,
    fit_effects,
    measure_effects,
)
from qnas.search.evaluator import evaluator_of
from qnas.search.searcher import Searcher
from qnas.search.selection import count_effect_networks, effects_of
from qnas.solver.distributions import sample_near
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.solver.solve import CandidateIndices, Scores
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.block_order import block_labels, place_blocks_first, runs_of
from qnas.spaces.space import SearchSpace, load_space

CONFIG = SearchConfig(
    preset="test",
    resolution_px=8,
    warmup_epochs=1,
    search_epochs=1,
    batch_size=128,
    learning_rate=5e-3,
    arch_learning_rate=0.1,
    arch_every=2,
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


@pytest.fixture
def table(tiny_space: SearchSpace) -> LatencyTable:
    return compute_table(load_device("vpu"), tiny_space)


@pytest.fixture
def limits(table: LatencyTable) -> Limits:
    # there are dozens of networks between this and WINDOW of it
    return (latency_limit(table, 0.2 * table.fastest_ms + 0.8 * table.slowest_ms),)


def planted(space: SearchSpace, seed: int) -> Scores:
    """Draw effects in nats: of the candidates of a stage, and less for every further block of it."""
    rng = np.random.default_rng(seed)
    places = [place for run in runs_of(block_labels(space)) for place in range(len(run))]
    of_stage = {
        (position.stage, candidate): rng.normal(0, 0.05)
        for position in space.positions
        for candidate in position.candidates
    }
    return tuple(
        tuple(
            0.0 if c.block == "identity" else of_stage[position.stage, c] - 0.2 / (1 + place) ** 2
            for c in position.candidates
        )
        for position, place in zip(space.positions, places, strict=True)
    )


def flat(space: SearchSpace) -> Scores:
    return tuple((0.0,) * len(position.candidates) for position in space.positions)


def random_networks(space: SearchSpace, n: int, seed: int) -> list[CandidateIndices]:
    """Draw networks with the blocks of a stage first."""
    rng, labels = np.random.default_rng(seed), block_labels(space)
    drawn = [tuple(int(rng.integers(len(p.candidates))) for p in space.positions) for _ in range(n)]
    return [place_blocks_first(labels, network) for network in drawn]


def total(effects: Scores, networks: Sequence[CandidateIndices]) -> NDArray[np.float64]:
    return np.array([sum(effects[i][j] for i, j in enumerate(network)) for network in networks])


def test_effects_predict_networks_that_were_not_measured() -> None:
    space = load_space("quadranet-small")
    true, rng = planted(space, 0), np.random.default_rng(1)
    networks, others = (
        random_networks(space, 8 * count_effects(space), 2),
        random_networks(space, 200, 3),
    )
    groups = np.arange(len(networks)) // TOGETHER
    # images differ by far more than networks do
    losses = total(true, networks) + rng.normal(0, 1, groups.max() + 1)[groups]
    effects = fit_effects(space, networks, losses + rng.normal(0, 0.02, len(losses)), groups)
    assert np.corrcoef(total(effects.nats, others), total(true, others))[0, 1] > 0.97
    assert np.std(total(effects.nats, others) - total(true, others)) < 0.25 * np.std(total(true, others))
    # what is explained is less than all by the noise
    assert 0.8 < effects.explained < 1
    assert effects.networks == len(networks)


def test_what_images_cost_all_networks_alike_changes_nothing(tiny_space: SearchSpace) -> None:
    networks = random_networks(tiny_space, 60, 0)
    groups, losses = np.arange(60) // TOGETHER, total(planted(tiny_space, 0), networks)
    plain = fit_effects(tiny_space, networks, losses, groups)
    shifted = fit_effects(tiny_space, networks, losses + 3.0 * groups, groups)
    for row, other in zip(plain.nats, shifted.nats, strict=True):
        assert row == pytest.approx(other, abs=1e-9)


def test_a_network_of_least_loss_scores_highest(tiny_space: SearchSpace) -> None:
    true, networks = planted(tiny_space, 4), random_networks(tiny_space, 100, 0)
    effects = fit_effects(tiny_space, networks, total(true, networks), np.arange(100) // TOGETHER)
    every = every_network(tiny_space)
    best = every[int(np.argmax(total(effects.scores, every)))]
    assert total(true, [best])[0] <= np.quantile(total(true, every), 0.02)


def every_network(space: SearchSpace) -> list[CandidateIndices]:
    """Return all networks, each once, with their blocks first."""
    labels = block_labels(space)
    paths = product(*(range(len(p.candidates)) for p in space.positions))
    return sorted({place_blocks_first(labels, path) for path in paths})


@pytest.mark.parametrize("seed", range(5))
def test_no_placement_scores_above_the_one_that_was_measured(tiny_space: SearchSpace, seed: int) -> None:
    # losses of any kind: what they say of a second block may well be more than of a first
    rng, networks = np.random.default_rng(seed), random_networks(tiny_space, 60, seed)
    effects = fit_effects(tiny_space, networks, rng.normal(0, 1, 60), np.arange(60) // TOGETHER)
    labels = block_labels(tiny_space)
    for path in product(*(range(len(p.candidates)) for p in tiny_space.positions)):
        first = place_blocks_first(labels, path)
        assert total(effects.scores, [path])[0] < total(effects.scores, [first])[0] or path == first


def test_networks_are_measured_with_their_blocks_first(tiny_space: SearchSpace, limits: Limits) -> None:
    measured: list[CandidateIndices] = []

    def losses(together: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
        measured.extend(together)
        return torch.tensor(total(planted(tiny_space, 0), together))[:, None].repeat(1, 3)

    found = measure_effects(
        tiny_space, limits, flat(tiny_space), losses, endless(), 100, np.random.default_rng(0)
    )
    assert found is not None
    assert found.explained > 0.9
    labels = block_labels(tiny_space)
    assert any(0 in [labels[i][j] for i, j in enumerate(network)] for network in measured)
    assert all(network == place_blocks_first(labels, network) for network in measured)


def test_losses_that_follow_no_effects_give_none(tiny_space: SearchSpace, limits: Limits) -> None:
    rng = np.random.default_rng(0)

    def measure(noise: float, networks: int = 100) -> bool:
        true = planted(tiny_space, 0)

        def losses(together: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
            return torch.tensor(total(true, together) + rng.normal(0, noise, len(together)))[:, None]

        batches = iter([(torch.zeros(1), torch.zeros(1))] * networks)
        found = measure_effects(
            tiny_space, limits, flat(tiny_space), losses, batches, networks, np.random.default_rng(0)
        )
        return found is not None

    assert measure(0.001)
    assert not measure(100.0)
    assert not measure(0.001, networks=TOGETHER)  # the differences within one group tell too little


def test_networks_are_drawn_by_their_probabilities(tiny_space: SearchSpace, table: LatencyTable) -> None:
    rng = np.random.default_rng(5)
    weights = tuple(tuple(rng.uniform(0.1, 1.0, len(p.candidates))) for p in tiny_space.positions)
    low_ms, high_ms = 0.3 * table.slowest_ms, 0.9 * table.slowest_ms
    chances = {
        indices: prod(weights[i][j] for i, j in enumerate(indices))
        for indices in product(*(range(len(p.candidates)) for p in tiny_space.positions))
        if low_ms <= table.latency_ms(indices) <= high_ms
    }
    n = 20_000
    counts = Counter(sample_near(table, low_ms, high_ms, n, np.random.default_rng(1), weights=weights))
    assert set(counts) <= set(chances)
    expected = {indices: n * chance / sum(chances.values()) for indices, chance in chances.items()}
    chi_square = sum((counts[indices] - mean) ** 2 / mean for indices, mean in expected.items())
    freedom = len(chances) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_measured_networks_are_near_the_budget_and_within_all_limits(
    tiny_space: SearchSpace, table: LatencyTable, limits: Limits
) -> None:
    both = (*limits, count_limit(tiny_space, "params", 4000))
    drawn = draw_networks(both, flat(tiny_space), 200, np.random.default_rng(0))
    assert len(set(drawn)) > 10
    for network in drawn:
        assert all(limit.amount(network) <= limit.limit for limit in both)
    # the most probable network within the limits, one of equals here, takes all that blocks may take
    assert min(map(table.latency_ms, drawn)) >= WINDOW * min(limits[0].limit, table.fastest_ms)


def test_measuring_changes_nothing_and_comes_out_the_same(
    tiny_space: SearchSpace, limits: Limits, digits: ImageData
) -> None:
    for norm in ("layernorm", "batchnorm"):
        space = tiny_space.with_norm(norm)
        table = compute_table(load_device("vpu"), space)
        within = (latency_limit(table, table.slowest_ms),)
        searcher = Searcher(space, within, digits, CONFIG.override({"effect_networks": 30}))
        for _ in range(3):
            searcher.step()
        before = {key: value.clone() for key, value in searcher.state.supernet.state_dict().items()}
        drawn = searcher.state.generator.get_state()
        counted: list[int] = []
        evaluator = evaluator_of(searcher.state)
        first = effects_of(searcher.state, evaluator, counted.append)
        assert sum(counted) == 30
        assert first == effects_of(searcher.state, evaluator)
        assert torch.equal(drawn, searcher.state.generator.get_state())
        for key, value in searcher.state.supernet.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_losses_are_those_of_the_subnets(tiny_space: SearchSpace, limits: Limits, digits: ImageData) -> None:
    searcher = Searcher(tiny_space, limits, digits, CONFIG)
    searcher.step()
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10
    networks = random_networks(tiny_space, 4, 0)
    losses = evaluator_of(searcher.state).losses(networks, images, labels)
    assert losses.shape == (4, 16)
    for network, found in zip(networks, losses, strict=True):
        subnet = searcher.state.supernet.subnet(arch_from_indices(tiny_space, network), 10).eval()
        with torch.no_grad():
            expected = F.cross_entropy(subnet(images), labels, reduction="none").double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_serves_the_networks_that_are_compared(
    tiny_space: SearchSpace, limits: Limits, digits: ImageData
) -> None:
    searcher = Searcher(tiny_space, limits, digits, CONFIG.override({"effect_networks": 25}))
    seen: list[tuple[int, int, Tensor]] = []
    evaluator = evaluator_of(searcher.state)
    losses = evaluator.losses

    def look(networks: Sequence[CandidateIndices], images: Tensor, labels: Tensor) -> Tensor:
        seen.append((len(networks), len(images), images))
        return losses(networks, images, labels)

    effects_of(searcher.state, replace(evaluator, losses=look))
    assert [count for count, _, _ in seen] == [TOGETHER, TOGETHER, 5]
    assert all(size == min(IMAGES, len(digits.heldout)) for _, size, _ in seen)
    assert not torch.equal(seen[0][2], seen[1][2])
    # no weight was trained on them
    heldout = digits.heldout.read(torch.arange(len(digits.heldout)))
    known = normalise(heldout, digits.mean, digits.std).flatten(1)
    assert float(torch.cdist(seen[0][2].flatten(1).double(), known.double()).amin(1).max()) < 1e-3


def test_networks_are_drawn_by_probabilities_that_no_temperature_sharpened(
    tiny_space: SearchSpace, limits: Limits, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = Searcher(tiny_space, limits, digits, CONFIG)
    while searcher.steps_done < searcher.total_steps:
        searcher.step()
    assert searcher.state.temperature < 1
    asked: list[Scores] = []
    monkeypatch.setattr(
        "qnas.search.selection.measure_effects", lambda space, limits, log_p, *rest: asked.append(log_p)
    )
    effects_of(searcher.state, evaluator_of(searcher.state))
    for found, alpha in zip(asked[0], searcher.state.supernet.alpha.detach(), strict=True):
        assert found == pytest.approx(torch.log_softmax(alpha[: len(found)], 0).tolist())


def test_the_number_of_networks_follows_the_effects_and_the_length_of_the_search(
    tiny_space: SearchSpace, limits: Limits, digits: ImageData
) -> None:
    short, long = (
        count_effect_networks(
            Searcher(tiny_space, limits, digits, CONFIG.override({"search_epochs": epochs})).problem
        )
        for epochs in (4, 400)
    )
    assert short < long == NETWORKS_PER_EFFECT * count_effects(tiny_space)
    assert count_effects(tiny_space) == 2 * 4 + 2 * 1


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield torch.zeros(1), torch.zeros(1)


def test_networks_that_are_too_few_give_no_effects(tiny_space: SearchSpace, table: LatencyTable) -> None:
    tight = (latency_limit(table, table.fastest_ms * 1.0001),)
    found = measure_effects(
        tiny_space,
        tight,
        flat(tiny_space),
        lambda networks, images, labels: torch.zeros(len(networks), 1),
        endless(),
        100,
        np.random.default_rng(0),
    )
    assert found is None
