"""Effects by one change at a time, with losses that are known."""

import numpy as np
import pytest
import torch
from helpers.pretrained import tiny_network
from helpers.searches import QUICK
from helpers.tiny import TINY_SPACE
from torch import Tensor

from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.pretrained.derivation import derived_space, own_arch
from qnas.search.ablation import changes_of, costs_of, count_changes, image_losses, measure_changes
from qnas.search.evaluator import evaluator_of
from qnas.search.family_selection import select_of_family
from qnas.search.problem import FamilySearch
from qnas.search.searcher import Searcher
from qnas.search.selection import effects_of, measured_batches, select
from qnas.search.smaller import expected_losses
from qnas.solver.layouts import layouts_within, mean_limits
from qnas.solver.limits import Limits, latency_limit
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.family import make_family
from qnas.spaces.lower import count_macs, lower, smallest_and_largest
from qnas.spaces.space import SearchSpace, parse_space

SPACE = parse_space(TINY_SPACE.replace("positions: 2", "positions: 3"), "t")
WHOLE = smallest_and_largest(SPACE)[1].indices(SPACE)
BATCHES = [(torch.zeros(4, 3, 8, 8), torch.zeros(4).long()), (torch.ones(2, 3, 8, 8), torch.zeros(2).long())]
COSTS = {"quadra_k3_e2": 0.3, "quadra_k3_e4": 0.2, "quadra_k5_e2": 0.1, "quadra_k5_e4": 0.0}


def known_losses(networks: list[tuple[int, ...]], images: Tensor, labels: Tensor) -> Tensor:
    """A sum over blocks; a stage without its third block costs 0.3, its second 0.5 and its first 1."""
    rows = []
    for network in networks:
        names = [p.names[i] for p, i in zip(SPACE.positions, network, strict=True)]
        total = 1.0
        for stage in range(len(SPACE.stages)):
            own = [name for name, p in zip(names, SPACE.positions, strict=True) if p.stage == stage]
            blocks = [name for name in own if name != "identity"]
            total += sum((1.0, 0.5, 0.3)[len(blocks) :])
            total += sum(COSTS[name] for name in blocks) * (stage == 0)
        rows.append(total + images.mean((1, 2, 3)))
    return torch.stack(rows)


def test_changes_are_single_blocks_and_the_last_ones_of_a_stage() -> None:
    exchanged, shortened = changes_of(SPACE, WHOLE)
    for change in exchanged:
        differing = [i for i, (a, b) in enumerate(zip(WHOLE, change.network, strict=True)) if a != b]
        assert differing == [change.position]
        assert SPACE.positions[change.position].names[change.candidate] != "identity"
    # in the first stage another kernel or another expansion; the second has one kind of block
    assert [SPACE.positions[c.position].names[c.candidate] for c in exchanged] == [
        "quadra_k3_e4",
        "quadra_k5_e2",
    ] * 3
    assert [[c.position for c in row] for row in shortened] == [[2, 1, 0], [5, 4, 3]]
    names = [[SPACE.positions[i].names[n] for i, n in enumerate(c.network)] for c in shortened[0]]
    assert [row.count("identity") for row in names] == [1, 2, 3]
    assert count_changes(SPACE, WHOLE) == 6 + 6


def test_effects_are_the_differences_to_the_trained_network() -> None:
    counted: list[int] = []
    rng = np.random.default_rng(0)
    checked = [tuple(int(rng.integers(len(p.names))) for p in SPACE.positions) for _ in range(20)]
    found = measure_changes(SPACE, WHOLE, known_losses, BATCHES, checked, counted.append)  # type: ignore[arg-type]
    left_out = (1.0, 0.5, 0.3)
    for position, row in zip(SPACE.positions, found.nats, strict=True):
        place = int(position.name.partition(".")[2]) - 1
        for name, value in zip(position.names, row, strict=True):
            cost = COSTS[name] if name != "identity" and position.stage == 0 else 0.0
            expected = 0.0 if name == "identity" else cost - left_out[place]
            assert value == pytest.approx(expected, abs=1e-5), (position.name, name)
    assert found.networks == 13 + 20
    assert sum(counted) == 13 * 2 + 20
    # the losses are sums, so the effects explain all of them
    assert found.explained == pytest.approx(1.0, abs=1e-4)
    assert measure_changes(SPACE, WHOLE, known_losses, BATCHES).explained == 0  # type: ignore[arg-type]


def test_a_smaller_block_is_not_free_because_it_looks_so() -> None:
    rng = np.random.default_rng(0)
    noise: dict[tuple[int, ...], Tensor] = {}

    def noisy(networks: list[tuple[int, ...]], images: Tensor, labels: Tensor) -> Tensor:
        rows = [
            noise.setdefault(network, torch.from_numpy(rng.normal(1, 0.3, len(labels))))
            for network in networks
        ]
        return torch.stack(rows)

    batch = torch.zeros(64, 3, 8, 8), torch.zeros(64).long()
    found = measure_changes(SPACE, WHOLE, noisy, [batch])  # type: ignore[arg-type]
    exchanged, shortened = changes_of(SPACE, WHOLE)
    for change in (*exchanged, *(change for row in shortened for change in row)):
        row, own = found.nats[change.position], WHOLE[change.position]
        assert row[change.candidate] - row[own] > 1e-4


def test_a_block_further_back_is_worth_no_more() -> None:
    def odd(networks: list[tuple[int, ...]], images: Tensor, labels: Tensor) -> Tensor:
        counts = [
            sum(p.names[i] != "identity" for p, i in zip(SPACE.positions, n, strict=True)) for n in networks
        ]
        return torch.tensor([[float(count % 2)] * len(labels) for count in counts])

    found = measure_changes(SPACE, WHOLE, odd, BATCHES[:1])  # type: ignore[arg-type]
    for stage in range(2):
        own = [row[0] for row, p in zip(found.nats, SPACE.positions, strict=True) if p.stage == stage]
        assert own == sorted(own)
        assert len(set(own)) == len(own)


def test_what_looks_better_than_what_was_trained_counts_as_equal() -> None:
    candidates = "  [{block: mbconv, kernel: [3, 5, 7], expansion: [2, 3, 4]}, {block: identity}]"
    text = TINY_SPACE.replace("layernorm", "batchnorm").replace("gelu", "relu6")
    text = text.replace(
        "  - {block: quadra, kernel: [3, 5], expansion: [2, 4]}\n  - {block: identity}", candidates
    )
    position = parse_space(text, "t").positions[0]
    own = position.names.index("mbconv_k5_e4")
    measured = {"mbconv_k3_e4": -0.2, "mbconv_k7_e4": -0.1, "mbconv_k5_e3": 0.4, "mbconv_k5_e2": 0.2}
    costs = costs_of(
        position,
        own,
        {position.names.index(name): value for name, value in measured.items()},
        [int(name != "identity") for name in position.names],
    )
    found = dict(zip(position.names, costs, strict=True))
    assert found["mbconv_k5_e4"] == found["identity"] == 0
    for name in ("mbconv_k3_e4", "mbconv_k7_e4"):
        assert 0 < found[name] < 1e-5  # a tie goes to the own block
    # expansion 2 costs no less than 3: both have the mean of what was measured
    for name in ("mbconv_k5_e3", "mbconv_k5_e2", "mbconv_k3_e2", "mbconv_k7_e3"):
        assert found[name] == pytest.approx(0.3, abs=1e-5)


# ---- in a search


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=32, channels=3, quiet=True)


def limits_of(space: SearchSpace) -> Limits:
    return (latency_limit(compute_table(load_device("cpu"), space), 0.25),)


def test_a_search_of_the_whole_keeps_the_pretrained_network_where_it_fits(digits: ImageData) -> None:
    network = tiny_network()
    space = derived_space(network.space)
    config = QUICK.override(
        {"weight_steps": "whole", "resolution_px": 32, "k_best": 3, "screened": 6, "search_epochs": 1}
    )
    table = compute_table(load_device("cpu"), space)
    own = own_arch(space, network.space)
    budget_ms = table.latency_ms(own.indices(space)) * 1.0001
    limits = (latency_limit(table, budget_ms),)
    searcher = Searcher(space, limits, digits, config, pretrained=network)
    while searcher.steps_done < searcher.total_steps:
        searcher.step()
    effects = effects_of(searcher.state, evaluator_of(searcher.state))
    assert effects is not None
    assert effects.networks == 1 + count_changes(space, own.indices(space)) + 20
    # larger kernels are rings of zeros around its own, so nothing that takes longer is better
    for position, row, choice in zip(space.positions, effects.nats, own.choices, strict=True):
        larger = choice.replace("k3", "k7").replace("k5", "k7")
        if larger in position.names:
            values = [row[position.names.index(name)] for name in (choice, larger)]
            assert values[0] == pytest.approx(values[1], abs=0.02)
    assert len(measured_batches(searcher.problem, evaluator_of(searcher.state))) == 1
    ranked = select(searcher.state).ranking
    assert all(each.solution.latency_ms <= budget_ms for each in ranked)


def test_layouts_are_measured_with_the_whole_network(digits: ImageData) -> None:
    network = tiny_network()
    family = make_family(derived_space(network.space), [24, 32])
    within = layouts_within(family, limits_of)
    config = QUICK.override(
        {"weight_steps": "whole", "resolution_px": 32, "k_best": 3, "screened": 6, "search_epochs": 1}
    )
    search = FamilySearch(family, limits_of, within)
    limits = mean_limits([each.limits for each in within])
    searcher = Searcher(family.largest, limits, digits, config, family=search, pretrained=network)
    for _ in range(6):
        searcher.step()
    found = select_of_family(searcher.state)
    assert found.effects is not None
    assert found.effects.networks > 20
    px = {each.layout.resolution_px: each for each in searcher.problem.layouts}
    whole = own_arch(family.largest, network.space).indices(family.largest)
    batches = measured_batches(searcher.problem, evaluator_of(searcher.state))
    losses, log_macs = [], []
    for size in (24, 32):
        own = searcher.state.at(px[size].layout)
        losses += list(image_losses([whole], evaluator_of(own).losses, batches))
        arch = arch_from_indices(own.problem.space, whole)
        log_macs.append(np.log(count_macs(lower(own.problem.space, arch))))
    small, large = expected_losses(np.stack(losses), np.array(log_macs))
    assert small > large
    difference = found.scores.resolutions[24] - found.scores.resolutions[32]
    assert difference == pytest.approx(large - small, abs=1e-5)
