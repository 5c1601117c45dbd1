"""Finalists of an untrained supernet with made-up effects: what is trained, who stays, and what is kept."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.searches import QUICK
from helpers.tiny import TWO_KINDS

from qnas.common.errors import CheckpointError, Interrupted, TrainingError, UsageError
from qnas.common.progress import Report, reporting_to
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.subnet import build_subnet
from qnas.runs.metrics import read_metrics
from qnas.runs.names import FINALISTS_FOLDER, METRICS_FILE
from qnas.search import finalists as finals_module
from qnas.search.effects import Effects
from qnas.search.finalists import (
    FinalistTrainer,
    Finals,
    finalist_recipe,
    finalist_training,
    finals_document,
    fit_biases,
    hold_finals,
)
from qnas.search.searcher import Searcher
from qnas.search.selection import Ranked, Selection
from qnas.search.state import SearchState
from qnas.solver.kinds import kinds_of
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.solver.solve import solve_best
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training.losses import CROSS_ENTROPY, make_objective
from qnas.training.processes import ALONE
from qnas.training.recipe import Recipe
from qnas.training.scoring import Score
from qnas.training.subnet_trainer import SubnetTrainer

CONFIG = QUICK.override({"k_best": 6, "screened": 40, "finalists": 4, "finalist_epochs": 4, "threads": 1})
RECIPE = Recipe(epochs=3, batch_size=288, resolution_px=8, learning_rate=5e-3)
STEPS = 1151 // 288  # of an epoch


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return parse_space(TWO_KINDS, "two-kinds.yaml")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


@pytest.fixture(scope="module")
def limits(space: SearchSpace) -> Limits:
    table = compute_table(load_device("vpu"), space)
    return latency_limit(table, 0.7 * table.slowest_ms), count_limit(space, "params", 4000)


@pytest.fixture(scope="module")
def selection(space: SearchSpace, limits: Limits) -> Selection:
    """Effects by which linear blocks are worth more than they are."""
    worth = {"": 0.0, "quadra": -0.10, "quadra_linear": -0.15}
    rng = np.random.default_rng(0)
    nats = tuple(
        tuple(worth[kind] + (float(rng.normal(0, 0.01)) if kind else 0.0) for kind in row)
        for row in kinds_of(space)
    )
    effects = Effects(nats, 0.9, 100)
    best = solve_best(space, effects.scores, limits, 40)
    ranking = tuple(
        Ranked(each, arch_from_indices(space, each.indices), Score(0.5, 0.5, 1.0, 287), 100, True)
        for each in (best[2], best[0], best[1])
    )
    return Selection(effects, effects.scores, ranking)


def state_of(space: SearchSpace, limits: Limits, data: ImageData, **changes: Any) -> SearchState:
    return Searcher(space, limits, data, CONFIG.override(changes)).state


Hold = Callable[..., Finals]


@pytest.fixture(scope="module")
def hold(space: SearchSpace, limits: Limits, digits: ImageData, selection: Selection) -> Hold:
    def hold_in(folder: Path, **changes: Any) -> Finals:
        state = state_of(space, limits, digits, **changes)
        training = finalist_training(state.problem.config, RECIPE, space, len(digits.train), ALONE)
        return hold_finals(state, selection, folder, training)

    return hold_in


@pytest.fixture(scope="module")
def finals(hold: Hold, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finals, Path]:
    folder = tmp_path_factory.mktemp("finals")
    return hold(folder), folder


def assert_equal_finals(space: SearchSpace, one: Finals, other: Finals) -> None:
    assert finals_document(one, space, "0") == finals_document(other, space, "0")
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_every_finalist_is_within_the_limits_and_the_networks_differ(
    finals: tuple[Finals, Path], selection: Selection, limits: Limits
) -> None:
    found = finals[0].finalists
    assert [each.number for each in found] == [1, 2, 3, 4]
    assert found[0].solution.indices == selection.ranking[0].solution.indices
    assert len({each.solution.indices for each in found}) == 4
    for each in found:
        assert all(limit.amount(each.solution.indices) <= limit.limit for limit in limits)
    kinds = {each.solution.kinds for each in found}
    assert ("quadra",) in kinds  # whose networks the effects value less


def test_the_best_of_each_rung_stay_and_the_best_of_the_last_wins(finals: tuple[Finals, Path]) -> None:
    found = finals[0]
    (first, last) = found.rounds[0].rungs
    assert (first.networks, first.epochs, last.networks, last.epochs) == (4, 2, 2, 4)
    after = {each.number: each.accuracies[1] for each in found.finalists}
    stayed = {each.number for each in found.finalists if len(each.accuracies) == 4}
    assert len(stayed) == 2
    assert {len(each.accuracies) for each in found.finalists} == {2, 4}
    assert min(after[number] for number in stayed) >= max(
        accuracy for number, accuracy in after.items() if number not in stayed
    )
    last_ones = [each for each in found.finalists if each.number in stayed]
    ends = {each.number: (each.accuracies[3], -each.losses[3]) for each in last_ones}
    assert max(ends, key=ends.__getitem__) == found.winner.number


def test_each_finalist_has_its_epochs_in_its_metrics(finals: tuple[Finals, Path]) -> None:
    found, folder = finals
    for each in found.finalists:
        rows = read_metrics(folder / FINALISTS_FOLDER / f"{each.number:02d}" / METRICS_FILE)
        assert len(rows) == STEPS * len(each.accuracies)
        epochs = [row for row in rows if "epoch" in row]
        assert [row["heldout_accuracy"] for row in epochs] == each.accuracies
        assert [row["heldout_loss"] for row in epochs] == each.losses
        assert not any("test_accuracy" in row for row in rows)
        assert each.seconds > 0


def test_the_winner_is_trained_as_if_it_had_been_alone(
    finals: tuple[Finals, Path], space: SearchSpace, limits: Limits, digits: ImageData
) -> None:
    found = finals[0]
    state = state_of(space, limits, digits)
    network = state.supernet.subnet(found.winner.arch, 10)
    data = replace(digits, train_and_heldout=digits.train, test=digits.heldout)
    trainer = SubnetTrainer(network, data, found.training, objective=CROSS_ENTROPY)
    torch.manual_seed(0)
    rows = [trainer.step() for _ in range(trainer.total_steps)]
    assert [row["test_accuracy"] for row in rows if "epoch" in row] == found.winner.accuracies
    ours = trainer.result.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in found.weights.items())


def test_the_supernet_stays_as_it_was(
    space: SearchSpace, limits: Limits, digits: ImageData, selection: Selection, tmp_path: Path
) -> None:
    state = state_of(space, limits, digits, finalists=1, finalist_epochs=1)
    before = {name: tensor.clone() for name, tensor in state.supernet.state_dict().items()}
    training = finalist_training(state.problem.config, RECIPE, space, len(digits.train), ALONE)
    found = hold_finals(state, selection, tmp_path, training)
    assert found.winner.solution.indices == selection.ranking[0].solution.indices
    for name, tensor in state.supernet.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_from_scratch_the_supernet_does_not_matter(
    space: SearchSpace, limits: Limits, digits: ImageData, selection: Selection, tmp_path: Path
) -> None:
    found = []
    for scale in (1.0, 2.0):
        state = state_of(space, limits, digits, finalists=1, finalist_epochs=1, finalists_from="scratch")
        for weight in state.weights:
            weight.data *= scale
        training = finalist_training(state.problem.config, RECIPE, space, len(digits.train), ALONE)
        found.append(hold_finals(state, selection, tmp_path / str(scale), training))
    assert_equal_finals(space, *found)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = build_subnet(space, found[0].winner.arch, 10)
    assert found[0].weights.keys() == fresh.state_dict().keys()


# in the first rung, at its end, in the second, and in the last step of all
@pytest.mark.parametrize(
    ("number", "step"),
    [
        (2, 2 * STEPS),
        (0, 2 * STEPS + 1),
        *(pytest.param(*place, marks=pytest.mark.slow) for place in ((1, 3), (4, 1), (0, 4 * STEPS))),
    ],
)
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    number: int,
    step: int,
    finals: tuple[Finals, Path],
    hold: Hold,
    space: SearchSpace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, stops, stopped = FinalistTrainer.step, iter([True]), number or finals[0].winner.number

    def step_and_stop(self: FinalistTrainer) -> dict[str, float]:
        row = taken(self)
        is_there = self.finalist.number == stopped and self.steps_done == step
        if is_there and next(stops, None):
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(FinalistTrainer, "step", step_and_stop)
    with pytest.raises(Interrupted):
        hold(tmp_path)
    assert_equal_finals(space, hold(tmp_path), finals[0])
    for each in finals[0].finalists:
        own = Path(FINALISTS_FOLDER) / f"{each.number:02d}" / METRICS_FILE
        assert (tmp_path / own).read_bytes() == (finals[1] / own).read_bytes()
    # and once more: nothing is left to train
    monkeypatch.setattr(FinalistTrainer, "step", lambda self: pytest.fail("trained again"))
    assert_equal_finals(space, hold(tmp_path), finals[0])


def test_the_state_of_another_finalist_is_refused(
    hold: Hold, finals: tuple[Finals, Path], tmp_path: Path
) -> None:
    own = tmp_path / FINALISTS_FOLDER
    own.mkdir(parents=True)
    (finals[1] / FINALISTS_FOLDER / "02").rename(own / "01")
    try:
        with pytest.raises(CheckpointError, match="01: the checkpoint is not of this run"):
            hold(tmp_path)
    finally:
        (own / "01").rename(finals[1] / FINALISTS_FOLDER / "02")


def test_a_training_that_diverges_counts_as_the_worst(
    hold: Hold, finals: tuple[Finals, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, winner = FinalistTrainer.step, finals[0].winner.number

    def step_or_fail(self: FinalistTrainer) -> dict[str, float]:
        if self.finalist.number == winner and self.steps_done == 2 * STEPS:
            raise TrainingError("step 9: the loss is nan")
        return taken(self)

    monkeypatch.setattr(FinalistTrainer, "step", step_or_fail)
    found = hold(tmp_path)
    assert found.winner.number != winner
    assert found.finalists[winner - 1].problem == "step 9: the loss is nan"
    assert len(found.winner.accuracies) == 4


def test_if_no_training_succeeds_there_is_no_result(
    hold: Hold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FinalistTrainer) -> dict[str, float]:
        raise TrainingError("step 1: the loss is nan")

    monkeypatch.setattr(FinalistTrainer, "step", fail)
    with pytest.raises(TrainingError, match="no finalist could be trained: step 1"):
        hold(tmp_path)


def test_a_second_round_is_solved_for_with_corrected_effects(
    hold: Hold,
    space: SearchSpace,
    selection: Selection,
    limits: Limits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = np.array([-0.2, 0.1])  # of quadra_linear and quadra
    monkeypatch.setattr(finals_module, "fit_biases", lambda *_: (planted, 0.5))
    found = hold(tmp_path, finalist_rounds=2, finalist_epochs=2)
    assert [each.round for each in found.finalists] == [1] * 4 + [2] * 4
    assert [dict(each.biases) for each in found.rounds] == [{}, {"quadra_linear": -0.2, "quadra": 0.1}]
    assert len({each.solution.indices for each in found.finalists}) == 8
    assert found.biases == {"quadra_linear": -0.2, "quadra": 0.1}
    kinds = kinds_of(space)
    for each in found.finalists[4:]:
        biases = [found.biases.get(row[i], 0.0) for row, i in zip(kinds, each.solution.indices, strict=True)]
        plain = [row[i] for row, i in zip(selection.scores, each.solution.indices, strict=True)]
        assert each.solution.score == pytest.approx(math.fsum(plain) + math.fsum(biases))
        assert all(limit.amount(each.solution.indices) <= limit.limit for limit in limits)
    ends = [(each.accuracies[-1], -each.losses[-1]) for each in found.finalists if len(each.accuracies) == 2]
    assert (found.winner.accuracies[-1], -found.winner.losses[-1]) == max(ends)


def test_without_a_correction_there_is_no_second_round(
    hold: Hold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finals_module, "fit_biases", lambda *_: (np.ones(2), -0.1))
    found = hold(tmp_path, finalist_rounds=3, finalist_epochs=2)
    assert (len(found.rounds), len(found.finalists), found.biases, found.explained) == (1, 4, {}, -0.1)


def test_a_planted_bias_is_recovered() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (12, 3)).astype(float)
    scores, biases = rng.normal(1.0, 0.1, 12), np.array([0.05, 0.0, -0.08])
    losses = 2.0 - scores - counts @ biases
    found, explained = fit_biases(counts, scores, losses)
    assert found == pytest.approx(biases, abs=1e-3)
    assert explained > 0.99
    noisy, less = fit_biases(counts, scores, losses + rng.normal(0, 0.02, 12))
    assert noisy == pytest.approx(biases, abs=0.02)
    assert 0.5 < less < explained


def test_noise_is_no_bias() -> None:
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(40):
        counts = rng.integers(0, 6, (8, 3)).astype(float)
        found, explained = fit_biases(counts, np.zeros(8), rng.normal(0, 0.02, 8))
        shares.append(explained)
        assert np.abs(found).max() < 0.05
    assert np.median(shares) < 0.2


def test_two_finalists_are_too_few_to_correct_effects(hold: Hold, tmp_path: Path) -> None:
    found = hold(tmp_path, finalists=2, finalist_epochs=1)
    assert (found.biases, found.explained) == ({}, None)


def test_finalists_are_compared_after_equally_many_epochs_where_classes_are_rare_by_balanced_accuracy() -> (
    None
):
    labels = torch.tensor([0] * 90 + [1] * 10)
    plain, weighted = (
        make_objective("cross-entropy", "accuracy", labels, 2, weights) for weights in ("none", "balanced")
    )

    def one(accuracy: float, balanced: float) -> Any:
        finalist = finals_module.Finalist(1, 1, None, None, None, 8)  # type: ignore[arg-type]  # not looked at
        finalist.accuracies, finalist.balanced_accuracies, finalist.losses = [accuracy], [balanced], [1.0]
        return finalist

    both = [one(0.9, 0.5), one(0.8, 0.7)]
    beyond = one(0.7, 0.5)  # resumed, it has another epoch behind it already
    beyond.accuracies.append(0.95)
    beyond.losses.append(0.1)
    failed = one(0.99, 0.99)
    failed.problem = "step 9: the loss is nan"
    assert finals_module._figures([*both, beyond, failed], plain, 1) == (
        [0.9, 0.8, 0.7, -math.inf],
        [1.0, 1.0, 1.0, math.inf],
    )
    assert finals_module._figures(both, plain, 1)[0] == [0.9, 0.8]
    assert finals_module._figures(both, weighted, 1)[0] == [0.5, 0.7]


def test_finalists_are_trained_as_train_subnet_begins(space: SearchSpace) -> None:
    recipe = finalist_recipe(CONFIG, "fashion-mnist")
    assert recipe == Recipe.load("fashion-short")
    assert finalist_recipe(CONFIG.override({"finalist_recipe": "small"}), "digits") == Recipe.load("small")
    large = space.with_resolution(224)
    for asked, px in ((recipe, 64), (recipe.override({"resolution_px": 32}), 32), (RECIPE, 8)):
        found = finalist_training(CONFIG, asked, large, 1000, ALONE).recipe
        assert found.stages == ((px, 4),)
        assert found.learning_rate == asked.learning_rate
    # without a size of its own, the search's
    plain = Recipe(epochs=60, batch_size=64, learning_rate=1e-3)
    larger = CONFIG.override({"resolution_px": 128})
    assert finalist_training(larger, plain, large, 1000, ALONE).resolution_px == 128
    few = finalist_training(CONFIG, recipe, space, 50, ALONE).recipe
    assert (few.batch_size, few.resolution_px) == (50, 32)
    assert few.ema_decay == finals_module.AVERAGED
    averaged = recipe.override({"ema_decay": 0.999})
    assert finalist_training(CONFIG, averaged, space, 50, ALONE).recipe.ema_decay == 0.999


def test_a_linear_start_would_undo_the_supernets_weights(space: SearchSpace) -> None:
    linear = RECIPE.override({"linear_start": True})
    with pytest.raises(UsageError, match="`finalists_from='scratch'` too"):
        finalist_training(CONFIG, linear, space, 1000, ALONE)
    scratch = CONFIG.override({"finalists_from": "scratch"})
    assert finalist_training(scratch, linear, space, 1000, ALONE).recipe.linear_start


def test_a_recipe_for_trained_weights_is_one_for_finalists_of_the_supernet(space: SearchSpace) -> None:
    slow = RECIPE.override({"epochs": 20, "head_epochs": 4, "backbone_rate": 0.5})
    config = CONFIG.override({"finalist_epochs": 3})
    found = finalist_training(config, slow, space, 1000, ALONE).recipe
    # fewer epochs than the recipe's, of which one at least trains all
    assert (found.epochs, found.head_epochs, found.backbone_rate) == (3, 2, 0.5)
    longer = CONFIG.override({"finalist_epochs": 10})
    assert finalist_training(longer, slow, space, 1000, ALONE).recipe.head_epochs == 4
    scratch = config.override({"finalists_from": "scratch"})
    asked = "`finalist_recipe`: `head_epochs=4` and `backbone_rate=0.5`: for weights that are trained already"
    with pytest.raises(UsageError, match=f"^{asked}"):
        finalist_training(scratch, slow, space, 1000, ALONE)


def test_progress_names_the_finalist(
    space: SearchSpace, limits: Limits, digits: ImageData, selection: Selection, tmp_path: Path
) -> None:
    state = state_of(space, limits, digits, finalists=2, finalist_epochs=1)
    training = finalist_training(state.problem.config, RECIPE, space, len(digits.train), ALONE)
    reports: list[Report] = []
    hold_finals(state, selection, tmp_path, training, reporting_to(reports.append))
    assert [(each.phase, each.done, each.total) for each in reports] == [
        (f"finalist {number} of 2", done, STEPS) for number in (1, 2) for done in range(1, STEPS + 1)
    ]
