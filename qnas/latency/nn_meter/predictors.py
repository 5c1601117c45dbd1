"""nn-Meter's published predictors: the list of downloads, the import, and the local store.

nn-Meter (MobiSys 2021, github.com/microsoft/nn-Meter, MIT) publishes a random forest for each kind of
kernel on each device: one ZIP archive per device, with a pickle KERNEL.pkl per kernel. An import reads
them without running anything (`pickles`) and atomically writes one file per device, DEVICE.npz, into the
user's data folder: $QNAS_HOME/predictors, else qnas/predictors in $XDG_DATA_HOME or ~/.local/share.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError

from qnas.common.arrays import DAMAGE, Arrays, open_arrays
from qnas.common.documents import FilePart, describe_problems, to_tuples
from qnas.common.errors import TableError, abbreviate, nearest, one_line
from qnas.common.files import atomic_path
from qnas.common.reading import parse_json
from qnas.common.resources import user_folder
from qnas.latency.nn_meter.archives import Archive, Member, open_archive
from qnas.latency.nn_meter.forests import STORED, Forest
from qnas.latency.nn_meter.pickles import read_forest

SCHEMA = "qnas.predictors/1"
DOWNLOAD = "https://github.com/microsoft/nn-Meter/releases/tag/v1.0-data"
MAX_STORE_BYTES = 8 << 30  # of the arrays that are read; the published forests have 0.4 GB together
MAX_PICKLE_BYTES = 8 << 30  # the published forests of one device have about 2 GB together
_ABOUT = "about"  # the member of the store's file that describes it

# Predictor -> number of its features, in nn-Meter's order (see `nn_meter`).
FEATURE_COUNTS = {
    "conv-bn-relu": 7,
    "dwconv-bn-relu": 7,
    "fc": 4,
    "maxpool": 5,
    "avgpool": 5,
    "global-avgpool": 2,
    "add": 3,
    "addrelu": 3,
    "concat": 6,
    "bn": 2,
    "bnrelu": 2,
    "relu": 2,
    "hswish": 2,
    "se": 2,
    "split": 2,
    "channelshuffle": 2,
}


@dataclass(frozen=True)
class Published:
    """A published set of predictors: the archive's name without .zip, and the kernels it must have."""

    title: str
    kernels: tuple[str, ...]


_VPU = (
    *("conv-bn-relu", "dwconv-bn-relu", "fc", "hswish", "relu", "se", "addrelu"),
    *("maxpool", "avgpool", "bn", "bnrelu", "channelshuffle"),
)
_GPU = (
    *("conv-bn-relu", "dwconv-bn-relu", "hswish", "relu", "se"),
    *("maxpool", "avgpool", "bn", "bnrelu", "concat"),
)
PUBLISHED = {  # as in nn-Meter's own list (its configs/predictors.yaml)
    "cortex-a76": Published("cortexA76cpu_tflite21", (*_VPU, "global-avgpool", "split", "add", "concat")),
    "myriad-vpu": Published("myriadvpu_openvino2019r2", _VPU),
    "adreno-640": Published("adreno640gpu_tflite21", _GPU),
    "adreno-630": Published("adreno630gpu_tflite21", _GPU),
}
ALIASES = {"cpu": "cortex-a76", "vpu": "myriad-vpu"}


def published_name(device: str) -> str:
    """Return the name of a device that predictors are published for. Raises TableError for others."""
    name = ALIASES.get(device, device)
    if name not in PUBLISHED:
        raise TableError(
            f"nn-Meter has no predictors for {device!r}: {nearest(device, [*PUBLISHED, *ALIASES])}"
        )
    return name


def store_folder() -> Path:
    """Return the folder of imported predictors, which may not exist yet."""
    return user_folder("predictors", "XDG_DATA_HOME", ".local/share")


def _path(device: str) -> Path:
    return store_folder() / f"{published_name(device)}.npz"


def download_hint(device: str) -> str:
    """Return the file to download for a device, and the command that imports it."""
    name = published_name(device)
    file = f"{PUBLISHED[name].title}.zip"
    return f"download {file} from {DOWNLOAD} and run: qnas predictors import {file} --device {name}"


# Called while importing with the kernel, the bytes read so far, and the bytes in total.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ForestFacts:
    """The size of a forest."""

    trees: int
    nodes: int


@dataclass(frozen=True)
class Predictors:
    """Facts about imported predictors."""

    device: str
    title: str
    source: str  # the name of the archive or folder
    date: str  # of the import
    forests: dict[str, ForestFacts]
    ignored: tuple[str, ...]  # files of the archive that were not read
    path: Path
    size_bytes: int


def import_predictors(source: Path, device: str, report: Report | None = None) -> Predictors:
    """Read the published predictors of a device from a ZIP archive or folder into the store.

    One forest is in memory at a time. Raises TableError where the archive is not that of the device,
    lacks a kernel, or holds anything but forests with the expected features; predictors that were
    imported before stay in that case.
    """
    name = published_name(device)
    path = _path(name)
    with open_archive(source) as archive:
        _check_titles(archive, source, name)
        chosen = _choose(archive, source, name)
        ignored = tuple(m.name for m in archive.members if m not in chosen.values())
        total, done = sum(member.size for member in chosen.values()), 0
        facts = {}

        def count(kernel: str, size: int) -> None:
            nonlocal done
            done += size
            if report is not None:
                report(kernel, done, total)

        with atomic_path(path) as written, zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as store:
            for kernel, member in chosen.items():
                forest = _read_member(member, kernel, source, partial(count, kernel))
                facts[kernel] = ForestFacts(len(forest.roots), forest.n_nodes)
                for field, array in forest.arrays().items():
                    _write_array(store, f"{kernel}.{field}", array)
            about = {
                "schema": SCHEMA,
                "device": name,
                "title": PUBLISHED[name].title,
                "source": source.name,
                "date": date.today().isoformat(),
                "forests": {kernel: asdict(fact) for kernel, fact in facts.items()},
                "ignored": list(ignored),
            }
            _write_array(store, _ABOUT, np.array(json.dumps(about)))
    return describe_predictors(name)


def _check_titles(archive: Archive, source: Path, device: str) -> None:
    """Refuse the archive of another device: the two Adrenos' have the same kernels."""
    titles = {published.title: name for name, published in PUBLISHED.items()}
    for title in archive.titles:
        if titles.get(title, device) != device:
            raise TableError(
                f"{source}: the predictors of {titles[title]}, not of {device} "
                f"({PUBLISHED[device].title}); import them with `device='{titles[title]}'`"
            )


def _choose(archive: Archive, source: Path, device: str) -> dict[str, Member]:
    members = {member.name: member for member in archive.members}
    chosen = {kernel: members[file] for kernel in FEATURE_COUNTS if (file := f"{kernel}.pkl") in members}
    missing = [kernel for kernel in PUBLISHED[device].kernels if kernel not in chosen]
    if missing:
        raise TableError(
            f"{source}: not the predictors of {device} ({PUBLISHED[device].title}): "
            f"no {', '.join(f'{kernel}.pkl' for kernel in missing)}"
        )
    for kernel, member in chosen.items():
        if member.size > MAX_PICKLE_BYTES:
            raise TableError(
                f"{source}: {kernel}.pkl has {member.size} bytes, expected at most {MAX_PICKLE_BYTES}"
            )
    return chosen


class _CountedStream(io.RawIOBase):
    """A stream whose bytes are counted as they are read, to be buffered in large pieces."""

    def __init__(self, stream: IO[bytes], count: Callable[[int], None]) -> None:
        self._stream, self._count = stream, count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._count(len(content))
        return len(content)


def _read_member(member: Member, kernel: str, source: Path, count: Callable[[int], None]) -> Forest:
    where = f"{source}: {member.name}"
    with member.open() as opened:
        stream = io.BufferedReader(_CountedStream(opened, count), 1 << 20)
        forest = read_forest(stream, where)
    if forest.n_features != FEATURE_COUNTS[kernel]:
        raise TableError(
            f"{where}: a forest with {forest.n_features} features, expected {FEATURE_COUNTS[kernel]}"
        )
    return forest


def _write_array(store: zipfile.ZipFile, name: str, array: np.ndarray[Any, Any]) -> None:
    with store.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def list_predictors() -> tuple[Predictors, ...]:
    """Return the imported predictors of all devices. Raises TableError where a file is damaged."""
    return tuple(describe_predictors(name) for name in PUBLISHED if _path(name).is_file())


class _About(FilePart):
    """What a store says of itself."""

    file_schema: Literal["qnas.predictors/1"] = Field(alias="schema")
    device: str
    title: str
    source: str
    date: str
    forests: dict[str, dict[Literal["trees", "nodes"], Annotated[int, Field(ge=1)]]]
    ignored: Annotated[tuple[str, ...], BeforeValidator(to_tuples)]


def describe_predictors(device: str) -> Predictors:
    """Return facts about a device's predictors. Raises TableError where they are missing or damaged."""
    with _stored(device) as content:
        about = _read_about(content, published_name(device))
        facts = about.model_dump(exclude={"file_schema", "forests"})
        forests = {kernel: ForestFacts(**fact) for kernel, fact in about.forests.items()}
        path = _path(device)
        return Predictors(**facts, forests=forests, path=path, size_bytes=path.stat().st_size)


def _read_about(content: Arrays, device: str) -> _About:
    text = str(content.read(_ABOUT, "U", 0))
    try:
        about = _About.model_validate(parse_json(text, _ABOUT, TableError))
    except ValidationError as error:
        raise TableError(f"{_ABOUT}: {describe_problems(error)}") from error
    if about.device != device:
        raise TableError(f"the predictors of {one_line(about.device, 40)}")
    if unknown := [kernel for kernel in about.forests if kernel not in FEATURE_COUNTS]:
        raise TableError(f"{_ABOUT}: unknown forests {abbreviate(unknown)}")
    if wrong := [kernel for kernel, facts in about.forests.items() if len(facts) != len(fields(ForestFacts))]:
        raise TableError(f"{_ABOUT}: no trees or nodes of {wrong[0]}")
    return about


def load_forests(device: str, kernels: Iterable[str]) -> dict[str, Forest]:
    """Return a device's forests of these kernels. Raises TableError as `describe_predictors`."""
    found = {}
    with _stored(device) as content:
        for kernel in kernels:
            arrays = {
                name: content.read(f"{kernel}.{name}", np.dtype(dtype).kind, dimensions)
                for name, (dtype, dimensions) in STORED.items()
            }
            found[kernel] = forest = Forest.from_arrays(arrays)
            if forest.n_features != FEATURE_COUNTS[kernel]:
                raise ValueError(f"{kernel}: {forest.n_features} features, expected {FEATURE_COUNTS[kernel]}")
    return found


@contextmanager
def _stored(device: str) -> Iterator[Arrays]:
    """Open a device's file, whose arrays are read when they are accessed."""
    name, path = published_name(device), _path(device)
    try:
        with open_arrays(path, MAX_STORE_BYTES) as content:
            yield content
    except FileNotFoundError:
        raise TableError(f"no nn-Meter predictors for {name}: {download_hint(name)}") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    except (TableError, *DAMAGE) as error:
        raise TableError(
            f"{path}: damaged ({one_line(error, 150)}): import the predictors again, "
            f"or run: qnas predictors remove --device {name}"
        ) from error


def is_imported(device: str) -> bool:
    """Whether a device's predictors were imported."""
    return ALIASES.get(device, device) in PUBLISHED and _path(device).is_file()


def remove_predictors(device: str) -> Path:
    """Delete a device's imported predictors and return the file. Raises TableError if there are none."""
    path = _path(device)
    try:
        path.unlink()
    except FileNotFoundError:
        raise TableError(f"no predictors for {published_name(device)} in {path.parent}") from None
    return path
