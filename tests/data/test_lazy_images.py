import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import PX, flat, load, save
from PIL import Image

from qnas.common.errors import DataError
from qnas.data.batches import batches


def test_large_images_give_their_centre(tmp_path: Path) -> None:
    wide, tall = np.zeros((2, 64, 64, 3), dtype=np.uint8), None
    photo = np.concatenate([wide[0], flat((0, 0, 255), 64), wide[1]], axis=1)  # (64, 192, 3)
    tall = photo.transpose(1, 0, 2)
    for i in range(3):
        save(tmp_path / "wide" / f"{i}.png", photo)
        save(tmp_path / "tall" / f"{i}.png", tall)
    images = load(tmp_path).train.read(torch.arange(2))
    assert images.shape == (2, 3, PX, PX)
    assert (images[:, 2] == 255).all()
    assert (images[:, :2] == 0).all()


def test_small_photographs_are_resized_without_a_border(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", flat((200, 100, 50), 14))
    assert (load(tmp_path).train.images[0] == torch.tensor([200, 100, 50])[:, None, None]).all()


def test_reducing_averages_over_pixels(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3))
    stripes[:, 1::4] = stripes[:, 2::4] = 254
    for i in range(6):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", stripes)
    centre = load(tmp_path).train.read(torch.arange(1))[..., 4:12, 4:12]
    assert centre.min() > 110  # without antialias only the bright half would be looked at
    assert centre.max() < 145


@pytest.mark.parametrize(("channels", "expected"), [(1, [76]), (3, [255, 0, 0])])
def test_colour_becomes_grey_where_one_channel_is_asked(
    tmp_path: Path, channels: int, expected: list[int]
) -> None:
    for i in range(6):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", flat((255, 0, 0)))
    image = load(tmp_path, channels=channels).train.read(torch.arange(1))[0, :, 0, 0]
    assert image.tolist() == pytest.approx(expected, abs=1)  # 0.299 * 255


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((PX, PX), 0x4000, dtype=np.uint16)).save(path)
    assert (load(tmp_path).train.read(torch.arange(2)) == 0x40).all()


def test_channels_that_cannot_be_made_are_refused(plain: Path) -> None:
    with pytest.raises(DataError, match=r"ant/\d+\.png: 3 channels cannot become 2: expected 1 or 3"):
        load(plain, channels=2)


def test_an_abandoned_lazy_epoch_leaves_no_threads(noise: Path) -> None:
    lazy = load(noise, memory_limit_bytes=0)
    epoch = batches(lazy.train, 2)
    next(epoch)
    assert any(t.name.startswith("decode") for t in threading.enumerate())
    epoch.close()  # type: ignore[attr-defined]  # it is a generator
    assert not any(t.name.startswith("decode") for t in threading.enumerate())
