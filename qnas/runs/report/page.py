"""`report.html`, a page about a run, made from its folder alone.

The page includes its pictures, charts and styles, runs no script and loads nothing (its content security
policy forbids it), so it can be sent to others and opened years later. Numbers are in `<data>` elements with
the exact value and its key in the run's files.

The template is `page.html` with `style.css`, both next to this module.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qnas.common.errors import QnasWarning, first_line
from qnas.common.files import write_text
from qnas.common.text import escaped
from qnas.common.units import format_count, format_mj, format_ms
from qnas.latency.prediction import ENOUGH_MEASURED
from qnas.runs import names
from qnas.runs.documents import FamilyDocument, read_arch_facts, read_document, read_search_document
from qnas.runs.folders import read_config
from qnas.runs.found_arch import FoundArch, read_result
from qnas.runs.latency_text import describe_budgets
from qnas.runs.report.network import block_rows, layer_text
from qnas.runs.report.searching import search_section
from qnas.runs.report.training import training_section
from qnas.runs.run_text import trained_elsewhere
from qnas.runs.text import short_name
from qnas.runs.verification import recompute
from qnas.spaces.arch import arch_of
from qnas.spaces.space import load_space

Files = Mapping[str, Mapping[str, Any]]  # contents of JSON files that are not written yet, by name

FORMS: dict[str, Callable[[Any], str]] = {  # formats for values of the run's files
    "ms": format_ms,
    "ms up": lambda value: format_ms(value, round_up=True),
    "mj": format_mj,
    "mj up": lambda value: format_mj(value, round_up=True),
    "percent": lambda value: f"{value:.1%}",
    "percent2": lambda value: f"{value:.2%}",
    "count": format_count,
    "whole": lambda value: f"{value:,}",
    "nats": lambda value: f"{value:.3f}",
    "text": lambda value: escaped(str(value)),
}


class Facts:
    """The JSON files of a run, whose values are shown as HTML with their keys."""

    def __init__(self, documents: Mapping[str, Any]) -> None:
        self._documents = documents

    def get(self, key: str) -> Any:
        """Return the value of a key such as `search.ranking.0.rank`, or None if there is none."""
        value: Any = self._documents
        for step in key.split("."):
            if isinstance(value, list):
                value = value[int(step)] if int(step) < len(value) else None
            else:
                value = value.get(step) if isinstance(value, Mapping) else None
        return value

    def show(self, key: str, form: str) -> Markup:
        """Format the value of a key by one of `FORMS`, or a dash if there is none."""
        value = self.get(key)
        if value is None:
            return Markup("&ndash;")
        text = FORMS[form](value)
        return Markup('<data value="{}" data-key="{}" data-form="{}">{}</data>').format(
            json.dumps(value), key, form, text
        )


def build_page(folder: Path, pending: Files | None = None) -> str:
    """Return the page of a run's folder, which holds a search, a training, or both.

    `pending` has the contents of files that are not written yet. Raises CheckpointError, ArchError or
    SpaceError if the folder has no run.
    """
    pending = pending or {}

    document = pending.get(names.ARCH_FILE) or read_arch_facts(folder / names.ARCH_FILE)
    space = load_space(folder / names.SPACE_FILE)
    arch = arch_of(document, space, folder / names.ARCH_FILE)
    recomputed = recompute(document, space, arch, folder / names.ARCH_FILE)
    found = FoundArch(space, arch, document, folder, unchecked=recomputed.unchecked)
    results = {place: _result(found, place, pending) for place in ("", names.SUBNET_FOLDER)}
    trained, result = next(((p, each) for p, each in results.items() if each), ("", None))
    read_all = {
        "arch": document,
        "config": read_config(folder) if (folder / names.CONFIG_FILE).is_file() else None,
        "search": read_search_document(folder) if (folder / names.SEARCH_FILE).is_file() else None,
        "family": (
            read_document(folder / names.FAMILY_FILE, FamilyDocument)
            if (folder / names.FAMILY_FILE).is_file()
            else None
        ),
        "result": result,
        "training": read_config(folder / trained) if result is not None else None,
    }
    documents = {name: content for name, content in read_all.items() if content is not None}
    facts = Facts(documents)
    first = next((e["name"] for e in document.get("limits", ()) if e["unit"] == "ms"), "")
    kernels = (facts.get("search.layers") or {}).get(first, ())
    within = describe_budgets(document["limits"]) if document.get("limits") else ""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "ms": format_ms,
        "count": format_count,
        "short": short_name,
        "words": _words,
        "layer": layer_text,
        "pretty": lambda content: json.dumps(content, indent=2),
    }
    training = None
    if result is not None:
        training = training_section(folder / trained, result, documents["training"], of_run=trained != "")
    return environment.from_string(_text("page.html")).render(
        style=Markup(_text("style.css")),
        title=f"{space.name}{f' within {within}' if within else ''}",
        facts=facts,
        documents=documents,
        space=space,
        device=first,
        enough_measured=ENOUGH_MEASURED,
        blocks=block_rows(folder, space, arch, first, kernels),
        search=search_section(folder, document) if "search" in documents else None,
        training=training,
        elsewhere=trained_elsewhere(result["resolution_px"], space.input.resolution_px) if result else "",
        unchecked=recomputed.unchecked,
    )


def _result(found: FoundArch, place: str, pending: Files) -> Mapping[str, Any] | None:
    """Return the result of the training in a place of the run, which may be pending; None without one."""
    name = str(Path(place) / names.RESULT_FILE)
    if name in pending:
        return pending[name]
    return read_result(found.folder / place, found) if (found.folder / name).is_file() else None


def _words(short: str) -> str:
    """Return the neuron, activation and norm in a QuadraBlock's short name, "" where none is told."""
    return " ".join(short.split()[2:]) if short.startswith("k") else ""


def _text(name: str) -> str:
    return files("qnas.runs.report").joinpath(name).read_text(encoding="utf-8")


def write_report(folder: Path, pending: Files | None = None) -> Path:
    """Write a run's page into its folder and return its path. Raises the errors of `build_page`."""
    path = folder / names.REPORT_FILE
    write_text(path, build_page(folder, pending))
    return path


def close_with_report(folder: Path, pending: Files) -> None:
    """Write the page at the end of a search or a training. If this fails, only warn.

    If a training is in the folder of a run, the page is written to that folder.
    """
    whole = all((folder.parent / name).is_file() for name in (names.ARCH_FILE, names.SPACE_FILE))
    if folder.name == names.SUBNET_FOLDER and whole:
        folder, pending = folder.parent, {f"{folder.name}/{name}": text for name, text in pending.items()}
    try:
        write_report(folder, pending)
    except Exception as error:  # any error: hours of work must not be lost because of a page
        warnings.warn(f"no {folder / names.REPORT_FILE}: {first_line(error)}", QnasWarning, stacklevel=2)
