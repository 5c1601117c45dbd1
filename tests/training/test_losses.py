import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from qnas.common.errors import CheckpointError
from qnas.training.losses import (
    CROSS_ENTROPY,
    ClassWeighted,
    FocalLoss,
    LossFunction,
    Objective,
    accuracy,
    balanced_accuracy,
    balanced_loss,
    balanced_weights,
    cross_entropy,
    guessing_loss,
    make_objective,
    mean_loss,
    name_of,
    never_predicted,
    saved_objective,
)
from qnas.training.scoring import classify

LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
LOSSES: list[LossFunction] = [cross_entropy, FocalLoss(), balanced_loss(LABELS, 3)]
RARE = torch.tensor([0] * 95 + [1] * 5)


def logits(images: int = 9, classes: int = 3) -> Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(0))


def test_the_weights_of_a_balanced_loss_make_classes_count_alike() -> None:
    loss = balanced_loss(LABELS, 4)  # of the last class there is no image
    totals = [float(loss.weights[LABELS[k == LABELS]].sum()) for k in range(3)]
    assert totals == pytest.approx([3, 3, 3])
    assert loss.weights[3] == 0
    each = loss(logits(9, 4), LABELS)
    torch.testing.assert_close(each, loss.weights[LABELS] * cross_entropy(logits(9, 4), LABELS))


def test_the_focal_loss_is_that_of_its_paper() -> None:
    p = logits().softmax(1)[torch.arange(9), LABELS]
    torch.testing.assert_close(FocalLoss(2.0)(logits(), LABELS), -((1 - p) ** 2) * p.log())
    torch.testing.assert_close(FocalLoss(0.0)(logits(), LABELS), cross_entropy(logits(), LABELS))


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_shares_of_one_class_are_that_class(loss: LossFunction) -> None:
    shares = F.one_hot(LABELS, 3).float()
    torch.testing.assert_close(loss(logits(), shares), loss(logits(), LABELS))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_is_torchs_for_cross_entropy_and_the_same_for_other_losses(smoothing: float) -> None:
    expected = F.cross_entropy(logits(), LABELS, label_smoothing=smoothing)
    assert torch.equal(mean_loss(cross_entropy, logits(), LABELS, smoothing), expected)
    same: LossFunction = ClassWeighted(torch.ones(3))
    torch.testing.assert_close(mean_loss(same, logits(), LABELS, smoothing), expected)


def test_guessing_costs_the_logarithm_of_the_classes() -> None:
    assert guessing_loss(cross_entropy, LABELS, 3) == pytest.approx(math.log(3))
    assert guessing_loss(balanced_loss(LABELS, 3), LABELS, 3) == pytest.approx(math.log(3))
    assert guessing_loss(FocalLoss(2.0), LABELS, 3) == pytest.approx(4 / 9 * math.log(3))


def test_a_balanced_accuracy_is_the_mean_of_the_classes() -> None:
    predicted = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 0])
    assert accuracy(predicted, LABELS) == pytest.approx(6 / 9)
    assert balanced_accuracy(predicted, LABELS) == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)


def test_an_objective_records_what_is_not_the_default() -> None:
    def mine(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets)

    assert CROSS_ENTROPY.record() == make_objective("cross-entropy", "accuracy", LABELS, 3).record() == {}
    named = make_objective("balanced", "balanced-accuracy", LABELS, 3)
    assert named.record() == {"loss": "balanced", "metric": "balanced-accuracy"}
    assert Objective(FocalLoss()).record() == {"loss": "focal"}
    assert Objective(mine).record()["loss"].endswith("mine")
    predicted = torch.zeros(9, dtype=torch.int64)
    assert named.figures(predicted, LABELS) == {"balanced-accuracy": pytest.approx(1 / 3)}
    assert CROSS_ENTROPY.figures(predicted, LABELS) == {}


# ---- classes of different sizes


def test_balanced_weights_and_accuracies_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        labels = rng.choice(classes, 200, p=rng.dirichlet(np.ones(classes) / 2))
        present = np.unique(labels)
        weights = balanced_weights(torch.from_numpy(labels), classes)
        expected = compute_class_weight("balanced", classes=present, y=labels)
        torch.testing.assert_close(weights[present], torch.from_numpy(expected).float())
        assert float(weights[labels].double().mean()) == pytest.approx(1)
        predicted = rng.integers(0, classes, 200)
        found = balanced_accuracy(torch.from_numpy(predicted), torch.from_numpy(labels))
        with warnings.catch_warnings(action="ignore"):  # of predicted classes that do not occur
            assert found == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_weights_multiply_the_loss_of_each_image_whatever_the_loss() -> None:
    weights, targets = torch.tensor([0.5, 2.0, 4.0]), torch.tensor([0, 2, 1, 0])
    mixed = 0.25 * F.one_hot(targets, 3).float() + 0.75 * F.one_hot(targets.roll(1), 3).float()
    for loss in (cross_entropy, FocalLoss()):
        found = ClassWeighted(weights, loss)
        torch.testing.assert_close(found(logits(4), targets), weights[targets] * loss(logits(4), targets))
        of_mixed = 0.25 * weights[targets] + 0.75 * weights[targets.roll(1)]
        torch.testing.assert_close(found(logits(4), mixed), of_mixed * loss(logits(4), mixed))
        # the sum is divided by the images, and the weights are those of the labels before the smoothing
        smooth = 0.8 * F.one_hot(targets, 3).float() + 0.2 / 3
        expected = (weights[targets] * loss(logits(4), smooth)).sum() / 4
        torch.testing.assert_close(mean_loss(found, logits(4), targets, 0.2), expected)


def test_smoothing_a_frequent_class_leaves_most_of_its_label() -> None:
    """With weights on the shares, 95% and 5% would become equal targets, and the image would say nothing."""
    outputs = torch.zeros(1, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(
        mean_loss(balanced_loss(RARE, 2), outputs, torch.tensor([0]), 0.1), [outputs]
    )
    # the gradient of cross-entropy: weight * (probability - smoothed target)
    torch.testing.assert_close(grad, 100 / 190 * torch.tensor([[0.5 - 0.95, 0.5 - 0.05]]))


@pytest.mark.parametrize(
    ("options", "trained", "ranked"),
    [
        ({"loss": "balanced"}, True, True),
        ({"class_weights": "balanced"}, True, True),
        ({"class_weights": "balanced", "loss": "focal"}, True, True),
        (
            {"sampler": "balanced"},
            False,
            True,
        ),  # images are drawn alike
        ({}, False, False),
    ],
)
def test_networks_are_ranked_by_losses_that_count_rare_classes_alike(
    options: dict[str, Any], trained: bool, ranked: bool
) -> None:
    asked: dict[str, Any] = {"loss": "cross-entropy", "metric": "accuracy"} | options
    objective = make_objective(labels=RARE, classes=2, **asked)
    saved = saved_objective(asked, RARE, 2, None, Path("run"))
    outputs = torch.zeros(2, 2)
    base = objective.loss(outputs, torch.tensor([0, 1]))
    weights = torch.tensor([100 / 190, 10.0])
    for found, is_weighted in ((objective.training_loss, trained), (objective.ranking_loss, ranked)):
        each = found(outputs, torch.tensor([0, 1]))
        torch.testing.assert_close(each, base * weights if is_weighted else base)
    expected = objective.ranking_loss(outputs, torch.tensor([0, 1]))
    assert torch.equal(saved.ranking_loss(outputs, torch.tensor([0, 1])), expected)
    assert objective.record().get("loss", "cross-entropy") == asked["loss"]


def test_an_own_loss_is_weighted_too() -> None:
    def mine(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.sum(1) + 1

    objective = make_objective(mine, "accuracy", RARE, 2, class_weights="balanced")
    each = objective.training_loss(torch.zeros(2, 2), torch.tensor([0, 1]))
    torch.testing.assert_close(each, torch.tensor([100 / 190, 10.0]))
    assert objective.record()["loss"].endswith("mine")


@pytest.mark.parametrize("key", ["class_weights", "sampler"])
def test_a_recorded_setting_that_is_unknown_is_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"run: config.json: search.{key}: expected .*, got \['a'\]"):
        saved_objective({key: ["a"]}, RARE, 2, None, Path("run"))


def test_guessing_is_judged_on_images_of_all_classes_even_if_they_are_sorted() -> None:
    labels = torch.tensor([0] * 9000 + [1] * 1000)
    assert guessing_loss(balanced_loss(labels, 2), labels, 2) == pytest.approx(math.log(2), rel=0.01)


def test_a_class_is_never_predicted_only_if_it_occurs() -> None:
    labels, predicted = torch.tensor([0, 0, 2, 4]), torch.tensor([0, 3, 0, 4])
    assert never_predicted(predicted, labels) == [2]
    found = classify(lambda x: x, [(F.one_hot(predicted, 6).float(), labels)])
    assert found.never_predicted("abcdef") == ["c"]
    assert found.score.balanced_accuracy == pytest.approx((1 / 2 + 0 + 1) / 3)


def test_classification_takes_the_loss_of_each_image() -> None:
    found = classify(lambda x: x, [(logits()[:4], LABELS[:4]), (logits()[4:], LABELS[4:])], FocalLoss())
    torch.testing.assert_close(found.losses, FocalLoss()(logits(), LABELS).double())
    assert found.score.loss == pytest.approx(float(found.losses.mean()))
    assert found.score.accuracy == accuracy(found.predicted, LABELS)
    torch.testing.assert_close(found.confidence, logits().softmax(1).amax(1))
