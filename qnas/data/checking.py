"""A check of a data set before hours are spent on it: `DataReport`.

Every image is decoded once, at its full size, by the decoder of the training. The report counts what the data
set holds and what is wrong with it. Problems would make a training fail or its result wrong:

- more than a share `max_broken` of the images cannot be decoded;
- the splits cannot be made, such as of a class with too few images;
- more than SHARE of the test images are also training or held-out images, pixel for pixel;
- more than SHARE of all images are also in another class, pixel for pixel.

Anything else that is doubtful is a warning.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from qnas.common.errors import DataError, abbreviate
from qnas.common.text import escaped, shown
from qnas.data.broken_images import MAX_BROKEN, read_each
from qnas.data.decoding import expecting_whole, pixel_digest
from qnas.data.image_files import SPLIT_NAMES, ImageNumbers, OriginalFile
from qnas.data.labelled_images import LabelledImages
from qnas.data.left_out import LeftOut, summary
from qnas.data.splits import SPLITS, complete_splits
from qnas.data.twins import Images, Look, Twins, find_equal, find_near, look_at

SCHEMA = "qnas.data-check/1"
SHARE = 0.01  # of images that are twice in the data set, above which it is a problem
IMBALANCED = 10  # times as many images in the largest class as in the smallest
PICTURED = 1000  # classes with an example
PICTURE_PX = 96
_HELDOUT = 0.2  # share of the training images that a search holds out by default
_FIRST = 10  # files named in the report
_ORIENTATION = 0x0112  # the tag of EXIF
_UPRIGHT = 1

OnDigest = Callable[[str, str], object]  # is called with the digest and the name of an image


@dataclass(frozen=True)
class Spread:
    """The smallest, the median and the largest of some numbers."""

    least: int
    median: int
    most: int


@dataclass(frozen=True)
class Duplicates:
    """Images that are another one, counted; `examples` are pairs of names, the worst first.

    `across` counts the images of a split that are also in an earlier one, such as {"val in train": 3}.
    """

    images: int
    of_another_class: int
    across: Mapping[str, int]
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DataReport:
    """What a data set holds and what is wrong with it; see the module. Names are escaped for display.

    `splits` counts the images of the data set's own splits by their names there, `used` those of a search's
    splits, both with their broken images. `classes` has the images of each class by split, without the
    broken ones. `pictures` has an example of each class, uint8 (C, H, W).
    """

    data: str
    images: int
    splits: Mapping[str, int]
    used: Mapping[str, int]
    classes: Mapping[str, Mapping[str, int]]
    imbalance: float  # images of the largest class for one of the smallest
    largest_share: float  # of the largest class
    width_px: Spread
    height_px: Spread
    modes: Mapping[str, int]
    turned: int  # by an EXIF orientation
    broken: tuple[Mapping[str, str], ...]
    left_out: tuple[LeftOut, ...]
    exact: Duplicates
    near: Duplicates
    plain: int  # images without any content to compare
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    pictures: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    def document(self) -> dict[str, Any]:
        """Return the report as a JSON object, without the pictures."""
        content = {key: value for key, value in vars(self).items() if key not in ("pictures", "broken")}
        for key in ("width_px", "height_px", "exact", "near"):
            content[key] = asdict(content[key])
        content["classes"] = [{"name": name, "images": dict(n)} for name, n in self.classes.items()]
        content["left_out"] = [
            {"reason": each.reason, "files": each.files, "first": list(each.first[:_FIRST])}
            for each in self.left_out
        ]
        content["broken"] = {"images": len(self.broken), "first": list(self.broken[:_FIRST])}
        return {"schema": SCHEMA, **content}


class _Seen(NamedTuple):
    """What is kept of an image after its decoding."""

    digest: str
    look: Look
    height: int
    width: int
    mode: str
    turned: bool


def check_images(
    source: LabelledImages,
    *,
    max_broken: float = MAX_BROKEN,
    on_digest: OnDigest | None = None,
    quiet: bool = False,
) -> DataReport:
    """Decode every image of a data set once and report on it.

    `on_digest` is called with the digest of each image's pixels, in the order of the data set. Raises
    DataError if no image can be decoded, or if a file cannot be read for another reason than its content.
    """
    own = _own_splits(source)
    used, cannot_split = _used_splits(source)
    numbers = np.sort(np.concatenate(list(used.values()))).tolist()
    split_of = np.zeros(len(source), np.int8)
    for place, split in enumerate(SPLITS):
        split_of[used.get(split, [])] = place
    images = Images.to_fill(source.targets, split_of)
    facts: dict[int, tuple[int, int]] = {}
    modes: Counter[str] = Counter()
    turned = 0

    def keep(place: int, seen: _Seen) -> None:
        nonlocal turned
        number = numbers[place]
        images.fill(number, bytes.fromhex(seen.digest), seen.look)
        facts[number] = seen.height, seen.width
        modes[seen.mode] += 1
        turned += seen.turned
        if on_digest is not None:
            on_digest(seen.digest, image_name(source, number))

    found = read_each(
        lambda place: _see(source, numbers[place]), keep, numbers, 1, source.source, quiet=quiet
    )
    broken = {**source.broken, **found}
    whole = np.array([number for number in numbers if number not in broken], dtype=np.int64)
    if not len(whole):
        first = next(iter(broken.values()))
        raise DataError(f"{source.source}: none of its images can be decoded: {shown(first, 200)}")
    compared = images.take(whole)
    exact = find_equal(compared)
    near, plain = find_near(compared, quiet=quiet)
    sizes = np.array([facts[number] for number in whole.tolist()])
    classes = _count_classes(source, own, whole)
    totals = np.array([sum(counts.values()) for counts in classes.values()])
    report = DataReport(
        data=shown(source.source, 4096),
        images=len(numbers),
        splits={name: len(each) for name, each in own.items()},
        used={_called(source, split): len(used[split]) for split in SPLITS if split in used},
        classes=classes,
        imbalance=float(totals.max() / max(totals.min(), 1)),
        largest_share=float(totals.max() / totals.sum()),
        width_px=_spread(sizes[:, 1]),
        height_px=_spread(sizes[:, 0]),
        modes=dict(modes.most_common()),
        turned=turned,
        broken=tuple(
            {"file": escaped(each.file), "problem": escaped(each.problem)}
            for _, each in sorted(broken.items())
        ),
        left_out=source.left_out,
        exact=_describe(exact, compared, source, whole),
        near=_describe(near, compared, source, whole),
        plain=plain,
        problems=(),
        warnings=(),
        pictures=_pictures(source, whole),
    )
    tests = int((compared.splits == SPLITS.index("test")).sum())
    leaked = int(exact.within[compared.splits == SPLITS.index("test")][:, :2].any(1).sum())
    problems = [*cannot_split, *_problems(report, max_broken, leaked, tests, _called(source, "test"))]
    warnings = _warnings(source, report, any_problem=bool(problems))
    return DataReport(**{**vars(report), "problems": tuple(problems), "warnings": tuple(warnings)})


def image_name(source: LabelledImages, number: int) -> str:
    """Return the name of an image in lists: SPLIT/CLASS/FILE, escaped.

    FILE is the name in its folder, or as a CSV or a shard has it; in a data set without files the number.
    """
    original = source.images[number]
    name = original.name if isinstance(original, OriginalFile) else str(number)
    kind = source.classes[int(source.targets[number])]
    folder = PurePosixPath(name).parts[:-1]
    if folder and folder[-1] == kind:
        name = PurePosixPath(name).name
    own = [split for split, numbers in _own_splits(source).items() if _is_in(number, numbers)]
    return "/".join(shown(part, 4096) for part in (*own, kind, name))


def _is_in(number: int, numbers: ImageNumbers) -> bool:
    """Whether a number is among sorted ones."""
    place = int(np.searchsorted(numbers, number))
    return place < len(numbers) and int(numbers[place]) == number


def _called(source: LabelledImages, split: str) -> str:
    return shown(source.split_names.get(split, split))


def _own_splits(source: LabelledImages) -> dict[str, ImageNumbers]:
    """Return the images of the data set's own splits by their names there; all of them if it has none."""
    if len(source.splits) == 1:
        return {"all": source.splits["train"]}
    return {_called(source, split): numbers for split, numbers in source.splits.items()}


def _used_splits(source: LabelledImages) -> tuple[dict[str, ImageNumbers], list[str]]:
    """Return the images of a search's splits, and why they cannot be made, if they cannot."""
    try:
        return complete_splits(source, _HELDOUT), []
    except DataError as error:
        return dict(source.splits), [str(error)]


def _see(source: LabelledImages, number: int) -> _Seen:
    """Decode an image and look at it. Raises BrokenImageError."""
    pixels, _ = source[number]
    original = source.images[number]
    mode, turned = {1: "L", 3: "RGB"}.get(len(pixels), f"{len(pixels)} channels"), False
    if isinstance(original, OriginalFile):
        with expecting_whole(original.where), Image.open(BytesIO(original.read())) as header:
            mode, turned = header.mode, header.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT
    _, height, width = pixels.shape
    return _Seen(pixel_digest(pixels), look_at(pixels), height, width, mode, turned)


def _count_classes(
    source: LabelledImages, own: Mapping[str, ImageNumbers], whole: ImageNumbers
) -> dict[str, dict[str, int]]:
    counts = {
        split: np.bincount(source.targets[np.intersect1d(numbers, whole)], minlength=len(source.classes))
        for split, numbers in own.items()
    }
    named: dict[str, dict[str, int]] = {}
    for number, name in enumerate(source.classes):
        key = shown(name, 500)
        while key in named:  # classes.txt may have two of one name
            key += f" ({number})"
        named[key] = {split: int(each[number]) for split, each in counts.items()}
    return named


def _spread(values: NDArray[np.int64]) -> Spread:
    return Spread(int(values.min()), int(np.median(values)), int(values.max()))


def _describe(twins: Twins, images: Images, source: LabelledImages, whole: ImageNumbers) -> Duplicates:
    across = {}
    for later in range(1, len(SPLITS)):
        for earlier in range(later):
            count = int(twins.within[images.splits == later][:, earlier].sum())
            if count:
                across[f"{_called(source, SPLITS[later])} in {_called(source, SPLITS[earlier])}"] = count
    names = [tuple(image_name(source, int(whole[place])) for place in pair) for pair in twins.pairs]
    return Duplicates(
        int(twins.images.sum()),
        int(twins.other_class.sum()),
        across,
        tuple((first, second) for first, second in names),
    )


def _pictures(source: LabelledImages, whole: ImageNumbers) -> dict[str, NDArray[np.uint8]]:
    """Return the first image of each class that can be decoded, at most PICTURE_PX wide and high."""
    numbers = whole[np.sort(np.unique(source.targets[whole], return_index=True)[1])][:PICTURED]
    pictures = {}
    for number in sorted(numbers.tolist(), key=lambda n: int(source.targets[n])):
        pixels, _ = source[number]
        height, width = pixels.shape[-2:]
        scale = min(1, PICTURE_PX / max(height, width))
        if scale < 1:
            size = [max(round(height * scale), 1), max(round(width * scale), 1)]
            pixels = tv.resize(pixels, size, antialias=True)
        pictures[shown(source.classes[int(source.targets[number])])] = pixels.contiguous().numpy()
    return pictures


def _problems(report: DataReport, max_broken: float, leaked: int, tests: int, test: str) -> list[str]:
    problems = []
    if len(report.broken) > max_broken * report.images:
        problems.append(
            f"{len(report.broken)} of {report.images} images are broken, more than "
            f"`max_broken={max_broken:g}` allows"
        )
    if leaked > SHARE * tests:
        problems.append(f"{leaked} of {tests} {test} images are also images for training, pixel for pixel")
    if report.exact.of_another_class > SHARE * report.images:
        count = report.exact.of_another_class
        problems.append(f"{count} of {report.images} images are also in another class, pixel for pixel")
    return problems


def _warnings(source: LabelledImages, report: DataReport, *, any_problem: bool) -> list[str]:
    warnings = []
    if report.broken and not any_problem:
        count = len(report.broken)
        warnings.append(f"{count} broken image{'s' * (count > 1)} will be left out")
    if report.left_out:
        warnings.append(summary(report.left_out))
    for found, how in ((report.exact, "pixel for pixel"), (report.near, "nearly")):
        if found.across:
            listed = ", ".join(f"{count} {split}" for split, count in found.across.items())
            warnings.append(f"images that are {how} in two splits: {listed}")
        if found.of_another_class:
            warnings.append(f"{found.of_another_class} images are {how} in another class too")
    if report.imbalance >= IMBALANCED:
        warnings.append(f"the largest class has {report.imbalance:.0f} times the images of the smallest")
    sizes = report.width_px.least, report.height_px.least
    if min(sizes) < 8:
        warnings.append(f"the smallest image is {min(sizes)} px wide or high")
    return [*warnings, *_name_warnings(source.classes)]


def _name_warnings(classes: Sequence[str]) -> list[str]:
    """Warn of names of classes that people or programs may take for each other, or cannot read."""
    warnings = []
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        key = "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isprintable())
        alike[" ".join(key.split())].append(name)
    for names in alike.values():
        if len(names) > 1:
            listed = abbreviate([_code_points(name) for name in names], most=3)
            warnings.append(f"classes whose names look alike: {listed}")
    unseen = [name for name in classes if not name.isprintable() or name != name.strip()]
    if unseen:
        listed = abbreviate([f"'{shown(name)}'" for name in unseen])
        warnings.append(f"names of classes with characters that are not seen: {listed}")
    if words := [name for name in classes if name.lower() in SPLIT_NAMES]:
        warnings.append(f"classes that are named as splits: {', '.join(words)}")
    return warnings


def _code_points(name: str) -> str:
    """Return a name in which every character beyond ASCII can be told from others."""
    return shown(name.encode("unicode_escape").decode() if not name.isascii() else f"'{name}'")
