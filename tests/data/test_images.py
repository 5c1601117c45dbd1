import gzip
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fashion import idx, write_fashion
from helpers.pictures import PX, load, numbered, numbers
from helpers.places import SHARED
from PIL import Image, ImageFile
from torch import Tensor

from qnas.common.errors import DataError, UsageError
from qnas.data import folders
from qnas.data import images as data
from qnas.data.decoding import LazyImages
from qnas.data.images import (
    Split,
    batch_count,
    batches,
    load_data,
    normalise,
    sample_images,
    shift_and_flip,
    subset,
)
from qnas.data.sources import parse_data_spec

FASHION = os.environ.get("FASHION_MNIST_DIR", "")  # a folder of the four IDX files
CIFAR10 = SHARED / "datasets" / "cifar10.tar.gz"


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, quality=95)


def flat(colour: tuple[int, int, int], px: int = PX) -> np.ndarray[Any, Any]:
    return np.full((px, px, 3), colour, dtype=np.uint8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qnas.data.broken_images.user_cache", lambda name: tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered(tmp_path_factory.mktemp("plain"), {"ant": 20, "bee": 15, "cat": 5})


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 3)):
        for name in ("ant", "bee"):
            for i in range(count):
                save(root / part / name / f"{i}.png", rng.integers(0, 256, (PX, PX, 3)))
    return root


# ---- specs


def test_spec_text_round_trips_with_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = parse_data_spec("imagefolder:pets")
    assert str(spec) == f"imagefolder:{tmp_path.resolve() / 'pets'}"
    assert parse_data_spec(str(spec)) == spec
    assert str(parse_data_spec("digits")) == "digits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar", r"unknown data 'cifar': did you mean cifar10\? known: cifar10, digits, "),
        ("cifar10", r"data cifar10: expected cifar10:DIR with train/CLASS/\*"),
        ("fashion-mnist:", r"data fashion-mnist: expected fashion-mnist:DIR, the folder of the four IDX"),
        ("digits:/tmp", r"data digits:/tmp: expected digits, without a folder"),
    ],
)
def test_spec_of_wrong_form_says_the_right_one(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_data_spec(text)


# ---- splits


def test_splits_are_disjoint_complete_and_stratified(plain: Path) -> None:
    loaded = load(plain, heldout_fraction=0.25)
    splits = loaded.train, loaded.heldout, loaded.test
    everything = [n for split in splits for n in numbers(split)]
    assert len(everything) == len(set(everything)) == 40
    # a fifth to test; of what is left a quarter held out: 20 -> 4, 4; 15 -> 3, 3; 5 -> 1, 1
    assert [Counter(c for _, c in numbers(s)) for s in splits] == [
        {0: 12, 1: 9, 2: 3},
        {0: 4, 1: 3, 2: 1},
        {0: 4, 1: 3, 2: 1},
    ]
    assert loaded.counts == {"train": 24, "heldout": 8, "test": 8}
    for split in splits:
        assert [c for _, c in numbers(split)] == split.labels.tolist()
    assert [i for i, c in numbers(loaded.test) if c == 0] not in ([0, 1, 2, 3], [16, 17, 18, 19])
    assert loaded.classes == ("ant", "bee", "cat")
    assert loaded.name == plain.name


def test_train_and_heldout_share_memory_with_their_union(plain: Path) -> None:
    loaded = load(plain)
    both = loaded.train_and_heldout
    assert numbers(both) == numbers(loaded.train) + numbers(loaded.heldout)
    assert isinstance(both.images, Tensor)
    assert isinstance(loaded.heldout.images, Tensor)
    start = both.images[len(loaded.train) :]
    assert start.data_ptr() == loaded.heldout.images.data_ptr()


def test_folder_order_of_the_file_system_does_not_matter(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(plain)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: Any) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self) -> Iterator[Any]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    shuffled = load(plain)
    assert shuffled.digest == expected.digest
    for name in ("train", "heldout", "test"):
        assert numbers(getattr(shuffled, name)) == numbers(getattr(expected, name))


def test_own_test_images_stay_test_images(tmp_path: Path) -> None:
    counts = {"train/a": 10, "train/b": 10, "val/a": 3, "val/b": 4}
    loaded = load(numbered(tmp_path, counts))
    assert numbers(loaded.test) == [(i, 2) for i in range(3)] + [(i, 3) for i in range(4)]
    assert loaded.counts == {"train": 16, "heldout": 4, "test": 7}


def test_val_is_held_out_where_test_is_there_too(tmp_path: Path) -> None:
    counts = {f"{part}/{name}": n for part, n in (("train", 4), ("val", 3), ("test", 2)) for name in "ab"}
    loaded = load(numbered(tmp_path, counts))
    assert loaded.counts == {"train": 8, "heldout": 6, "test": 4}
    assert numbers(loaded.heldout) == [(i, c) for c in (2, 3) for i in range(3)]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_heldout_fraction_outside_0_to_1_is_refused(plain: Path, fraction: float) -> None:
    with pytest.raises(UsageError, match=f"must lie between 0 and 1, got {fraction}"):
        load(plain, heldout_fraction=fraction)


# ---- digest


def test_digest_changes_with_content_label_and_nothing_else(tmp_path: Path) -> None:
    first = numbered(tmp_path / "first", {"a": 5, "b": 5})
    digest = load(first).digest
    assert load(numbered(tmp_path / "second", {"a": 5, "b": 5}), resolution_px=8).digest == digest
    same_size = numbered(tmp_path / "pixels", {"a": 5, "b": 5}) / "a" / "000.png"
    same_size.write_bytes((first / "a" / "001.png").read_bytes())
    assert load(tmp_path / "pixels").digest != digest
    relabelled = numbered(tmp_path / "labels", {"a": 5, "b": 5})
    (relabelled / "a" / "004.png").rename(relabelled / "b" / "005.png")
    assert load(relabelled).digest != digest


def test_digest_changes_with_the_labels_alone(tmp_path: Path) -> None:
    digest = load(write_fashion(tmp_path), "fashion-mnist").digest
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.arange(50, dtype=np.uint8)[::-1] % 10)))
    assert load(tmp_path, "fashion-mnist").digest != digest


def test_digest_of_a_big_folder_goes_by_names_and_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "HASHED_BYTES", 0)
    root = numbered(tmp_path, {"a": 5, "b": 5})
    digest = load(root).digest
    with (root / "a" / "000.png").open("ab") as file:
        file.write(b"\0")
    assert load(root).digest != digest


# ---- pixels


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


def test_digits_fill_the_resolution_and_never_mirror() -> None:
    loaded = load_data(parse_data_spec("digits"), resolution_px=32, quiet=True)
    assert sum(loaded.counts.values()) == 1797
    assert loaded.train.images.shape[1:] == (3, 32, 32)
    images = loaded.train.read(torch.arange(len(loaded.train)))
    assert images.max() == 255
    assert (images[:, 0] == images[:, 2]).all()
    assert not loaded.flip
    assert set(loaded.test.labels.tolist()) == set(range(10))


# ---- in memory or not


def test_lazy_images_give_the_batches_of_images_in_memory(noise: Path) -> None:
    held, lazy = load(noise), load(noise, memory_limit_bytes=1000)
    assert held.in_memory
    assert not lazy.in_memory
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


def test_memory_limit_counts_the_pixels_of_all_splits(noise: Path) -> None:
    total = 46 * 3 * PX * PX
    assert load(noise, memory_limit_bytes=total).in_memory
    assert not load(noise, memory_limit_bytes=total - 1).in_memory


def test_an_abandoned_lazy_epoch_leaves_no_threads(noise: Path) -> None:
    import threading

    lazy = load(noise, memory_limit_bytes=0)
    epoch = batches(lazy.train, 2)
    next(epoch)
    assert any(t.name.startswith("decode") for t in threading.enumerate())
    epoch.close()  # type: ignore[attr-defined]  # it is a generator
    assert not any(t.name.startswith("decode") for t in threading.enumerate())


# ---- batches


def collect(split: Split, batch_size: int = 6, **options: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches(split, batch_size, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_batches_depend_on_seed_and_epoch_only(noise: Path) -> None:
    train = load(noise).train
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    x, y = collect(train, seed=3, epoch=4, augment=True)
    torch.rand(5)
    torch.set_rng_state(before[0])
    again_x, again_y = collect(load(noise).train, seed=3, epoch=4, augment=True)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    for other in ({"seed": 4, "epoch": 3}, {"seed": 3, "epoch": 5}, {"seed": 4, "epoch": 4}):
        assert not torch.equal(x, collect(train, augment=True, **other)[0])


def test_an_epoch_shows_every_image_once(plain: Path) -> None:
    train = load(plain).train
    for seed in (None, 0):
        x, y = collect(train, seed=seed)
        bytes_seen = (
            x * torch.tensor(train.std)[:, None, None] + torch.tensor(train.mean)[:, None, None]
        ) * 255
        seen = [(int(i), int(c)) for i, c in bytes_seen[:, :2, 0, 0].round()]
        assert [c for _, c in seen] == y.tolist()
        assert sorted(seen) == sorted(numbers(train))
        assert (seen == numbers(train)) == (seed is None)


def test_a_resumed_epoch_goes_on_as_it_would_have(noise: Path) -> None:
    train = load(noise).train
    options: dict[str, Any] = {"seed": 0, "epoch": 7, "augment": True}
    whole = list(batches(train, 6, **options))
    resumed = list(batches(train, 6, start=2, **options))
    assert len(resumed) == len(whole) - 2 > 1
    for (x, y), (resumed_x, resumed_y) in zip(whole[2:], resumed, strict=True):
        assert torch.equal(x, resumed_x)
        assert torch.equal(y, resumed_y)


def test_the_parts_of_a_batch_are_the_batch(noise: Path) -> None:
    train = load(noise).train
    options: dict[str, Any] = {"seed": 5, "epoch": 2, "augment": True, "drop_last": True, "start": 1}
    whole = list(batches(train, 6, **options))
    parts = [list(batches(train, 6, part=(which, 3), **options)) for which in range(3)]
    assert len(whole) > 1
    for i, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[i][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[i][1] for part in parts]))


def test_augmentation_does_not_depend_on_the_batch_size(noise: Path) -> None:
    train = load(noise).train
    options: dict[str, Any] = {"seed": 0, "augment": True}
    assert torch.equal(collect(train, 6, **options)[0], collect(train, 32, **options)[0])


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_are_normalised_floats_in_the_asked_format(noise: Path, channels_last: bool) -> None:
    train = load(noise).train
    x, y = next(batches(train, 6, seed=0, augment=True, channels_last=channels_last))
    assert x.shape == (6, 3, PX, PX)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    everything = collect(load(noise).train_and_heldout)[0]
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [10, 10, 10, 2]), (True, [10, 10, 10])])
def test_batch_count_is_the_number_of_batches(noise: Path, drop_last: bool, sizes: list[int]) -> None:
    train = load(noise).train
    found = [len(y) for _, y in batches(train, 10, seed=0, drop_last=drop_last)]
    assert found == sizes
    assert batch_count(train, 10, drop_last=drop_last) == len(sizes)


def test_an_epoch_without_a_batch_is_refused_at_once(noise: Path) -> None:
    with pytest.raises(DataError, match="train: 32 images are fewer than one batch of 64"):
        batches(load(noise).train, 64, drop_last=True)


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


def test_shift_and_flip_is_pad_crop_mirror_of_each_image() -> None:
    px, border = 17, 2
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (25, 3, px, px), dtype=torch.uint8, generator=rng)
    shifts = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    flips = torch.arange(25) % 2 == 0
    out = shift_and_flip(images, shifts, flips)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for image, (top, left), flip, found in zip(
        images.numpy(), shifts.tolist(), flips, out.numpy(), strict=True
    ):
        padded = np.pad(image, ((0, 0), (border, border), (border, border)))
        cut = padded[:, top : top + px, left : left + px]
        np.testing.assert_array_equal(found, cut[:, :, ::-1] if flip else cut)


def draw_copies(flip: bool) -> tuple[Tensor, Tensor]:
    """Return an image and 200 augmented copies of it."""
    ramp = torch.arange(1, 1 + 3 * PX * PX, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, PX, PX)
    split = Split("train", ramp.repeat(200, 1, 1, 1), torch.zeros(200).long(), (0,) * 3, (1 / 255,) * 3, flip)
    return ramp.float(), next(batches(split, 200, seed=0, augment=True))[0].round()


@pytest.mark.parametrize("flip", [True, False])
def test_each_image_has_its_own_draw(flip: bool) -> None:
    image, copies = draw_copies(flip)
    assert copies.shape == (200, 3, PX, PX)
    variants = {tuple(copy.flatten().tolist()) for copy in copies}
    # 5 x 5 shifts, mirrored or not; 200 draws miss a few of 50
    assert (25 < len(variants) <= 50) if flip else (20 < len(variants) <= 25)
    assert tuple(image.flatten().tolist()) in variants
    assert (tuple(image.flip(2).flatten().tolist()) in variants) == flip


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


# ---- damaged and missing folders


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


def test_other_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"a": 5, "b": 5, ".thumbnails": 3})
    (root / "a" / "readme.txt").write_text("text")
    (root / "a" / "._000.png").write_text("left by an operating system")
    loaded = load(root)
    assert loaded.classes == ("a", "b")
    assert sum(loaded.counts.values()) == 10


@pytest.mark.parametrize(
    ("kind", "counts", "message"),
    [
        ("imagefolder", {}, r": no folders of images, expected train/CLASS/\* or CLASS/\*"),
        ("imagefolder", {"a": 5}, ": 1 class folders, expected at least 2"),
        ("imagefolder", {"a": 5, "b": 0}, ": class folder 'b' of train has no images"),
        (
            "imagefolder",
            {"a": 5, "b": 2},
            ": class 'b' has 2 training images, expected at least 3, as test and heldout images are split",
        ),
        (
            "imagefolder",
            {"train/a": 5, "train/b": 1, "val/a": 1, "val/b": 1},
            ": class 'b' has 1 training images, expected at least 2, as heldout images are split off$",
        ),
        (
            "imagefolder",
            {"train/a": 5, "train/b": 5, "train/c": 5, "val/a": 1, "val/d": 1},
            ": classes of test differ from those of train: lacks b, c; adds d",
        ),
        (
            "imagefolder",
            {"train/a": 5, "train/b": 5},
            r": expected class folders in train and in val or test; or give .*/train to have it split",
        ),
        ("cifar10", {"a": 5, "b": 5}, ": expected class folders in train and in test$"),
        (
            "cifar10",
            {"train/a": 5, "train/b": 5, "test/a": 1, "test/b": 0},
            ": class folder 'b' of test has no images",
        ),
    ],
)
def test_a_folder_of_wrong_form_is_explained(
    tmp_path: Path, kind: str, counts: dict[str, int], message: str
) -> None:
    numbered(tmp_path, counts)
    for folder in counts:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DataError, match=f"{tmp_path}{message}"):
        load(tmp_path, kind)


@pytest.mark.parametrize("kind", ["imagefolder", "cifar10", "fashion-mnist"])
def test_a_missing_folder_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}/nowhere: no such file or folder$"):
        load(tmp_path / "nowhere", kind)


# ---- tar


def pack(root: Path, target: Path, prefix: str = "") -> Path:
    with tarfile.open(target, "w:gz") as tar:
        for path in sorted(root.rglob("*"), reverse=True):
            tar.add(path, f"{prefix}{path.relative_to(root)}", recursive=False)
    return target


@pytest.mark.parametrize("prefix", ["", "./", "cifar10/"])
def test_a_tar_holds_what_its_folder_holds(noise: Path, tmp_path: Path, prefix: str) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz", prefix)
    expected = load(noise, "cifar10")
    for path in (tar, tmp_path):  # the folder holds nothing but the tar
        loaded = load(path, "cifar10")
        assert loaded.digest == expected.digest
        assert loaded.classes == expected.classes
        assert torch.equal(loaded.train.read(torch.arange(32)), expected.train.read(torch.arange(32)))


@pytest.mark.parametrize("left", [0.02, 0.5, 0.9, 0.9999])
def test_a_cut_tar_is_damaged(noise: Path, tmp_path: Path, left: float) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    content = tar.read_bytes()
    tar.write_bytes(content[: int(left * len(content))])
    with pytest.raises(DataError, match=rf"^{tar}: damaged: [^\n]+$"):
        load(tar, "cifar10")


def test_a_tar_with_a_wrong_byte_is_damaged(noise: Path, tmp_path: Path) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(DataError, match=f"^{tar}: damaged: "):
        load(tar, "cifar10")


@pytest.mark.parametrize("how", ["header", "no end"])
def test_a_tar_that_ends_early_inside_whole_gzip_is_damaged(noise: Path, tmp_path: Path, how: str) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    content = bytearray(gzip.decompress(tar.read_bytes()))
    with tarfile.open(tar) as listing:
        last = listing.getmembers()[-2]
    if how == "header":
        content[last.offset : last.offset + 8] = b"scribble"
    else:
        del content[last.offset :]
    tar.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=f"^{tar}: damaged: "):
        load(tar, "cifar10")


def test_a_tar_writes_no_files_and_follows_no_links(noise: Path, tmp_path: Path) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    png = (noise / "train" / "ant" / "0.png").read_bytes()
    with tarfile.open(tar) as old, tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
        link = tarfile.TarInfo("train/ant/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(noise / "train" / "bee" / "0.png")
        new.addfile(link)
        outside = tarfile.TarInfo("train/ant/../../../outside.png")
        outside.size = len(png)
        new.addfile(outside, io.BytesIO(png))
    before = sorted(tmp_path.parent.rglob("*"))
    assert load(tmp_path / "evil.tar.gz").counts == load(tar).counts
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_tar_too_large_for_memory_is_refused(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = pack(noise, tmp_path / "images.tar.gz")
    monkeypatch.setattr(folders, "UNPACKED_LIMIT_BYTES", 1000)
    with pytest.raises(DataError, match=f"{tar}: over 1000 bytes: unpack it, give the folder"):
        load(tar)


# ---- CIFAR-10 as its authors publish it


def test_official_batches_are_read_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)

    def fake(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        assert root == tmp_path
        assert not download
        chosen = slice(0, 8) if train else slice(8, 12)
        return SimpleNamespace(data=images[chosen], targets=[0, 1] * (4 if train else 2), classes=["x", "y"])

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        loaded = load(path, "cifar10", resolution_px=32)
        assert loaded.counts == {"train": 6, "heldout": 2, "test": 4}
        assert torch.equal(
            loaded.test.read(torch.arange(4)), torch.from_numpy(images[8:]).permute(0, 3, 1, 2)
        )


def test_unofficial_batches_are_not_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nabort\n(tR.")  # a pickle that would end the process
    with pytest.raises(DataError, match=f"^{folder}: not the official files: "):
        load(tmp_path, "cifar10")


# ---- IDX


def test_idx_images_are_padded_and_keep_their_pixels(tmp_path: Path) -> None:
    zipped = load(write_fashion(tmp_path / "gz"), "fashion-mnist", resolution_px=32)
    unzipped = load(write_fashion(tmp_path / "raw", zipped=False), "fashion-mnist", resolution_px=32)
    assert zipped.counts == {"train": 40, "heldout": 10, "test": 20}
    assert zipped.digest == unzipped.digest
    original = np.frombuffer((tmp_path / "raw" / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    images = zipped.test.read(torch.arange(20))
    assert images.shape == (20, 3, 32, 32)
    for channel in range(3):
        np.testing.assert_array_equal(images[:, channel, 2:30, 2:30], original.reshape(-1, 28, 28))
    assert images.sum() == 3 * original.sum(dtype=np.int64)  # the border is black
    assert zipped.test.labels.tolist() == [i % 10 for i in range(20)]
    assert zipped.flip


def test_idx_images_fill_a_much_larger_resolution(tmp_path: Path) -> None:
    loaded = load(write_fashion(tmp_path), "fashion-mnist", resolution_px=64, channels=1)
    assert loaded.train.images.shape == (40, 1, 64, 64)
    assert loaded.train.read(torch.arange(40))[..., 0, :].min() > 0
    x, _ = next(batches(loaded.train, 4, seed=0, augment=True))
    assert x.shape == (4, 1, 64, 64)


def test_lazy_idx_images_equal_those_in_memory(tmp_path: Path) -> None:
    root = write_fashion(tmp_path)
    held, lazy = (load(root, "fashion-mnist", resolution_px=48, memory_limit_bytes=n) for n in (10**9, 0))
    assert held.mean == lazy.mean
    assert torch.equal(collect(held.heldout, seed=0)[0], collect(lazy.heldout, seed=0)[0])


def damage(path: Path, how: str) -> None:
    content = gzip.decompress(path.read_bytes())
    match how:
        case "magic":
            path.write_bytes(gzip.compress(b"\0\0\x0d" + content[3:]))
        case "short":
            path.write_bytes(gzip.compress(content[:-1]))
        case "long":
            path.write_bytes(gzip.compress(content + b"\0"))
        case "header":
            path.write_bytes(gzip.compress(content[:6]))
        case "huge":
            path.write_bytes(gzip.compress(content[:4] + b"\xff" * 12 + content[16:]))
        case "cut":
            path.write_bytes(path.read_bytes()[:-4])
        case "checksum":
            zipped = bytearray(path.read_bytes())
            zipped[-8] ^= 0xFF
            path.write_bytes(zipped)
        case "not gzip":
            path.write_bytes(content)
        case "missing":
            path.unlink()
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("magic", "starts with 00000d03, expected IDX magic 00000803"),
        ("header", "starts with 00000803, expected IDX magic 00000803 and 3 sizes"),
        ("short", "header says 39200 bytes, found 39199 after it"),
        ("long", "header says 39200 bytes, found 39201 or more after it"),
        ("huge", r"header says \d+ bytes, expected 1 to 3000000000"),
        ("cut", "damaged: "),
        ("checksum", "damaged: CRC check failed"),
        ("not gzip", "damaged: Not a gzipped file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, how: str, message: str) -> None:
    path = write_fashion(tmp_path) / "train-images-idx3-ubyte.gz"
    damage(path, how)
    with pytest.raises(DataError, match=rf"^{path}: {message}[^\n]*$"):
        load(tmp_path, "fashion-mnist")


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    damage(write_fashion(tmp_path) / "t10k-labels-idx1-ubyte.gz", "missing")
    with pytest.raises(DataError, match=r"lacks t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        load(tmp_path, "fashion-mnist")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(49, np.uint8), "49 labels for 50 images"),
        (np.full(50, 10, np.uint8), "label 10, expected 0 to 9"),
    ],
)
def test_labels_must_fit_the_images(tmp_path: Path, labels: np.ndarray[Any, Any], message: str) -> None:
    path = write_fashion(tmp_path) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(DataError, match=f"^{path}: {message}$"):
        load(tmp_path, "fashion-mnist")


def test_test_images_must_have_the_size_of_training_images(tmp_path: Path) -> None:
    path = write_fashion(tmp_path) / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((20, 28, 30), np.uint8))))
    with pytest.raises(DataError, match="images of 28 x 30 pixels, expected 28 x 28 as in training"):
        load(tmp_path, "fashion-mnist")


def test_too_few_idx_images_are_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path, train=15)
    with pytest.raises(DataError, match="class 'sandal' has 1 training images, expected at least 2"):
        load(tmp_path, "fashion-mnist")


# ---- the real ones, where they are


@pytest.mark.skipif(not FASHION, reason="FASHION_MNIST_DIR is not set")
def test_fashion_mnist_has_its_published_statistics() -> None:
    loaded = load(Path(FASHION), "fashion-mnist", resolution_px=28)
    assert loaded.counts == {"train": 48_000, "heldout": 12_000, "test": 10_000}
    # widely used for it: mean 0.2860, std 0.3530
    assert loaded.mean == pytest.approx([0.2860] * 3, abs=1e-4)
    assert loaded.std == pytest.approx([0.3530] * 3, abs=1e-4)
    assert loaded.test.labels.bincount().tolist() == [1000] * 10
    assert loaded.heldout.labels.bincount().tolist() == [1200] * 10


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_file(), reason="the shared data sets are not there")
def test_cifar10_has_its_published_statistics() -> None:
    loaded = load(CIFAR10, "cifar10", resolution_px=32)
    assert loaded.counts == {"train": 40_000, "heldout": 10_000, "test": 10_000}
    # widely used for it: mean 0.4914 0.4822 0.4465, std 0.2470 0.2435 0.2616; these files are JPEG
    assert loaded.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    assert loaded.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=3e-3)
    assert loaded.heldout.labels.bincount().tolist() == [1000] * 10
