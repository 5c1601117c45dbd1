"""The effect of a recipe on a training. Learning, stopping and resuming are tested in test_loop."""

import csv
import json
import os
import signal
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TINY_SPACE
from onnxruntime import InferenceSession
from torch import Tensor, nn

from qnas.common.errors import Interrupted, TrainingError, UsageError
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.deploy.export.tracing import trace_onnx
from qnas.nn.blocks import QuadraBlock
from qnas.nn.subnet import build_subnet
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import (
    BEST_FILE,
    CONFIG_FILE,
    EPOCHS_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    WEIGHTS_FILE,
)
from qnas.runs.tensors import load_tensors
from qnas.spaces.arch import arch_document, make_arch
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training.losses import Objective, accuracy
from qnas.training.optimizer import Teacher
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.subnet_trainer import SubnetTrainer, drop_blocks, train_subnet

RECIPE = Recipe(resolution_px=8, epochs=2, batch_size=128, learning_rate=5e-3)
EVERYTHING: dict[str, Any] = {
    "accumulation": 2,
    "random_resized_crop": 0.3,
    "randaugment": 5.0,
    "randaugment_std": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "random_erasing": 0.25,
    "stochastic_depth": 0.3,
    "ema_decay": 0.9,
    "linear_start": True,
    "quadratic_gamma": 0.1,
    "quadratic_alpha": 0.1,
    "quadratic_beta": 0.01,
}
CHOICES = ("quadra_k5_e4", "identity", "quadra_k3_e2", "quadra_k3_e2")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, keep_originals=True, quiet=True)


@pytest.fixture
def source(tiny_space: SearchSpace, tmp_path: Path) -> FoundArch:
    arch = make_arch(tiny_space, CHOICES)
    return FoundArch(tiny_space, arch, arch_document(tiny_space, arch, {}), tmp_path)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(recipe=RECIPE.override(changes))


def train(
    source: FoundArch, data: ImageData, folder: Path, how: TrainConfig, *, resume: bool = False
) -> Path:
    request = {"data": "digits"}
    train_subnet(source, data, how, folder, request, from_supernet=False, resume=resume)
    return folder


def trainer_of(
    source: FoundArch, data: ImageData, teacher: Teacher | None = None, **changes: Any
) -> SubnetTrainer:
    torch.manual_seed(0)
    network = build_subnet(source.space, source.arch, len(data.classes))
    return SubnetTrainer(network, data, config(**changes), teacher=teacher)


def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("balance", [{}, {"sampler": "balanced"}, {"class_weights": "balanced"}], ids=str)
def test_training_with_everything_goes_on_to_the_bit(
    balance: dict[str, str],
    source: FoundArch,
    digits: ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how = config(**EVERYTHING).override(balance)
    whole = train(source, digits, tmp_path / "whole", how)
    step = SubnetTrainer.step

    def step_and_stop(self: SubnetTrainer) -> dict[str, float]:
        row = step(self)
        if self.steps_done == 13:  # of 22, 11 an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return row

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(SubnetTrainer, "step", step_and_stop)
        with pytest.raises(Interrupted):
            train(source, digits, folder, how)
    torch.rand(3)  # another process has other random numbers
    train(source, digits, folder, how, resume=True)
    for file in (WEIGHTS_FILE, BEST_FILE, RESULT_FILE, METRICS_FILE, EPOCHS_FILE):
        assert (whole / file).read_bytes() == (folder / file).read_bytes(), file


GROWING: dict[str, Any] = {"start_resolution_px": 4, "resolution_px": 16, "epochs": 3, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def larger() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=16, keep_originals=True, quiet=True)


@pytest.fixture(scope="module")
def grown(larger: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that grows, which nothing happened to: not to be changed."""
    folder = tmp_path_factory.mktemp("grown")
    space = parse_space(TINY_SPACE, "tiny.yaml")
    arch = make_arch(space, CHOICES)
    source = FoundArch(space, arch, arch_document(space, arch, {}), folder)
    return train(source, larger, folder / "whole", config(**GROWING, random_resized_crop=0.3))


@pytest.mark.parametrize("step", [3, 11, 14, 30])
def test_a_training_that_grows_goes_on_to_the_bit_from_each_size(
    step: int,
    grown: Path,
    source: FoundArch,
    larger: ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how = config(**GROWING, random_resized_crop=0.3)
    assert how.recipe.stages == ((4, 1), (8, 1), (16, 1))
    take = SubnetTrainer.step

    def step_and_stop(self: SubnetTrainer) -> dict[str, float]:
        row = take(self)
        if self.steps_done == step:  # of 33, 11 an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return row

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(SubnetTrainer, "step", step_and_stop)
        with pytest.raises(Interrupted):
            train(source, larger, folder, how)
    train(source, larger, folder, how, resume=True)
    for file in (WEIGHTS_FILE, BEST_FILE, RESULT_FILE, METRICS_FILE, EPOCHS_FILE):
        assert (grown / file).read_bytes() == (folder / file).read_bytes(), file


def test_each_epoch_has_images_of_its_size_and_only_those_of_the_last_size_have_a_best(
    source: FoundArch, larger: ImageData, tmp_path: Path
) -> None:
    seen: list[tuple[bool, int]] = []

    def watch(network: nn.Module, given: tuple[Tensor]) -> None:
        seen.append((network.training, given[0].shape[-1]))

    trainer = trainer_of(source, larger, **GROWING)
    for each in (trainer.network, trainer.result):
        each.register_forward_pre_hook(watch)
    rows = [trainer.step() for _ in range(trainer.total_steps)]
    assert [px for trains, px in seen if trains] == [4] * 11 + [8] * 11 + [16] * 11
    assert [px for trains, px in seen if not trains] == [4] * 2 + [8] * 2 + [16] * 2, "359 images"
    assert [row["resolution_px"] for row in rows if "epoch" in row] == [4, 8, 16]
    assert trainer.best["epoch"] == 3
    assert trainer.test().score.accuracy == rows[-1]["test_accuracy"]
    folder = train(source, larger, tmp_path / "run", config(**GROWING))
    result = json.loads((folder / RESULT_FILE).read_text())
    assert result["resolution_px"] == 16
    assert result["stages"] == [{"resolution_px": px, "epochs": 1} for px in (4, 8, 16)]


def test_an_average_starts_anew_at_each_size(source: FoundArch, larger: ImageData) -> None:
    """Statistics of another size would remain in it."""
    trainer = trainer_of(source, larger, **GROWING)
    while trainer.steps_done < 11:
        trainer.step()
    before = [p.detach().clone() for p in trainer.result.parameters()]
    trainer.step()
    for old, average, weight in zip(
        before, trainer.result.parameters(), trainer.network.parameters(), strict=True
    ):
        torch.testing.assert_close(average, old.lerp(weight.detach(), 0.9))


def test_a_network_is_not_trained_at_another_size_than_its_data(source: FoundArch, larger: ImageData) -> None:
    with pytest.raises(AssertionError):
        trainer_of(source, larger, resolution_px=8)


def test_the_resolved_recipe_is_in_the_run(source: FoundArch, digits: ImageData, tmp_path: Path) -> None:
    how = config(epochs=1, mixup=0.2)
    folder = train(source, digits, tmp_path / "run", how)
    assert Recipe.parse((folder / RECIPE_FILE).read_text(), RECIPE_FILE) == how.recipe
    recorded = json.loads((folder / CONFIG_FILE).read_text())["train"]["recipe"]
    assert recorded == {k: v for k, v in how.recipe.values().items() if k not in Recipe.LATER}
    assert TrainConfig.check({"recipe": recorded}, "config.json").recipe == how.recipe


# ---- stochastic depth


def test_a_dropped_block_lets_its_input_pass_and_a_kept_one_adds_more(source: FoundArch) -> None:
    network = build_subnet(source.space, source.arch, 10)
    blocks = [block for block in network if isinstance(block, QuadraBlock)]
    last = blocks[-1]
    x = torch.randn(400, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        added = last.eval()(x) - x
        drop_blocks(network, 0.4)
        assert torch.equal(last(x) - x, added), "nothing is dropped outside of training"
        shares = (last.train()(x) - x).flatten(1).norm(dim=1) / added.flatten(1).norm(dim=1)
        first = blocks[0].train()
        y = torch.randn(4, 8, 4, 4).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(first(y), first.eval()(y))  # its rate is 0
    dropped = shares < 1e-6
    assert float(dropped.float().mean()) == pytest.approx(0.4, abs=0.08)
    torch.testing.assert_close(shares[~dropped], torch.full_like(shares[~dropped], 1 / 0.6))


def test_the_rate_grows_with_depth_to_the_last_block(source: FoundArch) -> None:
    torch.manual_seed(0)
    network = build_subnet(source.space, source.arch, 10)
    drop_blocks(network, 0.4)
    blocks = [block for block in network if isinstance(block, QuadraBlock)]
    assert len(blocks) == 3
    with torch.no_grad():
        for block, rate in zip(blocks, (0.0, 0.2, 0.4), strict=True):
            x = torch.randn(500, block.conv_a.in_channels, 4, 4)
            dropped = (block.train()(x) - x).abs().flatten(1).amax(1) == 0
            assert float(dropped.float().mean()) == pytest.approx(rate, abs=0.06)


def test_a_trained_network_is_exported_without_its_dropping(
    source: FoundArch, digits: ImageData, tmp_path: Path
) -> None:
    folder = train(source, digits, tmp_path / "run", config(epochs=1, stochastic_depth=0.9))
    assert not any("drop" in name or "depth" in name for name in load_tensors(folder / WEIGHTS_FILE))
    trainer = trainer_of(source, digits, stochastic_depth=0.9)
    trainer.step()
    network, shown = trainer.result.eval(), images()
    session = InferenceSession(trace_onnx(network, (3, 8, 8), "here").SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: shown.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(logits), network(shown), rtol=1e-4, atol=1e-4)


# ---- the moving average


def test_the_average_is_what_is_tested_and_kept(source: FoundArch, digits: ImageData) -> None:
    trainer = trainer_of(source, digits, ema_decay=0.9)
    expected = [p.detach().clone() for p in trainer.network.parameters()]
    for step in range(15):
        trainer.step()
        # the first steps' weights count less than a decay of 0.9 would have it
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        for average, weight in zip(expected, trainer.network.parameters(), strict=True):
            average.lerp_(weight.detach(), 1 - decay)
    for average, found, weight in zip(
        expected, trainer.result.parameters(), trainer.network.parameters(), strict=True
    ):
        torch.testing.assert_close(found, average)
        assert not torch.equal(found, weight)
    trainer.network.requires_grad_(False)
    for weight in trainer.network.parameters():
        weight.zero_()
    assert trainer.test().score.accuracy > 0.15, "of the average, not of the network"


def test_without_an_average_the_last_weights_are_kept(
    source: FoundArch, digits: ImageData, tmp_path: Path
) -> None:
    trainer = trainer_of(source, digits)
    assert trainer.result is trainer.network


def test_batch_statistics_are_averaged_too(
    tiny_space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    space = parse_space(tiny_space.to_yaml().replace("layernorm", "batchnorm"), "tiny.yaml")
    arch = make_arch(space, CHOICES)
    trainer = trainer_of(FoundArch(space, arch, {}, tmp_path), digits, ema_decay=0.5, linear_start=False)
    for _ in range(3):
        trainer.step()
    norms = [
        [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for net in (trainer.network, trainer.result)
    ]
    means = [norm.running_mean for both in norms for norm in both[:1]]
    assert means[0] is not None
    assert means[1] is not None
    assert not torch.equal(means[0], means[1])
    assert float(means[1].abs().sum()) > 0


# ---- accumulation


def test_a_batch_in_parts_is_the_whole_batch(source: FoundArch, digits: ImageData) -> None:
    changes: dict[str, Any] = {"learning_rate": 1e-3, "gradient_clip": 1e9}
    whole, parts = (trainer_of(source, digits, accumulation=n, **changes) for n in (1, 4))
    sizes: list[int] = []
    hook = parts.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    parts_loss = parts.step()["loss"]
    hook.remove()
    assert sizes[:4] == [32] * 4, "no more at once"
    assert parts_loss == pytest.approx(whole.step()["loss"], rel=1e-4)
    for _ in range(2):
        assert parts.step()["loss"] == pytest.approx(whole.step()["loss"], rel=1e-4)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=3e-4)
        # Adam's steps hide a gradient of another size, its moments do not
        moments = (t.optimizer.state[p]["exp_avg"] for t, p in ((whole, a), (parts, b)))
        torch.testing.assert_close(*moments, rtol=1e-2, atol=1e-3)


def test_parts_that_are_not_equal_are_refused(source: FoundArch, digits: ImageData) -> None:
    with pytest.raises(UsageError, match=r"128 images .* cannot be split into 3 equal parts"):
        trainer_of(source, digits, accumulation=3)


# ---- the quadratic part let in


class Linear(QuadraBlock):
    """The block without its quadratic term."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv_c(self.norm1(x))
        y: Tensor = x + self.project(self.act(self.expand(self.norm2(x))))
        return y


@pytest.mark.parametrize("training", [True, False])
def test_a_linear_start_is_the_network_without_the_quadratic_term(
    training: bool, source: FoundArch, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[nn.Module] = []

    def stop(self: SubnetTrainer) -> dict[str, float]:
        begun.append(self.network)
        raise KeyboardInterrupt

    monkeypatch.setattr(SubnetTrainer, "step", stop)
    with pytest.raises(Interrupted):
        train(source, digits, tmp_path / "run", config(linear_start=True))
    (network,) = begun
    linear = deepcopy(network)
    for block in linear.modules():
        if isinstance(block, QuadraBlock):
            block.__class__ = Linear
    x = images()
    torch.testing.assert_close(network.train(training)(x), linear.train(training)(x))
    # and it was no linear network before
    torch.manual_seed(0)
    fresh = build_subnet(source.space, source.arch, 10)
    for start, weight in zip(fresh.parameters(), network.parameters(), strict=True):
        assert weight.abs().sum() == 0 or torch.equal(start, weight)
    assert not torch.allclose(fresh(x), linear(x), atol=1e-4)


def test_the_quadratic_part_is_let_in_from_a_linear_start(source: FoundArch, digits: ImageData) -> None:
    trainer = trainer_of(source, digits, linear_start=False)
    block = next(block for block in trainer.network.modules() if isinstance(block, QuadraBlock))
    with torch.no_grad():
        block.conv_b.weight.zero_()
    trainer.step()
    assert float(block.conv_b.weight.detach().abs().sum()) > 0


def test_gamma_zero_leaves_a_linear_network(source: FoundArch, digits: ImageData, tmp_path: Path) -> None:
    how = config(linear_start=True, quadratic_gamma=0.0, epochs=1)
    weights = load_tensors(train(source, digits, tmp_path / "run", how) / WEIGHTS_FILE)
    products = [tensor for name, tensor in weights.items() if "conv_b" in name]
    assert len(products) == 3
    assert all(int(tensor.count_nonzero()) == 0 for tensor in products)


def test_a_linear_start_keeps_off_trained_weights(
    source: FoundArch, digits: ImageData, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="`linear_start=True` sets weights to zero"):
        train_subnet(source, digits, config(linear_start=True), tmp_path / "run", {}, from_supernet=True)


def test_a_network_without_quadratic_blocks_has_nothing_to_let_in(digits: ImageData) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(UsageError, match="need a quadratic block, and the network has none"):
        SubnetTrainer(network, digits, config(linear_start=True))


@pytest.mark.parametrize("asked", [{"linear_start": True}, {"quadratic_gamma": 0.1}])
def test_a_network_of_neurons_without_a_linear_part_is_let_in_as_a_whole(
    digits: ImageData, asked: dict[str, Any]
) -> None:
    network = nn.Sequential(QuadraBlock(3, 3, 1, neuron="type4"), nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(UsageError, match=r"neurons with a linear part .*, but the network has type4"):
        SubnetTrainer(network, digits, config(**{"linear_start": False, **asked}))
    SubnetTrainer(network, digits, config(linear_start=False))


# ---- best and last, logs, what goes wrong


def accuracies(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [row["test_accuracy"] for row in rows if "epoch" in row]


def test_the_best_weights_are_those_of_the_best_epoch(
    source: FoundArch, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the last epoch spoils what the first two have learnt
    end = SubnetTrainer._end_epoch

    def spoil(self: SubnetTrainer, rate: float) -> dict[str, float]:
        if self.steps_done == self.total_steps:
            with torch.no_grad():
                next(self.network.parameters()).zero_()
        return end(self, rate)

    monkeypatch.setattr(SubnetTrainer, "_end_epoch", spoil)
    folder = train(source, digits, tmp_path / "run", config(epochs=3))
    found = accuracies(folder)
    result = json.loads((folder / RESULT_FILE).read_text())
    assert result["test_accuracy"] == found[-1] < max(found)
    assert result["best_by_test_images"] == {"epoch": 2, "test_accuracy": max(found)}
    trainer = trainer_of(source, digits)
    for file, best in ((WEIGHTS_FILE, found[-1]), (BEST_FILE, max(found))):
        trainer.network.load_state_dict(load_tensors(folder / file))
        assert trainer.test().score.accuracy == best


def test_the_csv_has_a_line_an_epoch(source: FoundArch, digits: ImageData, tmp_path: Path) -> None:
    folder = train(source, digits, tmp_path / "run", config())
    with (folder / EPOCHS_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert [float(row["test_accuracy"]) for row in rows] == accuracies(folder)
    steps = int(rows[0]["step"])
    mean = sum(line["loss"] for line in lines[:steps]) / steps
    assert float(rows[0]["train_loss"]) == pytest.approx(mean)


def test_training_whose_loss_is_no_number_keeps_the_last_good_weights(
    source: FoundArch, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SubnetTrainer.step

    def break_then_step(self: SubnetTrainer) -> dict[str, float]:
        if self.steps_done == 13:
            with torch.no_grad():
                next(self.network.parameters()).fill_(torch.nan)
        return step(self)

    monkeypatch.setattr(SubnetTrainer, "step", break_then_step)
    said = r"step 14: the loss is nan.*`learning_rate`.*the weights of epoch 1 are in .*best.safetensors"
    with pytest.raises(TrainingError, match=said):
        train(source, digits, tmp_path / "run", config())
    kept = load_tensors(tmp_path / "run" / BEST_FILE)
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert not (tmp_path / "run" / RESULT_FILE).exists()


# ---- a teacher


def steps(trainer: SubnetTrainer, count: int) -> Iterator[float]:
    for _ in range(count):
        yield trainer.step()["loss"]


def test_the_loss_is_the_labels_and_the_teachers_by_weight(source: FoundArch, digits: ImageData) -> None:
    def answer(x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ torch.eye(3, 10)

    temperature = 2.0
    losses = {}
    for weight in (0.0, 0.3, 1.0):
        losses[weight] = next(steps(trainer_of(source, digits, Teacher(answer, weight, temperature)), 1))
    assert losses[0.0] == pytest.approx(next(steps(trainer_of(source, digits), 1)))
    assert losses[0.3] == pytest.approx(0.7 * losses[0.0] + 0.3 * losses[1.0], rel=1e-5)


def test_the_teachers_loss_is_a_divergence_that_its_own_answers_do_not_have() -> None:
    logits, answers = torch.randn(5, 4), torch.randn(5, 4)
    teacher = Teacher(lambda x: answers, 1.0, 3.0)
    p = F.softmax(answers / 3, 1)
    expected = 9 * (p * (p.log() - F.softmax(logits / 3, 1).log())).sum(1).mean()
    torch.testing.assert_close(teacher.loss(torch.zeros(5, 3, 1, 1), logits), expected)
    assert float(teacher.loss(torch.zeros(5, 3, 1, 1), answers)) == pytest.approx(0, abs=1e-6)


# ---- as a library


def test_a_training_needs_no_request_and_prints_nothing(
    source: FoundArch, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = train_subnet(source, digits, config(epochs=1), tmp_path / "run", {}, from_supernet=False)
    result = json.loads((tmp_path / "run" / RESULT_FILE).read_text())
    assert (result["test_accuracy"], result["data"]) == (score.accuracy, digits.name)
    assert "metrics" not in result
    assert capsys.readouterr() == ("", "")


def test_the_loss_trains_and_scores_and_the_metric_is_reported(
    source: FoundArch, digits: ImageData, tmp_path: Path
) -> None:
    how = TrainConfig(recipe=RECIPE.override({"epochs": 1}), loss="focal", metric="balanced-accuracy")
    plain = train(source, digits, tmp_path / "plain", config(epochs=1))
    focal = train(source, digits, tmp_path / "focal", how)
    assert (plain / WEIGHTS_FILE).read_bytes() != (focal / WEIGHTS_FILE).read_bytes()
    result = json.loads((focal / RESULT_FILE).read_text())
    found = load_tensors(focal / PREDICTIONS_FILE)
    assert result["test_loss"] == pytest.approx(float(found["loss"].mean()), rel=1e-5)
    recalls = [entry["value"] for entry in result["per_class"]]
    assert result["metrics"] == {"balanced-accuracy": pytest.approx(sum(recalls) / len(recalls))}
    asked = json.loads((focal / CONFIG_FILE).read_text())["train"]
    assert (asked["loss"], asked["metric"]) == ("focal", "balanced-accuracy")
    assert "loss" not in json.loads((plain / CONFIG_FILE).read_text())["train"]


def test_a_loss_of_ones_own_trains(source: FoundArch, digits: ImageData, tmp_path: Path) -> None:
    seen: list[int] = []

    def hinge(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets.ndim)
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1]).float()
        return F.relu(1 + logits - (targets * logits).sum(1, keepdim=True)).mean(1)

    train_subnet(
        source,
        digits,
        config(epochs=1),
        tmp_path / "run",
        {},
        from_supernet=False,
        objective=Objective(hinge, accuracy),
    )
    assert set(seen) == {1, 2}, "smoothed labels in training, plain ones in evaluation"
    asked = json.loads((tmp_path / "run" / CONFIG_FILE).read_text())["train"]
    assert asked["loss"].endswith("hinge")
    result = json.loads((tmp_path / "run" / RESULT_FILE).read_text())
    assert list(result["metrics"].values()) == [result["test_accuracy"]]
