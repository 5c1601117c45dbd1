from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import load
from PIL import Image

from qnas.data.batches import batches
from qnas.data.normalisation import normalise


def test_statistics_are_those_of_the_training_pixels(noise: Path) -> None:
    loaded = load(noise)
    files = sorted((noise / "train").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(f)) for f in files]).astype(np.float64) / 255
    np.testing.assert_allclose(loaded.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(loaded.std, pixels.std((0, 1, 2)), rtol=1e-9)


def test_a_constant_channel_can_be_normalised(plain: Path) -> None:
    loaded = load(plain)  # blue is 7 everywhere
    assert loaded.std[2] == pytest.approx(1 / 255)
    images, _ = next(batches(loaded.train, 8))
    assert images[:, 2].abs().max() < 1e-4


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalise_is_its_formula(channels_last: bool) -> None:
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8, generator=torch.manual_seed(0))
    images = images.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    before = images.clone()
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.9)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    normal = normalise(images, mean, std)
    torch.testing.assert_close(normal.double(), expected, atol=1e-5, rtol=1e-6)
    assert normal.stride() == images.stride()
    assert torch.equal(images, before)
