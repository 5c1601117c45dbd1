import io
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers.pictures import photo
from PIL import Image, ImageEnhance
from torch import Tensor

from qnas.data import twins
from qnas.data.decoding import pixel_digest
from qnas.data.twins import Images, find_equal, find_near, look_at


def pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def again(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    return Image.open(file)


def images(pictures: list[Image.Image], labels: list[int], splits: list[int]) -> Images:
    found = Images.to_fill(np.array(labels), np.array(splits, np.int8))
    for number, each in enumerate(map(pixels, pictures)):
        found.fill(number, bytes.fromhex(pixel_digest(each)), look_at(each))
    return found


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "compressed": lambda picture: again(picture, 40),
    "smaller": lambda picture: picture.resize((48, 48)),
    "larger": lambda picture: picture.resize((200, 150)),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.85),
}


@pytest.mark.parametrize("how", list(COPIES))
def test_copies_are_found(how: str) -> None:
    originals = [photo(seed) for seed in range(12)]
    copies = [COPIES[how](picture) for picture in originals]
    found, plain = find_near(images([*originals, *copies], [0] * 24, [0] * 12 + [2] * 12), quiet=True)
    assert plain == 0
    assert found.images.all()
    assert found.within[12:, 0].all()
    assert not found.within[:12, 0].any(), "no original is another one"
    assert not found.other_class.any()


def test_other_pictures_are_not_copies() -> None:
    mirrored = [photo(seed).transpose(Image.Transpose.FLIP_LEFT_RIGHT) for seed in range(20)]
    pictures = [*map(photo, range(20)), *mirrored]
    found, _ = find_near(images(pictures, [0] * 40, [0] * 40), quiet=True)
    assert not found.images.any()


def test_pictures_that_differ_in_colour_alone_are_not_copies() -> None:
    red, _, blue = pixels(photo(0)).numpy()
    swapped = [Image.fromarray(np.stack(each, -1)) for each in ((red, red // 4, blue), (red // 4, red, blue))]
    found, _ = find_near(images(swapped, [0, 1], [0, 0]), quiet=True)
    assert not found.images.any()


def test_plain_images_are_counted_and_not_compared() -> None:
    plain = [Image.new("RGB", (32, 32), (shade, shade, shade)) for shade in (10, 11, 200)]
    found, count = find_near(images([*plain, photo(0)], [0, 1, 0, 1], [0, 0, 2, 2]), quiet=True)
    assert count == 3
    assert not found.images.any()


def test_equal_images_are_counted_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    which, labels = rng.integers(0, 30, 60), rng.integers(0, 3, 60)
    splits = rng.integers(0, 3, 60)
    known = {seed: photo(seed, 24) for seed in range(30)}
    compared = images([known[seed] for seed in which], labels.tolist(), splits.tolist())
    found = find_equal(compared)
    pairs = [(i, j) for i, j in combinations(range(60), 2) if which[i] == which[j]]
    within = np.zeros((60, 3), bool)
    other = np.zeros(60, bool)
    for i, j in [*pairs, *((j, i) for i, j in pairs)]:
        within[i, splits[j]] = True
        other[i] |= labels[i] != labels[j]
    assert (found.within == within).all()
    assert (found.images == within.any(1)).all()
    assert (found.other_class == other).all()
    assert len(found.pairs) == twins.EXAMPLES
    assert all(pair in pairs for pair in found.pairs)
    assert all(labels[i] != labels[j] for i, j in found.pairs), "the worst first"
    near, _ = find_near(compared, quiet=True)
    assert not near.images.any(), "equal images are not nearly equal too"


@pytest.mark.parametrize("tile", [2, 5, 100])
def test_tiles_and_the_bound_of_pairs_change_nothing_for_test_images(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = [photo(seed, 32) for seed in range(6)]
    pictures = [*originals, *(again(picture, 50) for picture in originals)]
    compared = images(pictures, [0] * 12, [0, 1, 2] * 4)
    whole, _ = find_near(compared, quiet=True)
    monkeypatch.setattr(twins, "_TILE", tile)
    tiled, _ = find_near(compared, quiet=True)
    assert (tiled.within == whole.within).all()
    assert tiled.pairs == whole.pairs
    monkeypatch.setattr(twins, "ALL_PAIRS", 3)
    bounded, _ = find_near(compared, quiet=True)
    tests = compared.splits == 2
    assert (bounded.within[tests] == whole.within[tests]).all()


def test_no_images_have_no_twins() -> None:
    empty = images([], [], [])
    assert not find_equal(empty).pairs
    assert find_near(empty, quiet=True)[1] == 0
