"""A search, a derivation and a training with a user's Dataset, through `import qnas`."""

from pathlib import Path

import pytest
import torch
from helpers.corners import PX, Corners
from helpers.tiny import TINY_SPACE
from torch import Tensor

import qnas
from qnas.common.errors import DataError
from qnas.spaces.space import parse_space

DATASET = qnas.Datasets(Corners(120), flip=False)  # mirrored, a corner is another
AGAIN = r"the run had Datasets \(dataset:Corners\): give them again as `data`"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> qnas.SearchResult:
    space = parse_space(TINY_SPACE, "tiny.yaml")
    return qnas.run_search(
        space,
        {"cpu": "250us"},
        data=DATASET,
        out=tmp_path_factory.mktemp("corners") / "run",
        search_epochs=1,
        warmup_epochs=1,
        resolution_px=PX,
        random_networks=2,
    )


def test_a_dataset_is_searched_on(result: qnas.SearchResult) -> None:
    assert result.latency_ms <= 0.25
    assert result.config["data"] == "dataset:Corners"
    assert result.heldout_accuracy is not None
    network = result.build().eval()
    assert network(torch.zeros(2, 3, PX, PX)).shape == (2, len(Corners.classes))


def test_the_network_is_trained_on_the_dataset_when_it_is_given_again(
    result: qnas.SearchResult, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=AGAIN):
        qnas.train_subnet(result)
    trained = qnas.train_subnet(result, data=DATASET, epochs=10, batch_size=16, out=tmp_path / "subnet")
    assert trained.classes == Corners.classes
    assert trained.arch == result.arch
    assert trained.config["data"] == "dataset:Corners"
    assert trained.accuracy > 0.5  # a third by chance


def test_another_budget_is_ranked_on_the_dataset_when_it_is_given_again(
    result: qnas.SearchResult, tmp_path: Path
) -> None:
    budgets = {"cpu": "220us"}
    with pytest.raises(DataError, match=AGAIN):
        qnas.derive(result, budgets, rerank=True, out=tmp_path / "refused")
    alone = qnas.derive(result, budgets, out=tmp_path / "alone")
    assert "give them again as `data`" in alone.unranked
    assert alone.heldout_accuracy is None
    ranked = qnas.derive(result, budgets, data=DATASET, out=tmp_path / "ranked")
    assert ranked.unranked == ""
    assert ranked.heldout_accuracy is not None
    assert ranked.latency_ms <= 0.22


def test_a_search_goes_on_only_with_the_dataset_given_again(result: qnas.SearchResult) -> None:
    with pytest.raises(DataError, match=AGAIN):
        qnas.run_search(result.space, out=result.folder, resume=True)


class Drawn(Corners):
    """The same with other noise each time."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image + torch.randint(0, 5, image.shape, dtype=torch.uint8), label


def test_a_dataset_whose_images_change_is_warned_of(result: qnas.SearchResult, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"data\[0\] was a different image when it was read again"):
        qnas.train_subnet(result, data=Drawn(60), epochs=1, out=tmp_path / "subnet")
