"""A check of a data set before hours are spent on it, from Python."""

from typing import TYPE_CHECKING

from qnas.common.errors import UsageError
from qnas.data.broken_images import MAX_BROKEN
from qnas.data.checking import DataReport, OnDigest, check_images
from qnas.data.loading import GivenData, open_given

if TYPE_CHECKING:
    from pathlib import Path


def check_data(
    data: GivenData,
    *,
    page: "Path | str | None" = None,
    max_broken: float = MAX_BROKEN,
    on_digest: OnDigest | None = None,
    progress: bool = False,
) -> DataReport:
    """Decode every image of a data set once, and report what it holds and what is wrong with it.

    `data` are given as to `run_search`. The report's `problems` would make a training fail or its result
    wrong, its `warnings` are doubtful, and `report.document()` is the report as JSON values. `page` is an
    HTML file to write: the report with an example of each class. `on_digest` is called with the SHA-256 of
    each image's decoded pixels and the image's name.

    Raises DataError if the data cannot be read at all, UsageError for a share outside 0 to 1.

    >>> report = check_data("digits")
    >>> report.images, report.splits, report.modes, report.problems
    (1797, {'all': 1797}, {'L': 1797}, ())
    """
    if not 0 <= max_broken <= 1:
        raise UsageError(f"`max_broken={max_broken}`: expected a share of the images, 0 to 1")
    source = open_given(data, max_broken=max_broken, quiet=not progress)
    report = check_images(source, max_broken=max_broken, on_digest=on_digest, quiet=not progress)
    if page is not None:
        from qnas.runs.report.data_page import write_data_page

        write_data_page(page, report.document(), report.pictures)
    return report
