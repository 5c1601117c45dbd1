from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import PX, flat, load, numbered, save
from PIL import ImageFile

from qnas.common.errors import DataError
from qnas.data.batches import batches
from qnas.data.lazy_images import LazyImages


def test_lazy_images_give_the_batches_of_images_in_memory(noise: Path) -> None:
    held, lazy = load(noise), load(noise, memory_limit_bytes=1000)
    assert isinstance(held.train.images, torch.Tensor)
    assert not isinstance(lazy.train.images, torch.Tensor)
    assert isinstance(lazy.train.images, LazyImages)
    assert lazy.mean == held.mean
    assert lazy.digest == held.digest
    options: dict[str, Any] = {"seed": 1, "epoch": 2, "augment": True}
    for name in ("train", "heldout", "test"):
        pairs = zip(
            batches(getattr(held, name), 5, **options),
            batches(getattr(lazy, name), 5, **options),
            strict=True,
        )
        for (x, y), (lazy_x, lazy_y) in pairs:
            assert torch.equal(x, lazy_x)
            assert torch.equal(y, lazy_y)
            assert lazy_x.is_contiguous(memory_format=torch.channels_last)


def test_a_given_normalisation_replaces_that_of_the_data(noise: Path) -> None:
    own, given = load(noise), load(noise, normalisation=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert own.mean != given.mean
    assert given.digest == own.digest
    for name in ("train", "heldout", "test", "train_and_heldout"):
        assert getattr(given, name).mean == (0.1, 0.2, 0.3)
    pixels = given.test.read(torch.arange(3)).float() / 255
    expected = (pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.4, 0.5, 0.6])[
        :, None, None
    ]
    (images, _), *_ = batches(given.test, 3)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_memory_limit_counts_the_pixels_of_all_splits(noise: Path) -> None:
    total = 46 * 3 * PX * PX
    assert isinstance(load(noise, memory_limit_bytes=total).train.images, torch.Tensor)
    assert not isinstance(load(noise, memory_limit_bytes=total - 1).train.images, torch.Tensor)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str, cut: float) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        save(tmp_path / "ab"[i % 2] / f"{i}.{suffix}", rng.integers(0, 256, (40, 40, 3)))
    damaged = tmp_path / "b" / f"5.{suffix}"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(cut * len(content))])
    for limit in (10**9, 0):
        with pytest.raises(DataError, match=rf": 1 of 8 .*: {damaged}: not a whole image: [^\n]+$"):
            load(tmp_path, memory_limit_bytes=limit)


def test_an_image_that_breaks_while_it_is_used_is_named(tmp_path: Path) -> None:
    for i in range(8):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", flat((i, 0, 0)))
    lazy = load(tmp_path, memory_limit_bytes=0)
    last = int(lazy.train.read(torch.tensor([len(lazy.train) - 1]))[0, 0, 0, 0])
    damaged = tmp_path / "ab"[last % 2] / f"{last}.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    epoch = batches(lazy.train, 1)
    next(epoch)
    with pytest.raises(DataError, match=f"^{damaged}: not a whole image"):
        list(epoch)


def test_made_up_pixels_are_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES is set"):
        load(plain)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"a": 4, "b": 4})
    (root / "a" / "note.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"a/note\.jpg: not a whole image: cannot identify"):
        load(root)
