"""Data sets as they lie on disk: which images and labels they hold, before any of it is decoded.

Folders of class folders, the same in a .tar.gz, IDX files, and the digits of scikit-learn. Every
problem of a data set is a DataError that names the file and what was expected.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnas.errors import DataError, nearest

Indices = NDArray[np.int64]

UNPACKED_LIMIT_BYTES = 3_000_000_000  # of an archive or IDX file: what is unpacked lies in memory
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)
FASHION_CLASSES = (
    *("t-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


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


class OriginalFile(NamedTuple):
    """An encoded image: a file, or the content of a member of a tar."""

    name: str  # below the data set's folder, with forward slashes
    where: str  # as messages name it
    content: Path | memoryview

    def size_bytes(self) -> int:
        """Return the size of the encoded image."""
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read(self) -> bytes | memoryview:
        """Return the encoded image."""
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, eq=False)
class Originals:
    """Original images with labels. `parts` names those splits that the data set itself makes."""

    classes: tuple[str, ...]
    images: Tensor | tuple[OriginalFile, ...]
    labels: Indices
    parts: dict[str, Indices]


def _read_digits(path: Path | None) -> Originals:
    from sklearn.datasets import load_digits  # here, as it takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values 0 to 16
    labels = digits.target.astype(np.int64)
    classes = tuple(str(i) for i in range(10))
    return Originals(classes, torch.from_numpy(images)[:, None], labels, {"train": np.arange(len(labels))})


def _read_fashion(path: Path | None) -> Originals:
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
    return Originals(FASHION_CLASSES, torch.cat(images), np.concatenate(labels), parts)


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
            if count == 0 or count > UNPACKED_LIMIT_BYTES:
                raise DataError(f"{path}: header says {count} bytes, expected 1 to {UNPACKED_LIMIT_BYTES}")
            content = file.read(count + 1)  # one more, to see the end and with it gzip's checksum
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged: {one_line(error)}") from error
    if len(content) != count:
        more = "or more " if len(content) > count else ""
        raise DataError(f"{path}: header says {count} bytes, found {len(content)} {more}after it")
    return path, np.frombuffer(bytearray(content), np.uint8).reshape(shape)


def _read_cifar10(path: Path | None) -> Originals:
    assert path is not None
    official = path if path.name == "cifar-10-batches-py" else path / "cifar-10-batches-py"
    if not official.is_dir():
        return _read_tree(path, needs_test=True)
    from torchvision.datasets import CIFAR10

    try:
        # checks the MD5 of every file before it unpickles one
        train, test = (CIFAR10(official.parent, train=train, download=False) for train in (True, False))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{official}: not the official files: {one_line(error)}") from error
    images = np.concatenate([train.data, test.data])  # (60000, 32, 32, 3)
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    parts = {"train": np.arange(len(train.data)), "test": np.arange(len(train.data), len(images))}
    return Originals(tuple(train.classes), torch.from_numpy(images).permute(0, 3, 1, 2), labels, parts)


def _read_folder(path: Path | None) -> Originals:
    assert path is not None
    return _read_tree(path, needs_test=False)


# Folders of images, such as ("train", "cat"), with the images right in them; possibly none.
_Tree = dict[tuple[str, ...], list[OriginalFile]]


def _read_tree(path: Path, *, needs_test: bool) -> Originals:
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
    return Originals(classes, tuple(files), np.array(labels, dtype=np.int64), indices)


def _find_parts(tree: _Tree, path: Path, *, needs_test: bool) -> dict[str, dict[str, list[OriginalFile]]]:
    """Find the splits that the folders make: split -> class -> images."""

    def classes_in(*parents: str) -> dict[str, list[OriginalFile]]:
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
                    files.append(OriginalFile("/".join((*at, entry.name)), str(path), path))

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
                if unzipped.tell() > UNPACKED_LIMIT_BYTES:
                    raise DataError(f"{path}: over {UNPACKED_LIMIT_BYTES} bytes: unpack it, give the folder")
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
                    found = OriginalFile("/".join(at), f"{path}: {member.name}", image)
                    tree.setdefault(at[:-1], []).append(found)
            # tarfile takes a damaged header for the end, after which there must be nothing but zeros
            end = bytes(content[tar.offset :])
            if not end or any(end):
                raise tarfile.ReadError(f"no end, or an unreadable header at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: damaged: {one_line(error)}") from error
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
    read: Callable[[Path | None], Originals]
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
