import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import TINY_SPACE

from qnas.common.errors import UsageError
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.nn.blocks import BatchNorm2d
from qnas.nn.subnet import build_subnet
from qnas.runs.found_arch import FoundArch
from qnas.spaces.arch import arch_document, make_arch
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training.head_first import backbone, head_alone, is_classifier
from qnas.training.recipe import Recipe, TrainConfig
from qnas.training.subnet_trainer import SubnetTrainer, train_subnet

RECIPE = Recipe(resolution_px=8, epochs=3, batch_size=128, learning_rate=5e-3, weight_decay=0.0)
CHOICES = ("quadra_k5_e4", "identity", "quadra_k3_e2", "quadra_k3_e2")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


@pytest.fixture
def space() -> SearchSpace:
    return parse_space(TINY_SPACE, "tiny.yaml").with_norm("batchnorm")


def trainer_of(space: SearchSpace, data: ImageData, **changes: Any) -> SubnetTrainer:
    torch.manual_seed(0)
    network = build_subnet(space, make_arch(space, CHOICES), len(data.classes))
    return SubnetTrainer(network, data, TrainConfig(recipe=RECIPE.override(changes)))


def test_the_backbone_is_all_but_the_classifier(space: SearchSpace) -> None:
    network = build_subnet(space, make_arch(space, CHOICES), 10)
    names = {name for name, _ in network.named_parameters() if is_classifier(name)}
    assert names == {"head.classifier.weight", "head.classifier.bias"}
    assert is_classifier("parts.head.classifier.bias")
    assert not is_classifier("parts.head.expand.weight")
    kept = {id(weight) for weight in backbone(network)}
    assert kept == {id(w) for name, w in network.named_parameters() if name not in names}


def test_what_is_left_alone_has_no_gradient_and_gets_its_state_back(space: SearchSpace) -> None:
    network = build_subnet(space, make_arch(space, CHOICES), 10).train()
    norms = [module for module in network.modules() if isinstance(module, BatchNorm2d)]
    stem = network.get_submodule("stem")
    frozen = next(stem.parameters()).requires_grad_(False)  # by somebody else
    norms[0].eval()
    with head_alone(network):
        network(torch.randn(4, 3, 8, 8)).sum().backward()
        assert not any(norm.training for norm in norms)
    assert all((w.grad is not None) == is_classifier(name) for name, w in network.named_parameters())
    assert all(w.requires_grad for w in network.parameters() if w is not frozen)
    assert not frozen.requires_grad
    assert [norm.training for norm in norms] == [False, *[True] * (len(norms) - 1)]


@pytest.mark.parametrize("changes", [{}, {"stochastic_depth": 0.3, "ema_decay": 0.9, "accumulation": 2}])
def test_only_the_classifier_changes_in_head_epochs(
    changes: dict[str, Any], space: SearchSpace, digits: ImageData
) -> None:
    trainer = trainer_of(space, digits, head_epochs=1, **changes)
    initial = copy.deepcopy(dict(trainer.network.named_parameters()))
    trainer.step()
    for name, weight in trainer.network.named_parameters():
        assert torch.equal(weight, initial[name]) != is_classifier(name), name
    # the first step measured the statistics that the others keep
    before = copy.deepcopy(trainer.network.state_dict())
    for _ in range(trainer.steps_per_epoch - 1):
        trainer.step()
    assert trainer.steps_done == trainer.steps_per_epoch
    after = trainer.network.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != is_classifier(name), name
    trainer.step()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name for name, _ in trainer.network.named_parameters()} - changed == set()
    assert any(name.endswith("running_var") for name in changed)


def test_the_statistics_are_measured_before_they_are_kept(space: SearchSpace, digits: ImageData) -> None:
    """Those of a fresh network are 0 and 1, which fit no image."""
    trainer = trainer_of(space, digits, head_epochs=1)
    norm = next(module for module in trainer.network.modules() if isinstance(module, BatchNorm2d))
    assert norm.running_mean is not None
    assert not norm.running_mean.any()
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    trainer.step()
    handle.remove()
    assert seen, "measured in training mode"
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, means, rtol=1e-4, atol=1e-5)


def test_the_backbone_moves_by_its_share_of_the_rate(space: SearchSpace, digits: ImageData) -> None:
    """AdamW's first step moves a weight by its rate, whatever the gradient."""
    trainer = trainer_of(space, digits, backbone_rate=0.25)
    before = copy.deepcopy(trainer.network.state_dict())
    rate = trainer.optimizer.param_groups[0]["lr"]
    trainer.step()
    for name, weight in trainer.network.named_parameters():
        if weight.ndim > 1:
            by = float((weight.detach() - before[name]).abs().max())
            assert by == pytest.approx(rate * (1 if is_classifier(name) else 0.25), rel=1e-2), name


def test_quadratic_weights_of_a_slow_backbone_have_both_shares(space: SearchSpace, digits: ImageData) -> None:
    trainer = trainer_of(space, digits, backbone_rate=0.25, quadratic_gamma=0.5)
    before = copy.deepcopy(trainer.network.state_dict())
    rate = trainer.optimizer.param_groups[0]["lr"]
    trainer.step()
    shares: dict[float, set[str]] = {}
    for name, weight in trainer.network.named_parameters():
        if weight.ndim > 1:
            by = float((weight.detach() - before[name]).abs().max())
            shares.setdefault(round(by / rate, 3), set()).add(name)
    assert set(shares) == {0.125, 0.25, 1.0}
    assert shares[1.0] == {"head.classifier.weight"}
    of_products = {id(w) for group in trainer.optimizer.param_groups[4:] for w in group["params"]}
    quadratic = {n for n, w in trainer.network.named_parameters() if id(w) in of_products and w.ndim > 1}
    assert shares[0.125] == quadratic != set()


def test_the_rate_is_whole_for_the_head_and_warms_up_for_all(space: SearchSpace, digits: ImageData) -> None:
    trainer = trainer_of(space, digits, head_epochs=1, warmup_epochs=0.5, weight_decay=0.05)
    per_epoch, rate = trainer.steps_per_epoch, RECIPE.learning_rate
    rates = []
    for _ in range(trainer.total_steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.schedule.step()
    assert rates[:per_epoch] == pytest.approx([rate] * per_epoch)
    warm = round(0.5 * per_epoch)
    ramp = [rate * (0.1 + 0.9 * i / warm) for i in range(warm + 1)]
    assert rates[per_epoch : per_epoch + warm + 1] == pytest.approx(ramp)
    falling = rates[per_epoch + warm :]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.05 * rate


def test_a_training_with_head_epochs_goes_on_to_the_bit(space: SearchSpace, digits: ImageData) -> None:
    changes = {"head_epochs": 1, "backbone_rate": 0.1, "ema_decay": 0.9}
    for stop in (5, 13):  # in the head epoch, and after it
        trainer = trainer_of(space, digits, **changes)
        for _ in range(stop):
            trainer.step()
        saved = copy.deepcopy(trainer.to_dict())
        expected = [trainer.step()["loss"] for _ in range(9)]
        twin = trainer_of(space, digits, **changes)
        twin.load(saved)
        assert [twin.step()["loss"] for _ in range(9)] == expected
        for name, tensor in trainer.result.state_dict().items():
            assert torch.equal(tensor, twin.result.state_dict()[name]), name


def test_a_network_from_scratch_has_nothing_to_keep(
    space: SearchSpace, digits: ImageData, tmp_path: Path
) -> None:
    arch = make_arch(space, CHOICES)
    source = FoundArch(space, arch, arch_document(space, arch, {}), tmp_path)
    config = TrainConfig(recipe=RECIPE.override({"head_epochs": 1, "backbone_rate": 0.5}))
    with pytest.raises(UsageError, match=r"^`head_epochs=1` and `backbone_rate=0.5`: for weights that are "):
        train_subnet(source, digits, config, tmp_path / "subnet", {}, from_supernet=False)
    assert not (tmp_path / "subnet").exists()


def test_images_of_other_sizes_keep_the_head_epochs_at_the_start(
    space: SearchSpace, digits: ImageData
) -> None:
    data = replace(digits, resolution_px=8)
    trainer = trainer_of(space, data, epochs=4, head_epochs=1, start_resolution_px=4)
    assert trainer.sizes_px[0] == 4
    while trainer.steps_done < trainer.total_steps:
        trainer.step()
    assert trainer.best["epoch"] > 1
