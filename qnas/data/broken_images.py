"""Which images of a data set are broken: those that do not decode to the end, for whatever reason.

They are left out, up to a share of all, and listed in the run. What fits into memory is decoded at the
start anyway. Of a larger set every image is decoded once before the first step, at the smallest size that
its format has, and what came of it is kept in the user's cache: so splits, batches and a resumed run know
from the start what is left out, and a run does not meet it in its third week. The cache goes by names,
sizes and times of the files.
"""

import csv
import fcntl
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from qnas.common.errors import BrokenImageError, DataError
from qnas.common.files import read_json, write_json
from qnas.common.resources import user_cache
from qnas.data.decoding import UNREADABLE, chunked, decode, in_threads
from qnas.data.image_files import OriginalFile

MAX_BROKEN = 0.01  # share of the images that is left out without a stop
SCHEMA = "qnas.broken/1"
_SHOWN = 3  # in a message


@dataclass(frozen=True)
class BrokenImage:
    """An image that is left out."""

    file: str
    problem: str


Broken = Mapping[int, BrokenImage]  # by place among the images


def check_broken(broken: Broken, images: int, most: float, where: str) -> None:
    """Raise DataError where more than a share `most` of the images is broken."""
    if len(broken) > most * images:
        first = [f"{each.file}: {each.problem}" for _, each in sorted(broken.items())][:_SHOWN]
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise DataError(
            f"{where}: {len(broken)} of {images} images are broken, more than --max-broken {most:g} allows: "
            f"{'; '.join(first)}{more}"
        )


def find_broken(files: Sequence[OriginalFile], most: float, where: str, *, quiet: bool = False) -> Broken:
    """Decode every file, and return the broken ones by place; from the cache where that was done before.

    Raises DataError once they are more than a share `most` of all: what is found up to then is not kept.
    """
    stamp = hashlib.sha256()
    for file in files:
        stamp.update(f"{file.where}\0{file.stamp()}\0".encode(errors="surrogateescape"))
    path = user_cache("broken") / f"{stamp.hexdigest()[:32]}.json"
    with _alone(path):
        broken = _recall(path)
        if broken is None:
            broken = _look(files, most, where, quiet=quiet)
            # a disk or a network that fails now may not tomorrow
            if not any(each.problem.startswith(UNREADABLE) for each in broken.values()):
                _keep(path, broken)
    check_broken(broken, len(files), most, where)
    return broken


def broken_copies(name: str, broken: Sequence[BrokenImage]) -> dict[str, str]:
    """Return a list of broken images as the text of a CSV by its name; nothing where there are none."""
    if not broken:
        return {}
    text = io.StringIO()
    writer = csv.DictWriter(text, ("file", "problem"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(each) for each in broken)
    return {name: text.getvalue()}


def _look(files: Sequence[OriginalFile], most: float, where: str, *, quiet: bool) -> Broken:
    def problem(place: int) -> BrokenImage | None:
        try:
            decode(files[place], 1)
        except BrokenImageError as error:
            return BrokenImage(error.where, error.problem)
        return None

    broken: dict[int, BrokenImage] = {}
    with tqdm(total=len(files), desc="images", unit="", leave=False, disable=quiet or None) as bar:
        for chunk, found in zip(chunked(len(files)), in_threads(problem, chunked(len(files))), strict=True):
            for place, each in zip(chunk, found, strict=True):
                if each is not None:
                    broken[place] = each
            check_broken(broken, len(files), most, where)
            bar.update(len(chunk))
    return broken


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Have one process at a time look at a data set: the others find what it kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("a")
    except OSError:  # nowhere to keep anything: each looks by itself
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _recall(path: Path) -> Broken | None:
    try:
        content = read_json(path, DataError)
        if content.get("schema") != SCHEMA:
            return None
        return {int(place): BrokenImage(**each) for place, each in content["broken"].items()}
    except (DataError, OSError, KeyError, TypeError, ValueError):  # none, or a damaged one
        return None


def _keep(path: Path, broken: Broken) -> None:
    with suppress(OSError):  # a full disk, or none to write to: looked at anew next time
        write_json(path, {"schema": SCHEMA, "broken": {str(i): asdict(each) for i, each in broken.items()}})
