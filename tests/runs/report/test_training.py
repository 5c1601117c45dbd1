from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qnas.common.errors import CheckpointError
from qnas.data.batches import batches
from qnas.data.image_data import ImageData, Split
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.runs.report.training import confusion, read_predictions
from qnas.runs.tensors import save_tensors
from qnas.training.scoring import WORST, Forward, classify, prediction_tensors


def predict(forward: Forward, split: Split) -> dict[str, Tensor]:
    return prediction_tensors(classify(forward, batches(split, 256)), split)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)).eval()


def test_they_are_the_accuracy_and_loss_of_the_evaluation(
    digits: ImageData, network: nn.Module, tmp_path: Path
) -> None:
    save_tensors(tmp_path / "p", predict(network, digits.test))
    found = read_predictions(tmp_path / "p")
    score = classify(network, batches(digits.test, 256)).score
    assert (found.labels == digits.test.labels.numpy()).all()
    assert (found.predicted == found.labels).mean() == score.accuracy
    assert found.loss.mean() == pytest.approx(score.loss, rel=1e-5)
    counts = confusion(found, 10)
    assert counts.sum() == score.images
    assert counts.trace() == round(score.accuracy * score.images)
    assert (counts.sum(1) == torch.bincount(digits.test.labels, minlength=10).numpy()).all()
    assert counts[3, 5] == ((found.labels == 3) & (found.predicted == 5)).sum()


def test_the_mistakes_are_those_of_the_highest_loss(digits: ImageData, network: nn.Module) -> None:
    found = predict(network, digits.test)
    mistakes, loss = found["mistakes"], found["loss"]
    wrong = found["labels"] != found["predicted"]
    assert len(mistakes) == WORST
    assert wrong[mistakes].all()
    assert (loss[mistakes].diff() <= 0).all()
    others = wrong.clone()
    others[mistakes] = False
    assert loss[others].max() <= loss[mistakes].min()
    assert (found["images"] == digits.test.read(mistakes)).all()


def test_a_network_without_mistakes_has_none(digits: ImageData) -> None:
    few = replace(digits.test, images=digits.test.read(torch.arange(5)), labels=digits.test.labels[:5])

    def right(images: Tensor) -> Tensor:
        return nn.functional.one_hot(few.labels, 10) * 9.0

    found = predict(right, few)
    assert len(found["mistakes"]) == len(found["images"]) == 0
    assert found["images"].dtype == torch.uint8


def test_a_damaged_file_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="damaged: not a safetensors file"):
        read_predictions(tmp_path / "p")
    save_tensors(tmp_path / "p", {"labels": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="not a file of predictions"):
        read_predictions(tmp_path / "p")
