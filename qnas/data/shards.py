"""Images in tar shards in the format of WebDataset, read in place without unpacking.

    imagenet-train-000000.tar, ..., imagenet-val-000000.tar    or train/000000.tar, val/..., or without splits
    KEY.jpg, KEY.cls, KEY2.png, KEY2.cls, ...                  members of a shard: images and their classes
    classes.txt                                                beside the shards: one class per line; optional

A `.cls` holds the number of a class, from 0, or its name. Other members (.json, .txt) are left out.

The headers of a shard are read once and cached until the shard changes. Each image is then a range of bytes
in its shard, so an epoch shuffles the whole set, and splits, resumed runs and several processes work as with
folders. The package webdataset reads shards from end to end instead, which is faster on rotating disks and
over a network, but it shuffles in a buffer and cannot resume exactly.
"""

import hashlib
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from pydantic import NonNegativeInt, TypeAdapter
from tqdm import tqdm

from qnas.common.errors import DataError, one_line
from qnas.common.reading import open_regular, read_text
from qnas.common.resources import user_cache
from qnas.common.text import shown
from qnas.data import image_files, left_out
from qnas.data.file_cache import keep, one_at_a_time, recall
from qnas.data.image_files import Labels, OriginalFile
from qnas.data.labelled_images import CLASS_CHARACTERS, LabelledImages, assemble, number_classes
from qnas.data.left_out import LeftOut, LeftOutFiles

SCHEMA = "qnas.shards/2"
CLASSES = "classes.txt"
_LABEL = "cls"
_LABEL_BYTES = 1000  # limit for a number or a name
_KEY_CHARACTERS = 1000  # limit for the name of a member
_WORD = re.compile(r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])")


@dataclass(frozen=True, eq=False)
class ShardImages(Sequence[OriginalFile]):
    """The images of shards; only their positions and names are in memory."""

    shards: tuple[Path, ...]
    shard: "array[int]"  # index of each image's shard
    start: "array[int]"
    size: "array[int]"
    names: bytes  # concatenated, in UTF-8
    name_ends: "array[int]"

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, place: Any) -> Any:
        """Return an image as an `OriginalFile`, a range of bytes in its shard."""
        assert not isinstance(place, slice), place
        path = self.shards[self.shard[place]]
        begin = self.name_ends[place - 1] if place > 0 else 0
        name = self.names[begin : self.name_ends[place]].decode()
        where = image_files.Stretch(path, self.start[place], self.size[place])
        return OriginalFile(f"{path.name}/{name}", f"{path}: {name}", where)


class _Header(NamedTuple):
    """An image of a shard: its label, and the name, start and size of its member."""

    name: str
    start: NonNegativeInt
    size: NonNegativeInt
    label: str


class _Listed(NamedTuple):
    """The images of a shard, and its members that are left out."""

    images: list[_Header]
    left_out: list[LeftOut]


_KEPT = TypeAdapter(_Listed)  # what is cached of a shard


def read_shards(path: Path) -> LabelledImages:
    """List the images of a folder of shards. Raises DataError for a damaged shard or another format."""
    image_files.check_exists(path)
    shards, words, files = _find_shards(path)
    which, start, size, ends = array("i"), array("q"), array("q"), array("q")
    names = bytearray()
    labels: list[str] = []
    label_of: dict[str, str] = {}  # one string per class instead of one per image
    cache = user_cache("shards")
    with one_at_a_time(cache / f"{_hash(path)}.json"):
        for number, shard in enumerate(tqdm(shards, desc="shards", unit="", leave=False, disable=None)):
            kept_at, stamp = cache / f"{_hash(shard)}.json", image_files.file_stamp(shard)
            listed = recall(kept_at, SCHEMA, stamp, _KEPT)
            if listed is None:
                listed = _list_shard(shard)
                keep(kept_at, SCHEMA, stamp, [listed.images, [asdict(each) for each in listed.left_out]])
            files.extend(listed.left_out)
            for image in listed.images:
                which.append(number)
                start.append(image.start)
                size.append(image.size)
                names += image.name.encode(errors="replace")
                ends.append(len(names))
                labels.append(label_of.setdefault(image.label, image.label))
    if not labels:
        raise DataError(f"{path}: no images in its shards, expected KEY.jpg (or .png, ...) and KEY.cls")
    images = ShardImages(tuple(shards), which, start, size, bytes(names), ends)
    classes, numbers = _name_classes(labels, path / CLASSES)
    each = [words[number] for number in which] if words else []
    return replace(assemble(images, classes, numbers, each, path), left_out=files.found())


def _hash(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]


def _find_shards(folder: Path) -> tuple[list[Path], list[str], LeftOutFiles]:
    """Return the sorted shards of a folder, the split name of each or no names at all, and other files."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of .tar shards")
    places = [folder, *(folder / word for word in image_files.SPLIT_WORDS)]
    shards: list[Path] = []
    files = LeftOutFiles()
    for place in places:
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            name = str(entry.relative_to(folder))
            if entry.is_dir() or left_out.is_hidden(entry.name) or name == CLASSES:
                continue
            if entry.suffix == ".tar" and entry.is_file():
                shards.append(entry)
            elif entry.is_file():
                files.add_other(entry.suffix.lower(), name)
            else:
                files.add(left_out.DANGLING if entry.is_symlink() else left_out.NOT_REGULAR, name)
    if not shards:
        packed = [*folder.glob("*.tar.gz"), *folder.glob("*.tgz")]
        hint = ": unpack .tar.gz shards to .tar, to be read in place" if packed else ""
        raise DataError(f"{folder}: no .tar shards{hint}")
    found = [_WORD.findall(str(shard.relative_to(folder)).lower()) for shard in shards]
    if not any(found):
        return shards, [], files
    for shard, words in zip(shards, found, strict=True):
        if len(set(words)) != 1:
            raise DataError(
                f"{shard}: expected one of train, val and test in its name, as in those of other shards"
            )
    return shards, [words[0] for words in found], files


def _name_classes(labels: Sequence[str], path: Path) -> tuple[tuple[str, ...], Labels]:
    """Return the classes, from classes.txt or else from the labels, and the class number of each label."""
    if not path.exists():
        return number_classes(labels)
    lines = read_text(path, DataError, "one class on each line").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    found = set(labels)
    are_numbers = all(label.isdecimal() for label in found)
    known = {name: i for i, name in enumerate(names)}
    numbers = {label: int(label) if are_numbers else known.get(label, -1) for label in found}
    for label, number in numbers.items():
        if not 0 <= number < len(names):
            name = shown(label)
            raise DataError(f"{path}: has {len(names)} classes, and not the class '{name}' of a shard")
    return tuple(names), np.array([numbers[label] for label in labels], dtype=np.int64)


def _list_shard(shard: Path) -> _Listed:
    """List the images of a shard with their labels. Raises DataError."""
    files = LeftOutFiles()
    images = [
        _Header(image.name, image.offset_data, image.size, label)
        for image, label in _list_samples(shard, files)
    ]
    return _Listed(images, list(files.found()))


def _list_samples(shard: Path, files: LeftOutFiles) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the images of a shard with their labels, and count other members. Raises DataError."""
    try:
        with open_regular(shard) as file:
            listed = (m for m in image_files.tar_members(file) if _is_listed(m, shard, files))
            for key, members in groupby(listed, lambda member: str(PurePosixPath(*_parts(member)[:2]))):
                image = label = None
                for member in members:
                    suffix = f".{_parts(member)[2]}"
                    if suffix in image_files.readable_suffixes():
                        if image is not None:
                            raise DataError(f"{shard}: {shown(key)} has two images")
                        image = member
                    elif suffix == f".{_LABEL}":
                        label = _read_label(file, member, f"{shard}: {shown(member.name)}")
                    else:
                        files.add_other(suffix, f"{shard.name}/{member.name}")
                if image is not None and label is not None:
                    yield image, label
                elif image is not None or label is not None:
                    lacking = f".{_LABEL}" if label is None else "image"
                    raise DataError(f"{shard}: {shown(key)} has no {lacking} right beside it")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{shard}: damaged: {one_line(error)}") from error


def _is_listed(member: tarfile.TarInfo, shard: Path, files: LeftOutFiles) -> bool:
    """Whether a member is a file with a key; links and others are counted, hidden files and folders not."""
    if member.isdir() or not _parts(member)[1]:
        return False
    if len(member.name) > _KEY_CHARACTERS:
        raise DataError(f"{shard}: a member with a name of {len(member.name)} characters")
    if not image_files.is_plain(member):
        files.add(left_out.OF_TAR, f"{shard.name}/{member.name}")
        return False
    return True


def _parts(member: tarfile.TarInfo) -> tuple[PurePosixPath, str, str]:
    """Return a member's folder, its stem (empty for a hidden file) and its suffix in lower case."""
    path = PurePosixPath(member.name)
    stem, _, suffix = path.name.partition(".")
    return path.parent, stem, suffix.lower()


def _read_label(file: BinaryIO, member: tarfile.TarInfo, where: str) -> str:
    if member.size > _LABEL_BYTES:
        raise DataError(f"{where}: {member.size} bytes, expected the number or name of a class")
    file.seek(member.offset_data)
    label = file.read(member.size).decode().strip()
    if not label:
        raise DataError(f"{where}: empty, expected the number or name of a class")
    if len(label) > CLASS_CHARACTERS:
        raise DataError(f"{where}: a class of {len(label)} characters, expected at most {CLASS_CHARACTERS}")
    return label
