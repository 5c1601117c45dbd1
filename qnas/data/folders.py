"""Images in folders: one folder per class, also in a .tar.gz, or a CSV with the label of each file.

Every file that is not used is counted (`left_out`), also those that lie deeper than the class folders.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np

from qnas.common.errors import DataError, abbreviate, one_line
from qnas.common.reading import open_regular
from qnas.common.text import shown
from qnas.data import left_out
from qnas.data.image_files import (
    SPLIT_NAMES,
    UNPACKED_LIMIT_BYTES,
    OriginalFile,
    check_exists,
    is_plain,
    readable_suffixes,
    tar_members,
)
from qnas.data.label_table import is_table, read_rows
from qnas.data.labelled_images import (
    LabelledImages,
    assemble,
    check_class_names,
    name_splits,
    number_classes,
)
from qnas.data.left_out import LeftOutFiles, is_hidden

_LEVELS = 2  # of folders that may hold images: SPLIT/CLASS
_TAR_LEVELS = 64  # of folders in a tar, some of which may lie around everything
_COUNTED = 200_000  # limit for the files in deeper folders, which are only counted
# A tar of images is hardly smaller than they are. One that unpacks to more than this is refused early.
_UNPACKED_PER_BYTE = 20
_UNPACKED_ANYWAY = 100_000_000

_Folders = dict[tuple[str, ...], list[OriginalFile]]  # images by folder, such as ("train", "cat")
_Classes = dict[str, list[OriginalFile]]  # images by class


def read_folder(path: Path) -> LabelledImages:
    """Read a CSV, or a folder of images with a CSV or with class folders. Raises DataError."""
    check_exists(path)
    if not path.is_dir():
        return _read_table(path) if _is_csv(path) else read_classes(path, needs_test=False)
    entries = [entry for entry in sorted(path.iterdir()) if not is_hidden(entry.name)]
    csvs = list(filter(_is_csv, entries))
    tables = list(filter(is_table, csvs))
    if len(tables) > 1:
        names = abbreviate([shown(table.name) for table in tables], most=3)
        raise DataError(f"{path}: several CSVs of labels: give one: {names}")
    if len(csvs) == 1 and not any(entry.is_dir() or _is_tar(entry) for entry in entries):
        tables = csvs  # nothing else can be meant: if it is of another form, its error says how
    return _read_table(tables[0]) if tables else read_classes(path, needs_test=False)


def _read_table(path: Path) -> LabelledImages:
    """Read a CSV with the columns `file` (relative to the CSV), `label` and optionally `split`.

    `split` is train, val or test. Without it, files that are all in folders of these names are split so.
    """
    rows = list(read_rows(path))
    words = [row.split for row in rows]
    if not any(words):
        parents = [SPLIT_NAMES.get(PurePosixPath(row.file).parts[0].lower()) for row in rows]
        words = [word for word in parents if word is not None]
        words = words if len(words) == len(rows) else []
    root = path.parent
    images = tuple(OriginalFile(row.file, str(root / row.file), root / row.file) for row in rows)
    found = assemble(images, *number_classes([row.label for row in rows]), words, path)
    return replace(found, left_out=_not_listed(path, images))


def _not_listed(table: Path, images: Iterable[OriginalFile]) -> tuple[left_out.LeftOut, ...]:
    """Count the files beside a CSV, and beside the images that it lists, that it does not list."""
    listed = {os.path.normpath(image.where) for image in images}
    files = LeftOutFiles()
    for folder in sorted({os.path.dirname(file) for file in listed} | {os.path.normpath(table.parent)}):
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    is_used = entry.path in listed or entry.name == table.name or is_hidden(entry.name)
                    if not is_used and not entry.is_dir():
                        name = os.path.relpath(entry.path, table.parent)
                        _leave_out(files, entry, name, left_out.NOT_LISTED)
        except OSError:  # its images are broken, and reported as such
            continue
    return files.found()


# ---- class folders


@dataclass(frozen=True)
class _Layout:
    """The splits of class folders, what people call them, and the folders whose images are used."""

    parts: dict[str, _Classes]
    names: dict[str, str]
    used: frozenset[tuple[str, ...]]


def read_classes(path: Path, *, needs_test: bool) -> LabelledImages:
    """Read class folders from a folder, a .tar.gz, or a folder with a single .tar.gz. Raises DataError."""
    check_exists(path)
    files = LeftOutFiles()
    if path.is_dir():
        folders = _list_folder(path, files)
        tars = [entry for entry in sorted(path.iterdir()) if _is_tar(entry) and entry.is_file()]
        if list(folders) == [()] and len(tars) == 1:
            path = tars.pop()
            for image in folders[()]:
                files.add(left_out.OUTSIDE, image.name)
            folders = _list_tar(path, files)
        for tar in tars:
            files.add(left_out.ARCHIVE, tar.name)
    elif _is_tar(path):
        folders = _list_tar(path, files)
    else:
        raise DataError(f"{path}: expected a folder or a .tar.gz")

    layout = _find_layout(folders, path, needs_test=needs_test)
    classes = _check_classes(layout, folders, path)
    level = max(map(len, layout.used))
    for at in sorted(folders.keys() - layout.used):
        for image in folders[at]:
            files.add(left_out.TOO_DEEP if len(at) > level else left_out.OUTSIDE, image.name)

    images: list[OriginalFile] = []
    labels: list[int] = []
    indices = {}
    for part, found in layout.parts.items():
        start = len(images)
        for label, name in enumerate(classes):
            images += found[name]
            labels += [label] * len(found[name])
        indices[part] = np.arange(start, len(images))
    return LabelledImages(
        classes,
        tuple(images),
        np.array(labels, dtype=np.int64),
        indices,
        left_out=files.found(),
        split_names=layout.names,
    )


def _find_layout(folders: _Folders, path: Path, *, needs_test: bool) -> _Layout:
    """Find the splits of the folders.

    A folder named as a split is one if its images are in folders of their own. Beside folders of images, it
    is a class: bus, car and train are three classes.
    """

    def classes_in(*parents: str) -> _Classes:
        depth = len(parents) + 1
        return {at[-1]: files for at, files in folders.items() if len(at) == depth and at[:-1] == parents}

    top = classes_in()
    if not top:
        raise DataError(f"{path}: no folders of images, expected train/CLASS/* or CLASS/*, or a CSV")
    splits: dict[str, str] = {}  # the folder of each word
    for name, images in sorted(top.items()):
        word, inside = SPLIT_NAMES.get(name.lower()), classes_in(name)
        if word is None or not inside or (images and sum(map(bool, inside.values())) < 2):
            continue
        if word in splits:
            raise DataError(f"{path}: {splits[word]} and {name} are the same split: expected one of them")
        splits[word] = name
    names = name_splits(splits)
    if names and not (needs_test and "test" not in splits):
        parts = {split: classes_in(splits[word]) for word, split in names.items()}
        used = frozenset((splits[word], name) for word, split in names.items() for name in parts[split])
        return _Layout(parts, {split: splits[word] for word, split in names.items()}, used)
    if needs_test or "train" in splits or all(name.lower() in SPLIT_NAMES for name in top):
        lacking = "test" if needs_test else "val or test"
        train = splits.get("train", "train")
        hint = "" if needs_test else f"; or give {path}/{train}, which is then split"
        raise DataError(f"{path}: expected class folders in train and in {lacking}{hint}")
    return _Layout({"train": top}, {}, frozenset((name,) for name in top))


def _check_classes(layout: _Layout, folders: _Folders, path: Path) -> tuple[str, ...]:
    """Return the classes, sorted. Raises DataError if they differ between splits or have no images."""
    classes = tuple(sorted(layout.parts["train"]))
    if len(classes) < 2:
        raise DataError(f"{path}: {len(classes)} class folders, expected at least 2")
    check_class_names(classes, path)
    for part, found in layout.parts.items():
        split = layout.names.get(part, "")
        if set(found) != set(classes):
            differences = {"lacks": set(classes) - set(found), "adds": set(found) - set(classes)}
            listed = [
                f"{verb} {abbreviate([shown(name, 30) for name in sorted(names)], most=3)}"
                for verb, names in differences.items()
                if names
            ]
            train = layout.names["train"]
            raise DataError(f"{path}: classes of {split} differ from those of {train}: {'; '.join(listed)}")
        for name, images in found.items():
            if not images:
                at = (split, name) if split else (name,)
                deeper = sum(len(found) for folder, found in folders.items() if folder[: len(at)] == at)
                of = f" of {split}" if split else ""
                hint = f": {deeper} lie deeper" if deeper else ""
                raise DataError(f"{path}: class folder '{shown(name)}'{of} has no images{hint}")
    return classes


# ---- listing


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv")


def _is_tar(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tgz"))


def _leave_out(files: LeftOutFiles, entry: "os.DirEntry[str]", name: str, image: str) -> None:
    """Count a file of a folder that is not used; `image` is the reason if it is an image."""
    suffix = PurePosixPath(entry.name).suffix.lower()
    if not entry.is_file():
        files.add(left_out.DANGLING if entry.is_symlink() else left_out.NOT_REGULAR, name)
    elif suffix in readable_suffixes():
        files.add(image, name)
    elif suffix in (".csv", ".tsv"):
        files.add(left_out.UNUSED_TABLE, name)
    else:
        files.add_other(suffix, name)


def _list_folder(root: Path, files: LeftOutFiles) -> _Folders:
    """List folders down to the second level with their images, sorted and without hidden ones.

    Other files are counted, also in deeper folders, but not through links to folders: they may lead anywhere.
    Archives of the first level are not counted.
    """
    folders: _Folders = {}
    # folders with their place, and whether a link leads there
    todo: list[tuple[tuple[str, ...], Path, bool]] = [((), root, False)]
    deep_files = 0
    while todo:
        at, folder, linked = todo.pop()
        is_deep = len(at) > _LEVELS
        try:
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda e: e.name)
        except OSError as error:
            if not is_deep:
                raise DataError(f"{error.filename or root}: cannot be read: {error.strerror}") from error
            files.add(left_out.UNREADABLE, "/".join(at))
            continue
        deep_files += len(entries) * is_deep
        if deep_files > _COUNTED:
            files.add(left_out.UNCOUNTED, "/".join(at))
            continue
        images = [] if is_deep else folders.setdefault(at, [])
        for entry in entries:
            name, path = "/".join((*at, entry.name)), Path(entry.path)
            if is_hidden(entry.name):
                continue
            try:
                if not at and _is_tar(path) and entry.is_file():
                    continue
                if entry.is_dir():
                    if len(at) < _LEVELS or not (linked or entry.is_symlink()):
                        todo.append(((*at, entry.name), path, linked or entry.is_symlink()))
                    else:
                        files.add(left_out.DEEP_LINK, name)
                elif not is_deep and entry.is_file() and path.suffix.lower() in readable_suffixes():
                    images.append(OriginalFile(name, str(path), path))
                else:
                    _leave_out(files, entry, name, left_out.TOO_DEEP)
            except OSError:  # such as a link to itself
                files.add(left_out.UNREADABLE, name)
    return folders


def _list_tar(path: Path, files: LeftOutFiles) -> _Folders:
    """Read a .tar.gz into memory and list its images. Nothing is written, and links are not followed.

    A single folder around everything is removed. Raises DataError for a damaged or too large tar.
    """
    folders: _Folders = {}
    try:
        unpacked = _unpack(path)
        content = unpacked.getbuffer()  # images are views of it
        for member in tar_members(unpacked):
            at = PurePosixPath(member.name).parts
            suffix = PurePosixPath(member.name).suffix.lower()
            if ".." in at or member.name.startswith("/"):
                files.add(left_out.ELSEWHERE, member.name)
            elif any(map(is_hidden, at)) or not at:
                continue
            elif len(member.name) > left_out.PATH_CHARACTERS or len(at) > _TAR_LEVELS:
                files.add(left_out.TOO_DEEP, member.name)
            elif member.isdir():
                folders.setdefault(at, [])
            elif not is_plain(member):
                files.add(left_out.OF_TAR, member.name)
            elif suffix in readable_suffixes():
                image = content[member.offset_data : member.offset_data + member.size]
                found = OriginalFile("/".join(at), f"{path}: {member.name}", image)
                folders.setdefault(at[:-1], []).append(found)
            else:
                files.add_other(suffix, "/".join(at))
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: damaged: {one_line(error)}") from error
    for at in list(folders):  # add the parents of the listed folders
        for depth in range(len(at)):
            folders.setdefault(at[:depth], [])
    while len(top := {at[0] for at in folders if at}) == 1 and not folders[()]:
        prefix = len(top.pop()) + 1
        folders = {
            at[1:]: [f._replace(name=f.name[prefix:]) for f in images] for at, images in folders.items() if at
        }
    return {at: sorted(folders[at], key=lambda file: file.name) for at in sorted(folders)}


def _unpack(path: Path) -> BytesIO:
    """Return the content of a gzip file. Raises DataError if it is too large, OSError if it is damaged."""
    unpacked = BytesIO()
    with open_regular(path) as packed, gzip.GzipFile(fileobj=packed) as file:
        size = os.fstat(packed.fileno()).st_size
        most = min(UNPACKED_LIMIT_BYTES, _UNPACKED_ANYWAY + _UNPACKED_PER_BYTE * size)
        while chunk := file.read(1 << 22):
            unpacked.write(chunk)
            if unpacked.tell() > most:
                raise DataError(f"{path}: over {most} bytes: unpack it to a folder")
    unpacked.seek(0)
    return unpacked
