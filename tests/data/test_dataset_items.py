from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qnas.common.errors import BrokenImageError, DataError
from qnas.data.decoding import to_pixels
from qnas.data.lazy_images import DatasetReader

COLOUR = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
PIXELS = torch.from_numpy(COLOUR).permute(2, 0, 1)
GREY = PIXELS[:1]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(COLOUR), PIXELS),
        (PIXELS, PIXELS),
        (COLOUR, PIXELS),
        (COLOUR[:, ::-1], PIXELS.flip(2)),
        (PIXELS / 255, PIXELS),
        ((PIXELS / 255).double(), PIXELS),
        (COLOUR.astype(np.float32) / 255, PIXELS),
        (PIXELS.float().requires_grad_() / 255, PIXELS),
        (Image.fromarray(COLOUR[:, :, 0]), GREY),
        (GREY, GREY),
        (GREY[0], GREY),
        (COLOUR[:, :, 0], GREY),
        (COLOUR[:, :, :1], GREY),
        (torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 128, dtype=torch.uint8)),
        (torch.tensor([[[1.0005, -0.0005]]]), torch.tensor([[[255, 0]]], dtype=torch.uint8)),
    ],
)
def test_every_form_of_an_image_becomes_its_bytes(image: Any, expected: torch.Tensor) -> None:
    found = to_pixels(image, "data[0]")
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("ant.png", "expected a PIL image, a tensor or an array, got str"),
        (None, "got NoneType"),
        (PIXELS[None], r"got Tensor of torch\.uint8 \(1, 3, 5, 7\)"),
        (PIXELS[:, :0], r"got Tensor of torch\.uint8 \(3, 0, 7\)"),
        (PIXELS.long(), r"expected uint8, or floats from 0 to 1, got Tensor of torch\.int64"),
        (COLOUR.astype(np.int32), r"got ndarray of int32 \(5, 7, 3\)"),
        (PIXELS.float(), "floats from 0 to 248, expected 0 to 1: leave out the normalisation"),
        (torch.full((3, 2, 2), -1.5), r"floats from -1\.5 to -1\.5"),
        (torch.full((3, 2, 2), float("nan")), "floats from nan to nan"),
    ],
)
def test_another_form_is_named_with_its_place(image: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^data\[3\]: .*{message}"):
        to_pixels(image, "data[3]")


@pytest.mark.parametrize("label", [2, np.int64(2), np.array(2), torch.tensor(2)])
def test_a_label_is_any_whole_number(label: Any) -> None:
    assert DatasetReader([(PIXELS, label)], "train").read(0)[1] == 2


@pytest.mark.parametrize("label", ["ant", 2.0, torch.tensor([0.0, 1.0]), None])
def test_another_label_is_named(label: Any) -> None:
    with pytest.raises(DataError, match=r"^train\[0\]: expected the number of a class as label, got "):
        DatasetReader([(PIXELS, label)], "train").read(0)


@pytest.mark.parametrize("item", [PIXELS, (PIXELS,), (PIXELS, 1, 2), {"image": PIXELS, "label": 1}])
def test_an_item_is_an_image_and_a_label(item: Any) -> None:
    with pytest.raises(DataError, match=r"^train\[0\]: expected \(image, label\), got "):
        DatasetReader([item], "train").read(0)


def test_what_a_dataset_or_a_loader_raises_makes_a_broken_image() -> None:
    with pytest.raises(BrokenImageError, match=r"^train\[5\]: IndexError: list index out of range$"):
        DatasetReader([], "train").read(5)

    def fail(image: Any) -> Any:
        raise ValueError(f"no {image}")

    with pytest.raises(BrokenImageError, match=r"^train\[0\]: ValueError: no photo$"):
        DatasetReader([("photo", 1)], "train", fail).read(0)
