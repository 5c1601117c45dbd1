"""Images with labels: read, split, kept as bytes at one resolution, handed out in batches.

Choices made. All images of a data set lie in one uint8 array, channels last in memory, in the order
training, held-out, test, so that splits are views and no image is held twice; what does not fit is
decoded when a batch asks for it. Splits are stratified and drawn with a constant, not with the run's
seed: runs with different seeds choose on the same images and can be compared. A batch depends only on
(seed, epoch, place in the epoch): a resumed run sees the batches that it would have seen. Shifts and
flips are one gather over the whole batch.
"""

import gzip
import hashlib
import json
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

from qnas.errors import DataError, UsageError, nearest

Indices = NDArray[np.int64]

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)
FASHION_CLASSES = (
    *("t-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

MEMORY_LIMIT_BYTES = 3_000_000_000  # decoded images of all splits together; above it they stay encoded
HASHED_BYTES = 1_000_000_000  # a folder above it is identified by names and sizes, not by its bytes
TEST_FRACTION = 0.2  # where the data set has no test images of its own
STATISTICS_IMAGES = 1000  # of how many images mean and std are taken where not all are in memory
BATCHES_AHEAD = 2  # decoded ahead of the consumer

# Constants, so that splits are the same in every run; two, so that the draws are independent.
_TEST_DRAW = 20231117
_HELDOUT_DRAW = 19560

_PARTS = ("train", "heldout", "test")


# ---- what is asked for


@dataclass(frozen=True)
class DataSpec:
    """A data set as on the command line: `digits`, or a kind and where its files lie.

    Raises DataError for an unknown kind, and for a path that is missing or too much.
    """

    kind: str
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown data {self.kind!r}: {nearest(self.kind, KINDS)}")
        form = KINDS[self.kind].form
        if (self.path is not None) != (":DIR" in form):
            raise DataError(f"data {self}: expected {form}")

    def __str__(self) -> str:
        return self.kind if self.path is None else f"{self.kind}:{self.path}"


def parse_data_spec(text: str) -> DataSpec:
    """Read `KIND` or `KIND:DIR`; the path becomes absolute. Raises DataError.

    >>> str(parse_data_spec("digits"))
    'digits'
    """
    kind, _, folder = text.partition(":")
    return DataSpec(kind, Path(folder).expanduser().resolve() if folder else None)


# ---- what is given back


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, with what normalises and augments them.

    `images` (N, C, H, W) are uint8, channels last in memory, or decoded when asked for. `labels` (N,)
    are int64. `mean` and `std` have a value a channel, with bytes counted as 0 to 1. `flip` says
    whether a mirrored image still shows its class.
    """

    name: str
    images: "Tensor | LazyImages"
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.labels) > 0, self.name
        assert self.images.shape[1] == len(self.mean) == len(self.std), self.images.shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        """Return these images (B, C, H, W) as uint8. Raises DataError for a damaged file."""
        if isinstance(self.images, Tensor):
            # (N, H, W, C) has whole images as rows, so that the gather copies them at once
            return self.images.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
        return torch.stack([self.images[int(i)] for i in indices])


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set at one resolution, split three ways.

    `train` is for weights, `heldout` for architecture steps and for choosing, and `test` for nothing
    but the final figure. `digest` identifies the original images, labels and classes, whatever the
    resolution.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    heldout: Split
    test: Split
    train_and_heldout: Split  # for the final training, once nothing is left to choose
    resolution_px: int
    channels: int
    digest: str

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over `train_and_heldout`, bytes counted as 0 to 1."""
        return self.train.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, as `mean`."""
        return self.train.std

    @property
    def flip(self) -> bool:
        """Whether augmentation mirrors images."""
        return self.train.flip

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {split.name: len(split) for split in (self.train, self.heldout, self.test)}

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded."""
        return isinstance(self.train.images, Tensor)


class _File(NamedTuple):
    """An encoded image: a file, or the content of a member of a tar."""

    name: str  # below the data set's folder, with forward slashes
    where: str  # as messages name it
    content: Path | memoryview

    def size_bytes(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read(self) -> bytes | memoryview:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


class LazyImages(Dataset[Tensor]):
    """Images that are decoded and brought to the resolution each time they are asked for.

    `originals` are uint8 (N, C, H, W) or encoded files; `order` picks from them.
    """

    def __init__(
        self,
        originals: Tensor | Sequence[_File],
        order: Indices,
        *,
        resolution_px: int,
        channels: int,
        pads: bool,
    ) -> None:
        self.originals = originals
        self.order = order
        self.resolution_px = resolution_px
        self.channels = channels
        self.pads = pads

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of the decoded images."""
        return len(self.order), self.channels, self.resolution_px, self.resolution_px

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        """Return one image (C, H, W) as uint8. Raises DataError for a damaged file."""
        original = self.originals[int(self.order[index])]
        image = _decode(original, self.resolution_px) if isinstance(original, _File) else original
        where = original.where if isinstance(original, _File) else "images"
        return self.fit(image, where)

    def take(self, places: slice | Indices) -> "LazyImages":
        """Return some of these images, without decoding them."""
        return LazyImages(
            self.originals,
            self.order[places],
            resolution_px=self.resolution_px,
            channels=self.channels,
            pads=self.pads,
        )

    def fit(self, images: Tensor, where: str) -> Tensor:
        """Bring images to channels and resolution: (..., C', H', W') -> (..., C, H, W)."""
        images = _to_channels(images, self.channels, where)
        return _to_resolution(images, self.resolution_px, pads=self.pads)


def _to_channels(images: Tensor, channels: int, where: str) -> Tensor:
    """Repeat grey, or weigh colours to grey: (..., C', H, W) -> (..., C, H, W)."""
    found = images.shape[-3]
    if found == channels:
        return images
    if found == 1:
        return images.expand(*images.shape[:-3], channels, *images.shape[-2:])
    if channels == 1:
        grey: Tensor = tv.rgb_to_grayscale(images)
        return grey
    raise DataError(f"{where}: {found} channels cannot become {channels}: expected 1 or {found}")


def _to_resolution(images: Tensor, px: int, *, pads: bool) -> Tensor:
    """Cut out the central square and resize it: (..., H', W') -> (..., px, px).

    Cutting first is the usual resize of the shorter side and central crop, with memory that does not
    grow with the longer side. Where `pads`, slightly smaller images get a black border instead: they
    keep their pixels, and their background is black. Photographs have none, so they are resized.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    if height != width:
        images = tv.center_crop(images, [side, side])
    if pads and side < px < 1.5 * side:
        images = tv.center_crop(images, [px, px])
    elif side != px:
        images = tv.resize(images, [px, px], antialias=True)
    return images


def _decode(file: _File, resolution_px: int) -> Tensor:
    """Decode a file to uint8 (1 or 3, H, W). Raises DataError for all but a whole image."""
    try:
        # Not reset here: it is one setting for all threads, and someone else's.
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("Pillow's LOAD_TRUNCATED_IMAGES is set, which makes up missing pixels")
        with Image.open(BytesIO(file.read())) as image:
            # JPEG at a fraction of its size, never below twice what is needed: large photographs
            # decode several times faster.
            image.draft("", (2 * resolution_px, 2 * resolution_px))
            return _pixels(image)
    except Exception as error:  # Pillow raises almost anything on a damaged file
        raise DataError(f"{file.where}: not a whole image: {_one_line(error)}") from error


def _pixels(image: Image.Image) -> Tensor:
    """Return grey or colour of 8 bits: (1 or 3, H, W)."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would cut off at 255
        values = np.array(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("more than 16 bits a pixel")
        return torch.from_numpy((values >> 8).astype(np.uint8))[None]
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency
    pixels: Tensor = tv.pil_to_tensor(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    return pixels


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- reading originals


@dataclass(frozen=True, eq=False)
class _Source:
    """Original images with labels. `parts` names those splits that the data set itself makes."""

    classes: tuple[str, ...]
    images: Tensor | tuple[_File, ...]
    labels: Indices
    parts: dict[str, Indices]


def _read_digits(path: Path | None) -> _Source:
    from sklearn.datasets import load_digits  # here, as it takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values 0 to 16
    labels = digits.target.astype(np.int64)
    classes = tuple(str(i) for i in range(10))
    return _Source(classes, torch.from_numpy(images)[:, None], labels, {"train": np.arange(len(labels))})


def _read_fashion(path: Path | None) -> _Source:
    assert path is not None
    _check_exists(path)
    images: list[Tensor] = []
    labels: list[Indices] = []
    parts: dict[str, Indices] = {}
    start = 0
    for part, prefix in (("train", "train"), ("test", "t10k")):
        image_file, part_images = _read_idx(path, f"{prefix}-images-idx3-ubyte", ndim=3)
        label_file, part_labels = _read_idx(path, f"{prefix}-labels-idx1-ubyte", ndim=1)
        if len(part_images) != len(part_labels):
            raise DataError(f"{label_file}: {len(part_labels)} labels for {len(part_images)} images")
        if images and images[0].shape[2:] != part_images.shape[1:]:
            height, width = images[0].shape[2:]
            raise DataError(
                f"{image_file}: images of {part_images.shape[1]} x {part_images.shape[2]} pixels, expected "
                f"{height} x {width} as in training"
            )
        if part_labels.max() >= len(FASHION_CLASSES):
            raise DataError(f"{label_file}: label {part_labels.max()}, expected 0 to 9")
        images.append(torch.from_numpy(part_images)[:, None])
        labels.append(part_labels.astype(np.int64))
        parts[part] = np.arange(start, start + len(part_labels))
        start += len(part_labels)
    return _Source(FASHION_CLASSES, torch.cat(images), np.concatenate(labels), parts)


def _read_idx(folder: Path, name: str, ndim: int) -> tuple[Path, NDArray[np.uint8]]:
    """Read an IDX file of bytes, plain or .gz: magic 0 0 8 ndim, sizes as big-endian uint32, values."""
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise DataError(f"{folder}: lacks {name} or {name}.gz")
    path = found[0]
    header_bytes = 4 + 4 * ndim
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_bytes)
            magic = bytes((0, 0, 8, ndim))
            if header[:4] != magic or len(header) < header_bytes:
                found_hex, expected_hex = header[:4].hex(), magic.hex()
                raise DataError(
                    f"{path}: starts with {found_hex}, expected IDX magic {expected_hex} and {ndim} sizes"
                )
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
            count = int(np.prod(shape, dtype=object))
            if count == 0 or count > MEMORY_LIMIT_BYTES:
                raise DataError(f"{path}: header says {count} bytes, expected 1 to {MEMORY_LIMIT_BYTES}")
            content = file.read(count + 1)  # one more, to see the end and with it gzip's checksum
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged: {_one_line(error)}") from error
    if len(content) != count:
        more = "or more " if len(content) > count else ""
        raise DataError(f"{path}: header says {count} bytes, found {len(content)} {more}after it")
    return path, np.frombuffer(bytearray(content), np.uint8).reshape(shape)


def _read_cifar10(path: Path | None) -> _Source:
    assert path is not None
    official = path if path.name == "cifar-10-batches-py" else path / "cifar-10-batches-py"
    if not official.is_dir():
        return _read_tree(path, needs_test=True)
    from torchvision.datasets import CIFAR10

    try:
        # checks the MD5 of every file before it unpickles one
        train, test = (CIFAR10(official.parent, train=train, download=False) for train in (True, False))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{official}: not the official files: {_one_line(error)}") from error
    images = np.concatenate([train.data, test.data])  # (60000, 32, 32, 3)
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    parts = {"train": np.arange(len(train.data)), "test": np.arange(len(train.data), len(images))}
    return _Source(tuple(train.classes), torch.from_numpy(images).permute(0, 3, 1, 2), labels, parts)


def _read_folder(path: Path | None) -> _Source:
    assert path is not None
    return _read_tree(path, needs_test=False)


# Folders of images, such as ("train", "cat"), with the images right in them; possibly none.
_Tree = dict[tuple[str, ...], list[_File]]


def _read_tree(path: Path, *, needs_test: bool) -> _Source:
    """Read classes as folders, from a folder, a .tar.gz, or a folder that holds one .tar.gz."""
    _check_exists(path)
    if path.is_dir():
        tree = _list_folder(path)
        tars = [entry for entry in sorted(path.iterdir()) if entry.is_file() and _is_tar(entry)]
        if list(tree) == [()] and len(tars) == 1:
            path = tars[0]
            tree = _list_tar(path)
    elif _is_tar(path):
        tree = _list_tar(path)
    else:
        raise DataError(f"{path}: expected a folder or a .tar.gz")

    parts = _find_parts(tree, path, needs_test=needs_test)
    classes = tuple(sorted(parts["train"]))
    if len(classes) < 2:
        raise DataError(f"{path}: {len(classes)} class folders, expected at least 2")
    for part, found in parts.items():
        if set(found) != set(classes):
            differences = {"lacks": set(classes) - set(found), "adds": set(found) - set(classes)}
            listed = [f"{verb} {', '.join(sorted(names))}" for verb, names in differences.items() if names]
            raise DataError(f"{path}: classes of {part} differ from those of train: {'; '.join(listed)}")
        for name, files in found.items():
            if not files:
                raise DataError(f"{path}: class folder {name!r} of {part} has no images")

    files, labels, indices = [], [], {}
    for part, found in parts.items():
        start = len(files)
        for label, name in enumerate(classes):
            files += found[name]
            labels += [label] * len(found[name])
        indices[part] = np.arange(start, len(files))
    return _Source(classes, tuple(files), np.array(labels, dtype=np.int64), indices)


def _find_parts(tree: _Tree, path: Path, *, needs_test: bool) -> dict[str, dict[str, list[_File]]]:
    """Find the splits that the folders make: split -> class -> images."""

    def classes_in(*parents: str) -> dict[str, list[_File]]:
        depth = len(parents) + 1
        return {at[-1]: files for at, files in tree.items() if len(at) == depth and at[:-1] == parents}

    top = classes_in()
    if not top:
        raise DataError(f"{path}: no folders of images, expected train/CLASS/* or CLASS/*")
    train, val, test = (classes_in(part) for part in ("train", "val", "test"))
    if train and val and test:
        return {"train": train, "heldout": val, "test": test}
    if train and (test or (val and not needs_test)):
        return {"train": train, "test": test or val}
    if "train" in top or needs_test:
        lacking = "test" if needs_test else "val or test"
        hint = "" if needs_test else f"; or give {path}/train to have it split"
        raise DataError(f"{path}: expected class folders in train and in {lacking}{hint}")
    return {"train": top}


def _is_tar(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tgz"))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _list_folder(root: Path) -> _Tree:
    """List folders down to the second level and their images, sorted, hidden ones left out."""
    tree: _Tree = {}

    def visit(folder: Path, at: tuple[str, ...]) -> None:
        files = tree.setdefault(at, [])
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                path = Path(entry.path)
                if _is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    if len(at) < 2:
                        visit(path, (*at, entry.name))
                elif path.suffix.lower() in IMAGE_SUFFIXES:
                    files.append(_File("/".join((*at, entry.name)), str(path), path))

    try:
        visit(root, ())
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read: {error.strerror}") from error
    return tree


def _list_tar(path: Path) -> _Tree:
    """Read a .tar.gz into memory and list its images; nothing is written, links are left out.

    A folder around everything is taken off. Raises DataError for a damaged or too large tar.
    """
    tree: _Tree = {}
    try:
        unzipped = BytesIO()
        with gzip.open(path) as file:
            while chunk := file.read(1 << 22):
                unzipped.write(chunk)
                if unzipped.tell() > MEMORY_LIMIT_BYTES:
                    raise DataError(f"{path}: over {MEMORY_LIMIT_BYTES} bytes: unpack it, give the folder")
        unzipped.seek(0)
        content = unzipped.getbuffer()  # images are views of it
        with tarfile.open(fileobj=unzipped, mode="r:") as tar:
            for member in tar:
                at = PurePosixPath(member.name).parts
                if any(_is_hidden(part) for part in at):
                    continue
                if member.isdir():
                    tree.setdefault(at, [])
                elif (
                    member.isfile()
                    and not member.issparse()  # its bytes do not lie in one piece
                    and PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES
                ):
                    image = content[member.offset_data : member.offset_data + member.size]
                    found = _File("/".join(at), f"{path}: {member.name}", image)
                    tree.setdefault(at[:-1], []).append(found)
            # tarfile takes a damaged header for the end, after which there must be nothing but zeros
            end = bytes(content[tar.offset :])
            if not end or any(end):
                raise tarfile.ReadError(f"no end, or an unreadable header at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: damaged: {_one_line(error)}") from error
    for at in list(tree):  # folders above those that are listed
        for depth in range(len(at)):
            tree.setdefault(at[:depth], [])
    while len(top := {at[0] for at in tree if at}) == 1 and not tree[()]:
        prefix = len(top.pop()) + 1
        tree = {at[1:]: [f._replace(name=f.name[prefix:]) for f in files] for at, files in tree.items() if at}
    return {at: sorted(tree[at], key=lambda file: file.name) for at in sorted(tree)}


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")


class _Kind(NamedTuple):
    """How a kind of data is given, read and treated."""

    form: str  # as on the command line, and what lies there
    read: Callable[[Path | None], _Source]
    flip: bool  # whether a mirrored image still shows its class
    pads: bool  # whether slightly smaller images get a black border


KINDS: dict[str, _Kind] = {
    "digits": _Kind("digits, without a folder", _read_digits, flip=False, pads=False),
    "fashion-mnist": _Kind(
        "fashion-mnist:DIR, the folder of the four IDX files, .gz or not", _read_fashion, flip=True, pads=True
    ),
    "cifar10": _Kind(
        "cifar10:DIR with train/CLASS/* and test/CLASS/*, or the .tar.gz of it, or cifar-10-batches-py",
        _read_cifar10,
        flip=True,
        pads=False,
    ),
    "imagefolder": _Kind(
        "imagefolder:DIR with train/CLASS/* and val/CLASS/* or test/CLASS/*, or with CLASS/*",
        _read_folder,
        flip=True,
        pads=False,
    ),
}


# ---- splits, digest, statistics


def load_data(
    spec: DataSpec,
    *,
    resolution_px: int,
    channels: int = 3,
    heldout_fraction: float = 0.2,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    quiet: bool = False,
) -> ImageData:
    """Read, split and decode a data set.

    Held-out images are taken from the training images, the same ones in every run; a folder with all
    of train, val and test has val as its held-out images. Without test images of its own, a data set
    first gives up a fifth of its images as such. Up to `memory_limit_bytes` of pixels over all splits
    every image is decoded now, so that a damaged file shows before training; while it loads, the
    originals are held beside them. Above, `mean` and `std` are those of some of the training images.

    Raises DataError where files are missing, damaged or too few, and UsageError for a fraction outside
    0 to 1.
    """
    assert resolution_px >= 1, resolution_px
    assert channels >= 1, channels
    if not 0 < heldout_fraction < 1:
        raise UsageError(f"the held-out fraction must lie between 0 and 1, got {heldout_fraction}")
    kind = KINDS[spec.kind]
    source = kind.read(spec.path)
    parts = _split_parts(source, str(spec), heldout_fraction)
    order = np.concatenate([parts[part] for part in _PARTS])
    lazy = LazyImages(source.images, order, resolution_px=resolution_px, channels=channels, pads=kind.pads)
    digest = _digest(source)
    fits = int(np.prod(lazy.shape, dtype=object)) <= memory_limit_bytes
    images = _decode_all(lazy, quiet=quiet) if fits else lazy
    labels = torch.from_numpy(source.labels[order])

    ends = np.cumsum([len(parts[part]) for part in _PARTS]).tolist()
    mean, std = _statistics(_part(images, 0, ends[1]))

    def split(name: str, start: int, end: int) -> Split:
        return Split(name, _part(images, start, end), labels[start:end], mean, std, kind.flip)

    return ImageData(
        name=spec.path.name if spec.kind == "imagefolder" and spec.path else spec.kind,
        classes=source.classes,
        train=split("train", 0, ends[0]),
        heldout=split("heldout", ends[0], ends[1]),
        test=split("test", ends[1], ends[2]),
        train_and_heldout=split("train_and_heldout", 0, ends[1]),
        resolution_px=resolution_px,
        channels=channels,
        digest=digest,
    )


def _part(images: Tensor | LazyImages, start: int, end: int) -> Tensor | LazyImages:
    return images[start:end] if isinstance(images, Tensor) else images.take(slice(start, end))


def _split_parts(source: _Source, where: str, heldout_fraction: float) -> dict[str, Indices]:
    """Complete the splits that the data set makes by taking images from its training images."""
    parts = dict(source.parts)
    to_take = [part for part in ("test", "heldout") if part not in parts]
    counts = np.bincount(source.labels[parts["train"]], minlength=len(source.classes))
    fewest = int(counts.argmin())
    if counts[fewest] <= len(to_take):
        raise DataError(
            f"{where}: class {source.classes[fewest]!r} has {counts[fewest]} training images, expected at "
            f"least {len(to_take) + 1}, as {' and '.join(to_take)} images are split off"
        )
    for part in to_take:
        draw, fraction = (_TEST_DRAW, TEST_FRACTION) if part == "test" else (_HELDOUT_DRAW, heldout_fraction)
        parts["train"], parts[part] = _take_stratified(parts["train"], source.labels, fraction, draw)
    return parts


def _take_stratified(
    indices: Indices, labels: Indices, fraction: float, draw: int
) -> tuple[Indices, Indices]:
    """Split off a fraction of every class, at least one image of it, and leave at least one."""
    # RandomState, as numpy promises that its numbers never change
    rng = np.random.RandomState(draw)
    taken = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken.append(rng.permutation(members)[:count])
    picked = np.isin(indices, np.concatenate(taken))
    return indices[~picked], indices[picked]


def _digest(source: _Source) -> str:
    """Identify classes, labels, the data set's own splits, and the images."""
    digest = hashlib.sha256()
    digest.update(json.dumps([source.classes, {k: len(v) for k, v in source.parts.items()}]).encode())
    digest.update(source.labels.astype("<i8").tobytes())
    if isinstance(source.images, Tensor):
        digest.update(repr(tuple(source.images.shape)).encode())
        digest.update(source.images.contiguous().numpy().data)
        return digest.hexdigest()[:16]
    where = ""
    try:
        sizes = []
        for file in source.images:
            where = file.where
            sizes.append(file.size_bytes())
        whole = sum(sizes) <= HASHED_BYTES
        for file, size in zip(source.images, sizes, strict=True):
            where = file.where
            digest.update(f"{file.name}\0{size}\0".encode(errors="surrogateescape"))
            if whole:
                digest.update(file.read())
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def _decode_all(lazy: LazyImages, *, quiet: bool) -> Tensor:
    """Decode everything into one array (N, C, H, W), channels last in memory."""
    count, channels, height, width = lazy.shape
    images = torch.empty((count, height, width, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    with tqdm(total=count, desc="images", unit="", leave=False, disable=quiet or None) as bar:
        if isinstance(lazy.originals, Tensor):
            for start in range(0, count, 1024):
                chosen = torch.from_numpy(lazy.order[start : start + 1024])
                images[start : start + 1024] = lazy.fit(lazy.originals[chosen], "images")
                bar.update(len(chosen))
        else:
            # in chunks, so that the first damaged file ends it
            done = 0
            chunks = (range(start, min(start + 64, count)) for start in range(0, count, 64))
            for decoded in _decode_ahead(lazy, chunks):
                images[done : done + len(decoded)] = decoded
                done += len(decoded)
                bar.update(len(decoded))
    return images


def _decode_ahead(lazy: LazyImages, chunks: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """Yield the images (B, C, H, W) of each chunk of indices, decoded in threads ahead of need.

    Threads, not processes: Pillow and the resize release the interpreter's lock, and an error arrives
    as it was raised.
    """
    waiting: deque[list[Future[Tensor]]] = deque()

    def finish() -> Tensor:
        return torch.stack([image.result() for image in waiting.popleft()])

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
    try:
        for chunk in chunks:
            waiting.append([pool.submit(lazy.__getitem__, i) for i in chunk])
            if len(waiting) > BATCHES_AHEAD:
                yield finish()
        while waiting:
            yield finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _statistics(images: Tensor | LazyImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel, bytes counted as 0 to 1.

    A channel that is almost constant has a std of one byte's step, so that it can be divided by.
    """
    if isinstance(images, LazyImages):
        images = images.take(_spread(len(images), STATISTICS_IMAGES))
    chunks = [range(start, min(start + 64, len(images))) for start in range(0, len(images), 64)]
    counted = torch.zeros(images.shape[1], 256, dtype=torch.int64)  # of every channel and byte
    parts = (
        _decode_ahead(images, chunks)
        if isinstance(images, LazyImages)
        else (images[chunk.start : chunk.stop] for chunk in chunks)
    )
    for part in parts:
        for channel, row in enumerate(counted):
            row += torch.bincount(part[:, channel].flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64)
    shares = counted.double() / counted.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt().clamp(min=1)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _spread(count: int, wanted: int) -> Indices:
    """Return `wanted` places evenly over `count`, or all of them."""
    kept = min(count, wanted)
    return np.arange(kept, dtype=np.int64) * count // kept


def subset(split: Split, n: int) -> Split:
    """Return `n` of the split's images, evenly over its order (all of them if there are fewer).

    Folders are ordered by class, so the first `n` would show one class only.
    """
    assert n >= 1, n
    places = _spread(len(split), n)
    images = split.images
    some = images.take(places) if isinstance(images, LazyImages) else split.read(torch.from_numpy(places))
    return replace(split, images=some, labels=split.labels[torch.from_numpy(places)])


def sample_images(split: Split, n: int) -> tuple[Tensor, Tensor]:
    """Return images (n, C, H, W) as uint8 and labels (n,) of `subset(split, n)`."""
    some = subset(split, n)
    return some.read(torch.arange(len(some))), some.labels


# ---- batches


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images / 255 - mean) / std as float32: uint8 (B, C, H, W) -> (B, C, H, W).

    The memory format stays. This is the one definition; an exported network expects it.
    """
    assert images.dtype == torch.uint8, images.dtype
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float64)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64)
    # As rows (C, 1, W) with the strides of images, which is six times as fast as (C, 1, 1).
    width = images.shape[3]
    rows = torch.stack((scale, shift)).float().to(images.device).repeat_interleave(width, 0)
    scale, shift = rows.view(2, width, -1).transpose(1, 2)[:, :, None]
    return images.to(torch.float32).mul_(scale).add_(shift)


def shift_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Cut every image out of itself with a black border, mirrored where asked.

    Images (B, C, H, W) are uint8, channels last in memory; so is what is returned. The border is
    H // 8 wide; `shifts` (B, 2), from 0 to twice the border, say where the cut starts from the top
    and from the left; `flips` (B,) are true where the cut is then mirrored.
    """
    batch, channels, height, width = images.shape
    border = height // 8
    device = images.device
    # (B, H, W, C) -> (B, H + 2 border, W + 2 border, C)
    padded = torch.nn.functional.pad(
        images.permute(0, 2, 3, 1), (0, 0, border, border, border, border)
    ).contiguous()
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    rows = torch.arange(height, device=device) + shifts[:, :1]
    rows = rows + torch.arange(batch, device=device)[:, None] * padded.shape[1]
    pixels = rows[:, :, None] * padded.shape[2] + columns[:, None, :]  # (B, H, W), into all pixels
    cut = padded.view(-1, channels).index_select(0, pixels.view(-1))
    return cut.view(batch, height, width, channels).permute(0, 3, 1, 2)


def batch_count(split: Split, batch_size: int, *, drop_last: bool = False) -> int:
    """Count the batches of an epoch."""
    return len(split) // batch_size if drop_last else -(-len(split) // batch_size)


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    augment: bool = False,
    drop_last: bool = False,
    start: int = 0,
    channels_last: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised float32 images (B, C, H, W) and int64 labels (B,) on the device.

    With a seed (0 or more) the order is shuffled; without, it is the split's. Order and augmentation
    depend on seed and epoch only, and an image's augmentation not on the batch size; torch's and
    numpy's own random numbers are not touched. `start` is the first batch to give: a resumed epoch goes
    on as it would have. `augment` shifts each image by up to an eighth, and mirrors half of them where
    the split allows it.

    Raises DataError at once where there is no whole batch, and for a damaged file when it is met.
    """
    assert batch_size >= 1, batch_size
    assert start >= 0, start
    assert seed is not None or not augment, "augmentation needs a seed"
    count = batch_count(split, batch_size, drop_last=drop_last)
    if count == 0:
        raise DataError(f"{split.name}: {len(split)} images are fewer than one batch of {batch_size}")
    order = torch.arange(len(split))
    draws = None
    if seed is not None:
        state = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
        rng = torch.Generator().manual_seed(state >> 1)
        order = torch.randperm(len(split), generator=rng)
        if augment:
            border = split.images.shape[2] // 8
            shifts = torch.randint(0, 2 * border + 1, (len(split), 2), generator=rng)
            flips = torch.rand(len(split), generator=rng) < (0.5 if split.flip else 0.0)
            draws = shifts, flips
    places = [slice(i * batch_size, min((i + 1) * batch_size, len(split))) for i in range(start, count)]
    return _batches(split, order, draws, places, channels_last, torch.device(device))


def _batches(
    split: Split,
    order: Tensor,
    draws: tuple[Tensor, Tensor] | None,
    places: list[slice],
    channels_last: bool,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for place, images in zip(places, _raw_batches(split, order, places), strict=True):
        images = images.to(device)  # as bytes, a quarter of what floats would take
        if draws is not None:
            shifts, flips = (draw[place].to(device) for draw in draws)
            images = shift_and_flip(images, shifts, flips)
        normal = normalise(images, split.mean, split.std)
        yield normal.contiguous(memory_format=memory_format), split.labels[order[place]].to(device)


def _raw_batches(split: Split, order: Tensor, places: list[slice]) -> Iterator[Tensor]:
    if isinstance(split.images, LazyImages):
        for images in _decode_ahead(split.images, (order[place].tolist() for place in places)):
            yield images.contiguous(memory_format=torch.channels_last)
    else:
        for place in places:
            yield split.read(order[place])
