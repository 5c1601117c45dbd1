import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.training.losses import (
    CROSS_ENTROPY,
    FocalLoss,
    LossFunction,
    Objective,
    WeightedCrossEntropy,
    accuracy,
    balanced_accuracy,
    balanced_loss,
    cross_entropy,
    guessing_loss,
    make_objective,
    mean_loss,
    name_of,
)
from qnas.training.scoring import classify

LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
LOSSES: list[LossFunction] = [cross_entropy, FocalLoss(), balanced_loss(LABELS, 3)]


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
    same: LossFunction = WeightedCrossEntropy(torch.ones(3))
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


def test_classification_takes_the_loss_of_each_image() -> None:
    found = classify(lambda x: x, [(logits()[:4], LABELS[:4]), (logits()[4:], LABELS[4:])], FocalLoss())
    torch.testing.assert_close(found.losses, FocalLoss()(logits(), LABELS).double())
    assert found.score.loss == pytest.approx(float(found.losses.mean()))
    assert found.score.accuracy == accuracy(found.predicted, LABELS)
    torch.testing.assert_close(found.confidence, logits().softmax(1).amax(1))
