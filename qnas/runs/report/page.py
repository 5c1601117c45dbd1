"""`report.html`: one page of a run, from its folder alone.

The page holds its pictures, charts and styles itself, runs no script and loads nothing (its content
security policy forbids it), so that it can be sent to others and opened years later. Numbers stand in
`<data>` elements that carry the exact value and the place in the run's files that it is from.

The template is `page.html` with `style.css`, both beside this module.
"""

import json
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qnas.common.errors import CheckpointError, first_line
from qnas.common.files import naming, read_json, write_text
from qnas.common.units import format_count, format_ms
from qnas.runs.folders import read_config
from qnas.runs.latency_text import describe_budgets
from qnas.runs.names import (
    ARCH_FILE,
    CONFIG_FILE,
    REPORT_FILE,
    RESULT_FILE,
    SEARCH_FILE,
    SPACE_FILE,
    SUBNET_FOLDER,
)
from qnas.runs.report.figures import FORMS
from qnas.runs.report.network import block_rows
from qnas.runs.report.searching import search_section
from qnas.runs.report.training import training_section
from qnas.runs.text import short_name
from qnas.spaces.arch import make_arch, read_arch_document
from qnas.spaces.space import load_space

Files = Mapping[str, Mapping[str, Any]]  # contents of JSON files that are about to be written, by name


class Facts:
    """The JSON files of a run, and numbers of them as HTML that says where they are from."""

    def __init__(self, documents: Mapping[str, Any]) -> None:
        self._documents = documents

    def get(self, key: str) -> Any:
        """Return the value at a place such as `search.ranking.0.rank`; None where there is none."""
        value: Any = self._documents
        for step in key.split("."):
            if isinstance(value, list):
                value = value[int(step)] if int(step) < len(value) else None
            else:
                value = value.get(step) if isinstance(value, Mapping) else None
        return value

    def show(self, key: str, form: str) -> Markup:
        """Write the value at a place in a form of `FORMS`; a dash where there is none."""
        value = self.get(key)
        if value is None:
            return Markup("&ndash;")
        text = FORMS[form](value)
        return Markup('<data value="{}" data-key="{}" data-form="{}">{}</data>').format(
            json.dumps(value), key, form, text
        )


def build_page(folder: Path, pending: Files | None = None) -> str:
    """Return the page of a run's folder: of a search, of a network trained by itself, or of both.

    `pending` has the contents of files that are about to be written to the folder. Raises CheckpointError,
    ArchError or SpaceError where the folder holds no run.
    """
    pending = pending or {}
    document = pending.get(ARCH_FILE) or read_arch_document(folder / ARCH_FILE)
    space = load_space(folder / SPACE_FILE)
    arch = make_arch(space, tuple(document["choices"]), str(folder / ARCH_FILE))
    searched = (folder / SEARCH_FILE).is_file()
    trained = next(
        (f for f in (folder, folder / SUBNET_FOLDER) if _has(f, RESULT_FILE, pending, folder)), None
    )
    documents: dict[str, Any] = {"arch": document}
    if (folder / CONFIG_FILE).is_file():
        documents["config"] = read_config(folder)
    if searched:
        documents["search"] = read_json(folder / SEARCH_FILE, CheckpointError)
    if trained is not None:
        ready = (
            pending.get(RESULT_FILE) if trained == folder else pending.get(f"{SUBNET_FOLDER}/{RESULT_FILE}")
        )
        documents["result"] = ready or read_json(trained / RESULT_FILE, CheckpointError)
        documents["training"] = read_config(trained)
    facts = Facts(documents)
    first = next((e["name"] for e in document.get("limits", []) if e["unit"] == "ms"), "")
    kernels = (facts.get("search.layers") or {}).get(first, ())
    within = describe_budgets(document["limits"]) if document.get("limits") else ""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "ms": format_ms,
        "count": format_count,
        "short": short_name,
        "pretty": lambda content: json.dumps(content, indent=2),
    }
    return environment.from_string(_text("page.html")).render(
        style=Markup(_text("style.css")),
        title=f"{space.name}{f' within {within}' if within else ''}",
        facts=facts,
        documents=documents,
        space=space,
        device=first,
        blocks=block_rows(folder, space, arch, document, kernels),
        search=search_section(folder, document) if searched else None,
        training=training_section(
            trained, documents["result"], documents["training"], of_run=trained != folder
        )
        if trained is not None
        else None,
    )


def _has(place: Path, name: str, pending: Files, folder: Path) -> bool:
    return (place / name).is_file() or (place / name).relative_to(folder).as_posix() in pending


def _text(name: str) -> str:
    return files("qnas.runs.report").joinpath(name).read_text(encoding="utf-8")


def write_report(folder: Path, pending: Files | None = None) -> Path:
    """Write a run's page into its folder; return where it lies. Raises as `build_page`."""
    path = folder / REPORT_FILE
    page = build_page(folder, pending)
    with naming(path):
        write_text(path, page)
    return path


def close_with_report(folder: Path, pending: Files) -> None:
    """Write the page that a search or a training ends with; where that cannot be, warn and go on.

    A training's page goes into the run whose network it trained, if it lies in one.
    """
    whole = all((folder.parent / name).is_file() for name in (ARCH_FILE, SPACE_FILE))
    if folder.name == SUBNET_FOLDER and whole:
        folder, pending = folder.parent, {f"{folder.name}/{name}": text for name, text in pending.items()}
    try:
        write_report(folder, pending)
    except Exception as error:  # whatever is wrong with a page: hours of work are not lost for it
        print(f"qnas: warning: no {folder / REPORT_FILE}: {first_line(error)}", file=sys.stderr)
