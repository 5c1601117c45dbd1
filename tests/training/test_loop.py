import itertools
import json
import os
import signal
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qnas.common.errors import CheckpointError, Interrupted, TrainingError
from qnas.data.batches import batch_count
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import METRICS_FILE, RESULT_FILE, SAMPLE_FILE, WEIGHTS_FILE
from qnas.runs.tensors import load_tensors
from qnas.spaces.arch import arch_document, make_arch, sample_arch
from qnas.spaces.space import SearchSpace, load_space
from qnas.training.loop import Interval, run_to_end, stream
from qnas.training.optimizer import GRADIENT_CLIP, ReLinear, make_optimizer, make_schedule, weight_step
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.scoring import classify, recalibrate
from qnas.training.subnet_trainer import SubnetTrainer, train_subnet
from qnas.training.supernet_weights import load_weights

RECIPE = Recipe(resolution_px=8, epochs=2, batch_size=128, learning_rate=5e-3)
CONFIG = TrainConfig(recipe=RECIPE)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


@pytest.fixture
def source(tiny_space: SearchSpace, tmp_path: Path) -> FoundArch:
    arch = make_arch(tiny_space, ("quadra_k5_e4", "identity", "quadra_k3_e2", "quadra_k3_e2"))
    return FoundArch(tiny_space, arch, arch_document(tiny_space, arch, {}), tmp_path)


def test_norms_and_biases_do_not_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    optimizer = make_optimizer(network.parameters(), 0.1, 0.5)
    total = torch.stack([0 * parameter.sum() for parameter in network.parameters()]).sum()
    total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()
    for parameter in network.parameters():
        expected = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected))


def test_the_optimiser_is_adamw_for_what_was_used_and_leaves_the_rest() -> None:
    ours, torchs = (nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for _ in range(2))
    torchs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours.parameters(), 0.1, 0.5)
    groups = [{**group} for group in optimizer.param_groups]
    matrices, biases = ([p for p in torchs.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": biases, "weight_decay": 0.0}], lr=0.1
    )
    x = torch.randn(4, 3)
    for used in (0, 1, 1, 0):
        before = {name: p.clone() for name, p in ours[1 - used].named_parameters()}
        optimizer.zero_grad()
        ours[used](x).square().sum().backward()
        assert {id(p) for p in optimizer.used} == {id(p) for p in ours[used].parameters()}
        optimizer.step()
        reference.zero_grad()
        torchs[used](x).square().sum().backward()
        reference.step()
        for name, p in ours[1 - used].named_parameters():
            assert torch.equal(p, before[name])
        for p, expected in zip(ours.parameters(), torchs.parameters(), strict=True):
            torch.testing.assert_close(p, expected)
    assert [group["params"] for group in optimizer.param_groups] == [group["params"] for group in groups]
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_the_optimiser_goes_on_from_its_state() -> None:
    """Of all weights, not only of those that were used last."""
    networks = [nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for _ in range(2)]
    optimizers = [make_optimizer(network.parameters(), 0.1, 0.5) for network in networks]
    x = torch.randn(4, 3)

    def step(which: int, used: int) -> None:
        optimizers[which].zero_grad()
        networks[which][used](x).square().sum().backward()
        optimizers[which].step()

    step(0, 0)
    step(0, 1)
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    for which in range(2):
        step(which, 0)
    for p, expected in zip(networks[1].parameters(), networks[0].parameters(), strict=True):
        assert torch.equal(p, expected)


def quadratic_step(relinear: ReLinear | None, *, steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a quadratic and another weight after some steps of rate 0.1 towards the same."""
    quadratic, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    if relinear is not None:
        relinear = replace(relinear, weights=[quadratic])
    optimizer = make_optimizer([quadratic, other], 0.1, 0.0, relinear)
    for _ in range(steps):
        (quadratic + other).square().sum().backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        optimizer.zero_grad()
    return quadratic.detach(), other.detach()


def test_gamma_is_the_quadratic_weights_share_of_the_rate() -> None:
    quadratic, other = quadratic_step(ReLinear([], gamma=0.25, alpha=0, beta=0), steps=1)
    torch.testing.assert_close(1 - quadratic, 0.25 * (1 - other))
    quadratic, other = quadratic_step(ReLinear([], gamma=0, alpha=0.5, beta=0.5))
    assert torch.equal(quadratic, torch.ones(2, 2))
    assert not torch.equal(other, torch.ones(2, 2))
    same = quadratic_step(ReLinear([], gamma=1, alpha=0, beta=0))
    for found, expected in zip(same, quadratic_step(None), strict=True):
        assert torch.equal(found, expected)


def test_alpha_shrinks_in_proportion_and_beta_by_a_constant_to_zero() -> None:
    weight = torch.tensor([[1.0, 0.04], [-1.0, -0.04]])
    for alpha, beta, expected in ((0.5, 0.0, 0.95 * weight), (0.0, 0.5, F.softshrink(weight, 0.05))):
        quadratic, other = nn.Parameter(weight.clone()), nn.Parameter(torch.ones(2, 2))
        optimizer = make_optimizer([quadratic, other], 0.1, 0.0, ReLinear([quadratic], 1, alpha, beta))
        (0 * quadratic.sum() + 0 * other.sum()).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        torch.testing.assert_close(quadratic.detach(), expected)
        assert torch.equal(other.detach(), torch.ones(2, 2))


def test_the_quadratic_rate_follows_the_schedule_to_its_end() -> None:
    """At a small share too, where a cosine to a common last rate would rise."""
    quadratic, other = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer([quadratic, other], 1.0, 0.0, ReLinear([quadratic], 1e-3, 0, 0))
    schedule = make_schedule(optimizer, steps=10, warmup_steps=1)
    moved = []
    for _ in range(10):
        before = [weight.detach().clone() for weight in (quadratic, other)]
        (quadratic.sum() + other.sum()).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        moved.append(
            [float((w.detach() - b).abs().max()) for w, b in zip((quadratic, other), before, strict=True)]
        )
    for ours, others in moved:
        assert ours == pytest.approx(1e-3 * others, rel=1e-3)


class Unseen(nn.Parameter):
    """A weight whose gradient nobody may ask for."""

    @property
    def grad(self) -> torch.Tensor | None:  # type: ignore[override]  # a plain attribute of Tensor
        raise AssertionError("looked at")


def test_a_step_leaves_no_gradient_and_looks_at_no_unused_weight() -> None:
    used, unused = nn.Parameter(torch.eye(3)), Unseen(torch.eye(3))
    optimizer = make_optimizer([unused, used], 0.1, 0.5)
    weight_step(lambda x: x @ used, optimizer, torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), 0.0)
    assert used.grad is None
    assert not torch.equal(used, torch.eye(3))
    assert torch.equal(unused, torch.eye(3))
    assert unused not in optimizer.state


def test_the_rate_warms_up_then_falls_as_a_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, steps=110, warmup_steps=10)
    rates = []
    for _ in range(110):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx((1 + 0.01) / 2)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert all(a <= b for a, b in itertools.pairwise(rates[:11]))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_long_gradients_are_clipped() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer([weight], 1.0, 0.0)
    images, labels = 1e4 * torch.ones(1, 2), torch.tensor([0])
    weight_step(lambda x: x @ weight, optimizer, images, labels, 0.0)
    # AdamW's first moment after a first step is a tenth of the gradient that it was given
    moment = optimizer.state[weight]["exp_avg"]
    assert float(moment.norm()) == pytest.approx(0.1 * GRADIENT_CLIP, rel=1e-5)


def test_label_smoothing_is_in_the_loss_of_a_step() -> None:
    weight = nn.Parameter(torch.eye(3))
    images, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    expected = F.cross_entropy(images, labels, label_smoothing=0.3)
    loss = weight_step(lambda x: x @ weight, make_optimizer([weight], 0.0, 0.0), images, labels, 0.3)
    torch.testing.assert_close(loss, expected.detach())


def test_the_score_counts_every_image_once() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 0, 0])
    score = classify(lambda x: x, [(logits[:2], labels[:2]), (logits[2:], labels[2:])]).score
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.loss == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert score.images == 3
    each = classify(lambda x: x, [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    expected = F.cross_entropy(logits, labels, reduction="none").double()
    torch.testing.assert_close(each.losses, expected)
    assert each.right.tolist() == [True, False, True]
    assert each.score == score


def test_recalibrated_statistics_are_those_of_the_batches() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.fill_(100.0)  # type: ignore[union-attr]  # tracked
    batches = [torch.randn(4, 3, 5, 5) * 2 + 1 for _ in range(3)]
    recalibrate(norm, [(batch, torch.zeros(4)) for batch in batches])
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    assert not norm.training
    assert norm.momentum == 0.1


@pytest.mark.parametrize("start", [0, 3, 25])
def test_a_stream_goes_on_from_any_batch(start: int, digits: ImageData) -> None:
    per_epoch = batch_count(digits.train, 128, drop_last=True)
    assert per_epoch < 25  # the last case starts in a later epoch
    whole = list(itertools.islice(stream(digits.train, 128, 7, 0, augment=True), start + 2))
    part = list(itertools.islice(stream(digits.train, 128, 7, start, augment=True), 2))
    for (images, labels), (other, same) in zip(whole[start:], part, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(labels, same)


def with_recipe(**changes: Any) -> TrainConfig:
    return TrainConfig(recipe=RECIPE.override(changes))


def train(source: FoundArch, data: ImageData, folder: Path, config: TrainConfig = CONFIG) -> Path:
    train_subnet(source, data, config, folder, {"data": "digits"}, from_supernet=False)
    return folder


def test_training_learns_and_repeats(source: FoundArch, digits: ImageData, tmp_path: Path) -> None:
    folders = [train(source, digits, tmp_path / name) for name in ("a", "b")]
    for file in (WEIGHTS_FILE, RESULT_FILE, METRICS_FILE):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    result = json.loads((folders[0] / RESULT_FILE).read_text())
    assert result["test_accuracy"] > 0.3  # a guess has 0.1
    rows = [json.loads(line) for line in (folders[0] / METRICS_FILE).read_text().splitlines()]
    assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2]
    assert rows[-1]["test_accuracy"] == result["test_accuracy"]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_training_whose_loss_is_no_number_stops(
    source: FoundArch, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SubnetTrainer.step

    def break_then_step(self: SubnetTrainer) -> dict[str, float]:
        if self.steps_done == 7:
            with torch.no_grad():
                next(self.network.parameters()).fill_(torch.nan)
        return step(self)

    monkeypatch.setattr(SubnetTrainer, "step", break_then_step)
    with pytest.raises(TrainingError, match="step 8: the loss is nan"):
        train(source, digits, tmp_path / "run")
    assert not (tmp_path / "run" / WEIGHTS_FILE).exists()


def test_stopped_training_goes_on_as_if_it_had_not_been(
    source: FoundArch, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(source, digits, tmp_path / "whole")
    step = SubnetTrainer.step

    def step_and_stop(self: SubnetTrainer) -> dict[str, float]:
        row = step(self)
        if self.steps_done == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(SubnetTrainer, "step", step_and_stop)
        with pytest.raises(Interrupted):
            train(source, digits, folder)
    train_subnet(source, digits, CONFIG, folder, {"data": "digits"}, from_supernet=False, resume=True)
    for file in (WEIGHTS_FILE, RESULT_FILE, METRICS_FILE):
        assert (whole / file).read_bytes() == (folder / file).read_bytes(), file
    with pytest.raises(CheckpointError, match="this training is complete"):
        train_subnet(source, digits, CONFIG, folder, {"data": "digits"}, from_supernet=False, resume=True)


OFTEN = Interval(steps=3)


class Drawing:
    """Steps that draw from torch's own random numbers, as a dropout would."""

    total_steps = 7
    phase = "draw"

    def __init__(self) -> None:
        self.steps_done = 0
        self.saved_after: list[int] = []
        self.stop_at = 0  # asked to stop in this step
        self.stop_saving = 0  # asked to stop while the state after this step is saved

    def step(self) -> dict[str, float]:
        self.steps_done += 1
        if self.steps_done == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0, "drawn": float(torch.rand(()))}

    def summary(self, row: Mapping[str, float]) -> str:
        return ""

    def to_dict(self) -> dict[str, Any]:
        if self.stop_saving and self.steps_done == self.stop_saving:
            self.stop_saving = 0
            os.kill(os.getpid(), signal.SIGTERM)
        self.saved_after.append(self.steps_done)
        return {"steps_done": self.steps_done}

    def load(self, state: Mapping[str, Any]) -> None:
        self.steps_done = state["steps_done"]


def draw(folder: Path, stepper: Drawing, *, resume: bool = False, interval: Interval = OFTEN) -> str:
    folder.mkdir(exist_ok=True)
    run_to_end(stepper, folder, seed=3, resume=resume, interval=interval)
    return (folder / METRICS_FILE).read_text()


def test_torchs_own_random_numbers_go_on_and_the_callers_stay(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    whole = draw(tmp_path / "whole", Drawing())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    stepper = Drawing()
    stepper.stop_at = 4
    with pytest.raises(Interrupted):
        draw(tmp_path / "stopped", stepper)
    torch.rand(5)
    assert draw(tmp_path / "stopped", Drawing(), resume=True) == whole


@pytest.mark.parametrize(
    ("interval", "saved_after"),
    [
        (Interval(), [7]),
        (OFTEN, [3, 6, 7]),
        (Interval(steps=100, seconds=0), [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_a_state_is_saved_by_steps_or_seconds_whichever_is_first(
    interval: Interval, saved_after: list[int], tmp_path: Path
) -> None:
    stepper = Drawing()
    draw(tmp_path / "run", stepper, interval=interval)
    assert stepper.saved_after[: len(saved_after)] == saved_after


@pytest.mark.parametrize("step", [3, 7])
def test_a_signal_that_comes_while_a_state_is_saved_counts(step: int, tmp_path: Path) -> None:
    whole = draw(tmp_path / "whole", Drawing())
    stepper = Drawing()
    stepper.stop_saving = step
    with pytest.raises(Interrupted):
        draw(tmp_path / "stopped", stepper)
    assert draw(tmp_path / "stopped", Drawing(), resume=True) == whole


def test_weights_of_another_network_are_refused(source: FoundArch, digits: ImageData, tmp_path: Path) -> None:
    folder = train(source, digits, tmp_path / "run", with_recipe(epochs=1))
    weights = load_tensors(folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="not the weights of this network"):
        load_weights(nn.Linear(2, 2), weights, folder / WEIGHTS_FILE)
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_tensors(folder / WEIGHTS_FILE)


def test_forced_training_leaves_nothing_of_the_former_network(
    source: FoundArch, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(source, digits, tmp_path / "run", with_recipe(epochs=1))

    def fail(self: SubnetTrainer) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(SubnetTrainer, "step", fail)
    with pytest.raises(Interrupted):
        train_subnet(source, digits, CONFIG, folder, {"data": "digits"}, from_supernet=False, force=True)
    for file in (WEIGHTS_FILE, RESULT_FILE, SAMPLE_FILE):
        assert not (folder / file).exists(), file


def test_a_search_is_not_trained_over(source: FoundArch, digits: ImageData) -> None:
    with pytest.raises(CheckpointError, match="holds the architecture itself"):
        train_subnet(
            source, digits, CONFIG, source.folder, {"data": "digits"}, from_supernet=False, force=True
        )


@pytest.mark.slow
def test_a_network_reaches_97_percent_on_digits_from_scratch(tmp_path: Path) -> None:
    """The demo's bar, without the supernet's help."""
    space = load_space("quadranet-mobile")
    arch = sample_arch(space, np.random.default_rng(0))
    source = FoundArch(space, arch, arch_document(space, arch, {}), tmp_path)
    data = load_data(parse_data_spec("digits"), resolution_px=32, quiet=True)
    score = train_subnet(
        source,
        data,
        TrainConfig(recipe=Recipe.load("digits"), threads=1),
        tmp_path / "run",
        {"data": "digits"},
        from_supernet=False,
    )
    assert score.accuracy >= 0.97
