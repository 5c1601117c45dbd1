"""Images in folders: one folder per class, also in a .tar.gz, or a CSV with the label of each file."""

import csv
import gzip
import os
import tarfile
import zlib
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np

from qnas.common.errors import DataError, one_line
from qnas.data.image_files import (
    SPLIT_WORDS,
    UNPACKED_LIMIT_BYTES,
    OriginalFile,
    check_exists,
    readable_suffixes,
    tar_members,
)
from qnas.data.labelled_images import LabelledImages, assemble, name_splits, number_classes

_COLUMNS = ("file", "label")  # of a CSV; `split` is optional


def read_folder(path: Path) -> LabelledImages:
    """Read a CSV, or a folder of images with a CSV or with class folders. Raises DataError."""
    check_exists(path)
    if path.suffix == ".csv":
        return _read_table(path)
    tables = [entry for entry in sorted(path.glob("*.csv")) if _is_table(entry)] if path.is_dir() else []
    if len(tables) > 1:
        raise DataError(f"{path}: several CSVs of labels: give one: {', '.join(map(str, tables))}")
    return _read_table(tables[0]) if tables else read_classes(path, needs_test=False)


# ---- a CSV


def _is_table(path: Path) -> bool:
    """Whether a CSV lists files and labels. A folder may hold other CSVs too."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return set(_COLUMNS) <= set(_columns(csv.DictReader(file)))
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def _columns(reader: "csv.DictReader[str]") -> list[str]:
    return [name.strip().lower() for name in reader.fieldnames or []]


def _read_table(path: Path) -> LabelledImages:
    """Read a CSV with the columns `file` (relative to the CSV), `label` and optionally `split`.

    `split` is train, val or test. Without it, files that are all in folders of these names are split so.
    """
    files: dict[str, int] = {}  # line number by file name
    labels: list[str] = []
    words: list[str] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text, strict=True)
            reader.fieldnames = _columns(reader)
            if missing := [name for name in _COLUMNS if name not in reader.fieldnames]:
                raise DataError(
                    f"{path}: lacks the column {' and '.join(missing)}: expected file,label[,split]"
                )
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                name, label = ((row[column] or "").strip() for column in _COLUMNS)
                if not name or not label:
                    raise DataError(f"{where}: no {'label' if name else 'file'}")
                if name in files:
                    raise DataError(f"{where}: {name} is in line {files[name]} too")
                files[name] = reader.line_num
                labels.append(label)
                words.append(_split_word(row["split"] or "", where) if "split" in row else "")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV in UTF-8: {one_line(error)}") from error
    if not any(words):
        parents = [PurePosixPath(name).parts[0] for name in files]
        words = parents if set(parents) <= set(SPLIT_WORDS) else []
    root = path.parent
    images = tuple(OriginalFile(name, str(root / name), root / name) for name in files)
    return assemble(images, *number_classes(labels), words, path)


def _split_word(text: str, where: str) -> str:
    word = {"valid": "val", "validation": "val"}.get(text.strip().lower(), text.strip().lower())
    if word not in SPLIT_WORDS:
        raise DataError(f"{where}: split {text!r}: expected {', '.join(SPLIT_WORDS)}")
    return word


# ---- class folders

# Images by folder, such as ("train", "cat"), without those in subfolders; possibly none.
_Tree = dict[tuple[str, ...], list[OriginalFile]]


def read_classes(path: Path, *, needs_test: bool) -> LabelledImages:
    """Read class folders from a folder, a .tar.gz, or a folder with a single .tar.gz."""
    check_exists(path)
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
    return LabelledImages(classes, tuple(files), np.array(labels, dtype=np.int64), indices)


def _find_parts(tree: _Tree, path: Path, *, needs_test: bool) -> dict[str, dict[str, list[OriginalFile]]]:
    """Return the splits of the folders: split -> class -> images."""

    def classes_in(*parents: str) -> dict[str, list[OriginalFile]]:
        depth = len(parents) + 1
        return {at[-1]: files for at, files in tree.items() if len(at) == depth and at[:-1] == parents}

    top = classes_in()
    if not top:
        raise DataError(f"{path}: no folders of images, expected train/CLASS/* or CLASS/*, or a CSV")
    words = [word for word in SPLIT_WORDS if classes_in(word)]
    splits = name_splits(words)
    if splits and not (needs_test and "test" not in words):
        return {split: classes_in(word) for word, split in splits.items()}
    if "train" in top or needs_test:
        lacking = "test" if needs_test else "val or test"
        hint = "" if needs_test else f"; or give {path}/train, which is then split"
        raise DataError(f"{path}: expected class folders in train and in {lacking}{hint}")
    return {"train": top}


def _is_tar(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tgz"))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _list_folder(root: Path) -> _Tree:
    """List folders down to the second level with their images, sorted and without hidden ones."""
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
                elif path.suffix.lower() in readable_suffixes():
                    files.append(OriginalFile("/".join((*at, entry.name)), str(path), path))

    try:
        visit(root, ())
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read: {error.strerror}") from error
    return tree


def _list_tar(path: Path) -> _Tree:
    """Read a .tar.gz into memory and list its images. Nothing is written, and links are ignored.

    A single folder around everything is removed. Raises DataError for a damaged or too large tar.
    """
    tree: _Tree = {}
    try:
        unzipped = BytesIO()
        with gzip.open(path) as file:
            while chunk := file.read(1 << 22):
                unzipped.write(chunk)
                if unzipped.tell() > UNPACKED_LIMIT_BYTES:
                    raise DataError(f"{path}: over {UNPACKED_LIMIT_BYTES} bytes: unpack it to a folder")
        unzipped.seek(0)
        content = unzipped.getbuffer()  # images are views of it
        for member in tar_members(unzipped):
            at = PurePosixPath(member.name).parts
            if any(_is_hidden(part) for part in at):
                continue
            if member.isdir():
                tree.setdefault(at, [])
            elif PurePosixPath(member.name).suffix.lower() in readable_suffixes():
                image = content[member.offset_data : member.offset_data + member.size]
                found = OriginalFile("/".join(at), f"{path}: {member.name}", image)
                tree.setdefault(at[:-1], []).append(found)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: damaged: {one_line(error)}") from error
    for at in list(tree):  # add the parents of the listed folders
        for depth in range(len(at)):
            tree.setdefault(at[:depth], [])
    while len(top := {at[0] for at in tree if at}) == 1 and not tree[()]:
        prefix = len(top.pop()) + 1
        tree = {at[1:]: [f._replace(name=f.name[prefix:]) for f in files] for at, files in tree.items() if at}
    return {at: sorted(tree[at], key=lambda file: file.name) for at in sorted(tree)}
