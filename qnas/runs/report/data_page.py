"""The page of a check of a data set: a contact sheet with an example of each class, and the report.

As the page of a run, it includes its pictures and styles, runs no script and loads nothing.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from qnas.common.files import write_text
from qnas.runs.report.charts import photograph

Pictures = Mapping[str, NDArray[np.uint8]]  # of each class, (C, H, W)


def data_page(report: Mapping[str, Any], pictures: Pictures) -> str:
    """Return the page of a report, the document of a `DataReport`."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_text("data_page.html")).render(
        style=Markup(_text("style.css")),
        report=report,
        pictures={name: photograph(picture) for name, picture in pictures.items()},
    )


def write_data_page(path: Path | str, report: Mapping[str, Any], pictures: Pictures) -> None:
    """Write the page of a report. Raises OSError."""
    write_text(Path(path), data_page(report, pictures))


def _text(name: str) -> str:
    return files("qnas.runs.report").joinpath(name).read_text(encoding="utf-8")
