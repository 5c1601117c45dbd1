from pathlib import Path

import pytest
import torch
from helpers.pictures import load, numbers
from torch import Tensor

from qnas.data.image_data import sample_images, subset
from qnas.data.lazy_images import LazyImages
from qnas.data.loading import load_data


def test_train_and_heldout_share_memory_with_their_union(plain: Path) -> None:
    loaded = load(plain)
    both = loaded.train_and_heldout
    assert numbers(both) == numbers(loaded.train) + numbers(loaded.heldout)
    assert isinstance(both.images, Tensor)
    assert isinstance(loaded.heldout.images, Tensor)
    start = both.images[len(loaded.train) :]
    assert start.data_ptr() == loaded.heldout.images.data_ptr()


def test_subset_shows_all_classes(plain: Path) -> None:
    for loaded in (load(plain), load(plain, memory_limit_bytes=0)):
        some = subset(loaded.train_and_heldout, 8)
        assert len(some) == 8
        assert set(some.labels.tolist()) == {0, 1, 2}
        assert len(set(numbers(some))) == 8
        images, labels = sample_images(loaded.train_and_heldout, 8)
        assert torch.equal(images, some.read(torch.arange(8)))
        assert [c for _, c in numbers(some)] == labels.tolist()
        assert len(subset(loaded.test, 1000)) == len(loaded.test)


@pytest.mark.parametrize("is_lazy", [False, True])
def test_images_at_another_size_are_the_originals_resized(is_lazy: bool) -> None:
    limit = 0 if is_lazy else 10**9
    data, small = (
        load_data("digits", resolution_px=px, memory_limit_bytes=limit, keep_originals=True, quiet=True)
        for px in (8, 4)
    )
    split, expected = data.test.at(4), small.test
    assert isinstance(split.images, LazyImages) == is_lazy
    assert split.images.shape == expected.images.shape
    places = torch.arange(0, len(split), 7)
    assert torch.equal(split.read(places), expected.read(places)), "the originals have 8 px"
    assert torch.equal(split.labels, expected.labels)
    assert (split.mean, split.std) == (data.mean, data.std), "as in the whole training"
    assert split.originals is not None
    assert split.originals.resolution_px == 4
    assert data.test.at(8) is data.test
