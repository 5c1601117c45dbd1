"""`qnas check-data`: what a data set holds and what is wrong with it, before hours are spent on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnas.commands import options
from qnas.commands.options import argument, option
from qnas.common.errors import DataError, UsageError
from qnas.common.text import shown
from qnas.runs.text import field, table_rows

if TYPE_CHECKING:
    from qnas.data.checking import DataReport, Duplicates

PAGE = Path("data-check.html")
CLASSES_SHOWN = 20
_LINES_SHOWN = 5  # pairs, broken images
_MARK = b"qnas check-data</title>"  # is in every page


def check_data(
    data: Annotated[
        str,
        argument("digits, fashion-mnist:DIR, cifar10:DIR, imagefolder:DIR or shards:DIR.", "DATA"),
    ],
    out: Annotated[
        Path | None,
        option(
            "The page to write, with an image of each class. Default: data-check.html; none with --json or "
            "--digests.",
            panel=options.OUTPUT,
        ),
    ] = None,
    max_broken: options.MaxBroken = None,
    digests: Annotated[
        bool,
        option(
            "Print a SHA-256 of the decoded pixels of each image instead of the report.", panel=options.OUTPUT
        ),
    ] = False,
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Check a data set: its classes, sizes, broken and left-out files, duplicates between train and test.

    Exits with 1 if there is a problem that would make a training fail or its result wrong.

    Example: qnas check-data imagefolder:photos
    """
    from qnas.api.checking import check_data as check
    from qnas.data.broken_images import MAX_BROKEN

    if digests and as_json:
        raise UsageError("`digests=True` and `json=True`: expected one of them")
    page = PAGE if out is None and not (as_json or digests) else out
    if page is not None:
        _check_page(page, force=force)
    report = check(
        data,
        page=page,
        max_broken=MAX_BROKEN if max_broken is None else max_broken,
        on_digest=(lambda digest, name: typer.echo(f"{digest}  {name}")) if digests else None,
        progress=not quiet,
    )
    if not digests:
        options.show(report.document(), _lines(report, page), as_json=as_json)
    if report.problems:
        count = f"{len(report.problems)} problem{'s' * (len(report.problems) > 1)}"
        raise DataError(f"{data}: {count}: {shown('; '.join(report.problems), 240)}")


def _check_page(page: Path, *, force: bool) -> None:
    """Raise UsageError if a page would replace another file."""
    if page.is_dir():
        raise UsageError(f"{page}: is a folder: give the name of a file as `out`")
    if page.exists() and not force and not (page.is_file() and _MARK in page.read_bytes()[:10_000]):
        raise UsageError(f"{page}: exists already: `force=True` replaces it, or give another `out`")


def _lines(report: "DataReport", page: Path | None) -> Iterator[str]:
    yield field("data", report.data)
    yield field("images", f"{report.images}: {_listed(report.splits)}")
    if len(report.used) > 1 and report.used != report.splits:
        yield field("", f"a search uses {_listed(report.used)}")
    yield from _classes(report)
    width, height = report.width_px, report.height_px
    yield field(
        "sizes",
        f"{width.least} to {width.most} px wide (median {width.median}), "
        f"{height.least} to {height.most} px high (median {height.median})",
    )
    turned = f"; {report.turned} turned by EXIF" if report.turned else ""
    yield field("modes", f"{_listed(report.modes)}{turned}")
    if report.broken:
        yield field("broken", f"{len(report.broken)} of {report.images}")
        for each in report.broken[:_LINES_SHOWN]:
            yield field("", shown(f"{each['file']}: {each['problem']}", 300))
    for kind in report.left_out:
        name = "left out" if kind is report.left_out[0] else ""
        first = ", ".join(
            [*(shown(file, 60) for file in kind.first[:2]), *(["..."] if kind.files > 2 else [])]
        )
        yield field(name, f"{kind.reason}: {kind.files} ({first})")
    yield from _duplicates("duplicates", "pixel for pixel", report.exact)
    yield from _duplicates("", "nearly so", report.near)
    if report.plain:
        yield field("", f"{report.plain} images show nothing that could be compared")
    yield ""
    for number, text in enumerate(report.problems):
        yield field("problems" if number == 0 else "", text)
    for number, text in enumerate(report.warnings):
        yield field("warnings" if number == 0 else "", text)
    if not report.problems and not report.warnings:
        yield "nothing wrong found"
    if page is not None:
        yield field("page", str(page))


def _listed(counts: "dict[str, int] | object") -> str:
    assert isinstance(counts, dict), counts
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _classes(report: "DataReport") -> Iterator[str]:
    """List the classes, the largest and the smallest if there are many."""
    by_size = sorted(report.classes.items(), key=lambda item: -sum(item[1].values()))
    balance = f"largest to smallest {report.imbalance:.1f}, the largest has {report.largest_share:.0%}"
    yield field("classes", f"{len(by_size)}: {balance}")
    rest = len(by_size) - CLASSES_SHOWN
    if rest > 0:
        by_size = [*by_size[: CLASSES_SHOWN // 2], *by_size[-CLASSES_SHOWN // 2 :]]
    rows = [[shown(name, 40), *map(str, counts.values())] for name, counts in by_size]
    if rest > 0:
        rows.insert(CLASSES_SHOWN // 2, [f"({rest} more)", *("" for _ in report.splits)])
    for line in table_rows(["class", *report.splits], rows).split("\n"):
        yield f"{'':12}{line}"


def _duplicates(name: str, how: str, found: "Duplicates") -> Iterator[str]:
    parts = [f"{found.images} images are another one {how}"]
    if found.across:
        parts.append(_listed(dict(found.across)))
    if found.of_another_class:
        parts.append(f"{found.of_another_class} of two classes")
    yield field(name, "; ".join(parts))
    for first, second in found.examples[:_LINES_SHOWN]:
        yield field("", f"{shown(first, 80)} and {shown(second, 80)}")
