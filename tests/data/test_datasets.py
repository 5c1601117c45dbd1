"""Users' Datasets are loaded as the same images are loaded from a folder."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import PX, collect, load, numbered, numbers
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from qnas.common.errors import DataError
from qnas.data.augmentation import Augmentation
from qnas.data.datasets import Datasets
from qnas.data.image_data import ImageData
from qnas.data.lazy_images import LazyImages
from qnas.data.loading import load_data
from qnas.data.sources import open_dataset

SPLITS = ("train", "heldout", "test", "train_and_heldout")
LIMITS = pytest.mark.parametrize("memory_limit_bytes", [10**9, 0])


class Items(Dataset[Any]):
    """A Dataset of listed items; those that are exceptions are raised."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.reads: Counter[int] = Counter()
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def files(root: Path) -> list[tuple[Path, int]]:
    """Return (file, label) in the order in which a folder is read."""
    found = [(path, path.parent.name) for path in sorted(root.rglob("*.png"))]
    names = sorted({name for _, name in found})
    return [(path, names.index(name)) for path, name in found]


def pictures(root: Path) -> list[tuple[Tensor, int]]:
    return [
        (torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1), label) for path, label in files(root)
    ]


def read(data: Any, **options: Any) -> ImageData:
    return load_data(data, **{"resolution_px": PX, "quiet": True, **options})


def are_the_same(found: ImageData, expected: ImageData) -> None:
    """Check that pixels, labels, statistics and batches are equal, bit for bit."""
    assert found.counts == expected.counts
    assert (found.mean, found.std) == (expected.mean, expected.std)
    for name in SPLITS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert torch.equal(ours.read(torch.arange(len(ours))), theirs.read(torch.arange(len(theirs))))
        assert torch.equal(ours.labels, theirs.labels)
        for one, other in zip(
            collect(ours, seed=3, augment=True), collect(theirs, seed=3, augment=True), strict=False
        ):
            assert torch.equal(one, other)


@LIMITS
@pytest.mark.parametrize("form", ["PIL", "uint8", "float", "array", "loader", "targets"])
def test_a_dataset_is_split_and_batched_as_a_folder_is(
    noise: Path, form: str, memory_limit_bytes: int
) -> None:
    root = noise / "train"
    loader, attributes = None, {}
    match form:
        case "PIL":
            items: list[Any] = [(Image.open(path), label) for path, label in files(root)]
        case "uint8":
            items = list(pictures(root))
        case "float":
            items = [(image / 255, torch.tensor(label)) for image, label in pictures(root)]
        case "array":
            items = [(image.permute(1, 2, 0).numpy(), np.int64(label)) for image, label in pictures(root)]
        case "loader":
            items, loader = list(files(root)), Image.open
        case "targets":
            items = list(pictures(root))
            attributes = {"targets": torch.tensor([label for _, label in items])}
    given = Datasets(Items(items, **attributes), classes=["ant", "bee"], loader=loader)
    found = read(given, memory_limit_bytes=memory_limit_bytes)
    assert isinstance(found.train.images, Tensor) == (memory_limit_bytes > 0)
    assert found.classes == ("ant", "bee")
    are_the_same(found, load(root))


def test_random_crops_are_cut_from_the_images_of_a_dataset(noise: Path) -> None:
    crops = Augmentation(2, random_resized_crop=0.2)
    options: dict[str, Any] = {"seed": 1, "epoch": 2, "augment": True, "augmentation": crops}
    expected, _ = collect(load(noise / "train", keep_originals=True).train, **options)
    for limit in (10**9, 0):
        found = read(Items(list(pictures(noise / "train"))), keep_originals=True, memory_limit_bytes=limit)
        assert torch.equal(collect(found.train, **options)[0], expected)


def test_validation_and_test_are_splits_as_the_folders_val_and_test_are(tmp_path: Path) -> None:
    counts = {f"{part}/{name}": n for part, n in (("train", 9), ("val", 3), ("test", 2)) for name in "ab"}
    root = numbered(tmp_path, counts)
    train, val, test = (Items(list(pictures(root / part))) for part in ("train", "val", "test"))
    found = read(Datasets(train, validation=val, test=test, classes=["a", "b"], name="letters"))
    assert found.name == "letters"
    assert found.counts == {"train": 18, "heldout": 6, "test": 4}
    are_the_same(found, load(root))
    # without test, val is the test split, and images are held out of the training images
    assert numbers(read(Datasets(train, validation=val)).test) == numbers(found.heldout)
    assert numbers(read(Datasets(train, test=test)).test) == numbers(found.test)
    assert read(Datasets(train)).counts == read(train).counts


def test_a_kind_without_its_own_class_is_the_kind() -> None:
    digits = open_dataset("digits")
    expected = read("digits", resolution_px=8)
    plain = Items([digits[i] for i in range(len(digits))])
    for data in (digits, Datasets(plain, flip=False), Datasets(digits, flip=False)):
        found = read(data, resolution_px=8)
        assert found.digest == expected.digest
        assert not found.train.flip
        are_the_same(found, expected)


def test_in_memory_every_item_is_read_once_but_for_the_sample(plain: Path) -> None:
    dataset = Items(list(pictures(plain)))
    data = read(dataset)
    collect(data.train)
    assert set(dataset.reads.values()) == {1, 3}
    assert sum(count == 3 for count in dataset.reads.values()) == 32


@LIMITS
def test_labels_that_a_dataset_lists_are_not_read_from_items(plain: Path, memory_limit_bytes: int) -> None:
    items = pictures(plain)
    labels = [label for _, label in items]
    listed, unlisted = Items(list(items), labels=labels), Items(list(items))
    for dataset in (listed, unlisted, Subset(listed, range(40))):
        found = read(dataset, memory_limit_bytes=memory_limit_bytes, max_broken=None)
        are_the_same(found, load(plain))
    lazily = Items(list(items), labels=labels)
    read(lazily, memory_limit_bytes=0, max_broken=None, resolution_px=8)
    unread = set(range(40)) - set(lazily.reads)
    assert not unread  # of so few images the statistics take all
    assert max(lazily.reads.values()) == 3


@LIMITS
def test_listed_labels_that_the_items_do_not_have_do_not_count(plain: Path, memory_limit_bytes: int) -> None:
    """As with a transform of labels that the Dataset applies to its items alone."""
    dataset = Items(list(pictures(plain)), targets=[0] * 40)
    are_the_same(read(dataset, memory_limit_bytes=memory_limit_bytes), load(plain))


def test_a_listed_label_that_one_item_does_not_have_is_named(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"a": 40, "b": 40})
    labels = [label for _, label in files(root)]
    unseen = 1  # not in the sample
    dataset = Items(list(pictures(root)), targets=[*labels[:unseen], 1, *labels[unseen + 1 :]])
    with pytest.raises(DataError, match=r"^data\[1\]: label 0, but it was 1 before$"):
        read(dataset, memory_limit_bytes=0)


@LIMITS
@pytest.mark.parametrize("listed", [True, False])
def test_items_that_raise_are_broken_images(plain: Path, memory_limit_bytes: int, listed: bool) -> None:
    items: list[Any] = list(pictures(plain))
    labels = [label for _, label in items]
    items[7] = OSError("no such file: ant/007.png")
    dataset = Items(items, **({"targets": labels} if listed else {}))
    options: dict[str, Any] = {"memory_limit_bytes": memory_limit_bytes}
    found = read(dataset, max_broken=0.1, **options)
    (broken,) = found.broken
    assert (broken.file, broken.problem) == ("data[7]", "OSError: no such file: ant/007.png")
    assert sum(found.counts.values()) == 39
    assert (7, 0) not in numbers(found.train_and_heldout) + numbers(found.test)
    if listed:  # then the splits of the others are what they would be
        whole = load(plain)
        for name in SPLITS:
            expected = [each for each in numbers(getattr(whole, name)) if each != (7, 0)]
            assert numbers(getattr(found, name)) == expected
    with pytest.raises(
        DataError, match=r"1 of 40 images are broken, more than `max_broken=0\.01` allows: data\["
    ):
        read(dataset, **options)


class Noisy(Items):
    """A Dataset whose images are drawn anew each time."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image + torch.randint(0, 100, image.shape, dtype=torch.uint8), label


def test_images_that_change_are_said_and_do_not_change_the_digest(plain: Path) -> None:
    noisy = Noisy(list(pictures(plain)))
    first, second = read(noisy), read(noisy)
    assert first.digest == second.digest
    assert first.digest != read(Items(list(pictures(plain)))).digest
    (note,) = first.notes
    assert note.startswith("data[0] was a different image when it was read again: this run keeps the images")
    assert torch.equal(collect(first.train)[0], collect(first.train)[0])
    assert read(noisy, keep_originals=True).notes == first.notes  # crops are cut from what is kept
    (note,) = read(noisy, memory_limit_bytes=0).notes
    assert "images may differ in every epoch, and a resumed run is not exactly the same run" in note


def test_only_where_not_all_images_are_compared_a_note_says_so(plain: Path) -> None:
    dataset = Items(list(pictures(plain)))
    assert read(dataset).notes == load(plain).notes == ()
    (note,) = read(dataset, memory_limit_bytes=0).notes
    assert note == (
        "Items: a resumed run is exact if an index always gives the same image: 32 of 40 images were compared"
    )
    few = Items([(image, i % 2) for i, (image, _) in enumerate(pictures(plain)[:20])])
    (note,) = read(few, memory_limit_bytes=0).notes
    assert note.endswith("20 of 20 images were compared")


@LIMITS
def test_the_digest_goes_by_pixels_labels_and_classes(plain: Path, memory_limit_bytes: int) -> None:
    def digest(change: Any = None, **options: Any) -> str:
        items = pictures(plain)
        if change is not None:
            items[0] = change(*items[0])
        given = Datasets(Items(items), **options)
        return read(given, memory_limit_bytes=memory_limit_bytes).digest

    digests = [
        digest(),
        digest(lambda image, label: (255 - image, label)),
        digest(lambda image, label: (image, 1)),
        digest(classes=["x", "y", "z"]),
    ]
    assert len(set(digests)) == 4
    assert digest(lambda image, label: (image / 255, label), name="other") == digests[0]


def test_images_of_many_sizes_keep_their_size_until_they_are_fitted() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i, 30 - i, 3), dtype=np.uint8) for i in range(12)]
    dataset = Items([(image, i % 2) for i, image in enumerate(images)])
    held, lazy = read(dataset, keep_originals=True), read(dataset, memory_limit_bytes=0)
    are_the_same(held, lazy)
    assert isinstance(held.train.originals, LazyImages)
    assert not isinstance(held.train.originals.originals, Tensor)
    assert isinstance(read(dataset, memory_limit_bytes=12 * 3 * 25 * 25).train.images, Tensor)


class Stream(IterableDataset[Any]):
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda items: 3, "expected a map-style Dataset with __len__ and __getitem__, got int"),
        (lambda items: iter(items), "got list_iterator"),
        (lambda items: Stream(), "got Stream"),
        (lambda items: {0: items[0]}, "got dict"),
        (lambda items: Items([]), "the Dataset is empty"),
        (lambda items: Items([(image, 0) for image, _ in items]), "1 classes, expected at least 2"),
        (lambda items: Items(items, classes=["a", "b"]), r"label 2, expected 0 to 1, for 2 classes"),
        (lambda items: Items([*items, (items[0][0], -1)]), r"label -1, expected 0 to 2"),
    ],
)
def test_a_dataset_of_another_form_is_explained(plain: Path, dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^data(\[\d+\])?: .*{message}"):
        read(dataset(pictures(plain)))


def test_messages_name_the_argument(plain: Path) -> None:
    train = Items(list(pictures(plain)), classes=["ant", "bee", "cat"])
    with pytest.raises(DataError, match=r"^validation: expected a map-style Dataset .*, got str$"):
        Datasets(train, validation="val")
    with pytest.raises(DataError, match=r"^test: its classes are not those of train$"):
        read(Datasets(train, test=Items(list(pictures(plain)), classes=["ant", "bee", "dog"])))
    with pytest.raises(DataError, match=r"^test\[0\]: label 9, expected 0 to 2"):
        read(Datasets(train, test=Items([(pictures(plain)[0][0], 9)])))
    with pytest.raises(DataError, match=r"^Items: no training image of class 'dog'"):
        read(Datasets(train, classes=["ant", "bee", "cat", "dog"]))


class Flaky(Items):
    """A Dataset whose items that are exceptions are raised in the first reads alone."""

    def __getitem__(self, index: int) -> Any:
        first, *later = self.items[index] if isinstance(self.items[index], list) else [self.items[index]]
        self.reads[index] += 1
        if later and self.reads[index] > 1:
            return later[0]
        return Items([first])[0]


def test_an_item_without_a_listed_label_that_can_be_read_later_stays_left_out(tmp_path: Path) -> None:
    items: list[Any] = list(pictures(numbered(tmp_path, {"a": 40, "b": 40})))
    unseen = 1  # not in the sample, so that it is read first for its label
    items[unseen] = [OSError("not now"), items[unseen]]
    found = read(Flaky(items), memory_limit_bytes=0, max_broken=0.1)
    assert [each.problem for each in found.broken] == ["OSError: not now"]
    assert sum(found.counts.values()) == 79
