from pathlib import Path

import torch
from helpers.pictures import load, numbers
from torch import Tensor

from qnas.data.image_data import sample_images, subset


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
