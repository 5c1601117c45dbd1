"""The files that ship with qnas (spaces, recipes, latency tables, public networks), and the user's cache.

In a wheel, shipped files are inside the package; in a source tree they are the folders beside it.
"""

import os
from collections.abc import Callable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from qnas.common.arguments import quoted
from qnas.common.errors import QnasError, nearest, one_line
from qnas.common.reading import YAML_CHARACTERS, is_file, read_text

YAML_BYTES = 4 * YAML_CHARACTERS
DEFAULT_SPACE = "union-mobile"  # what is searched, and profiled, where no space is named


def shipped(folder: str) -> Traversable:
    """Return a folder of shipped data: `search_spaces`, `recipes`, `latency_tables` or `public_networks`."""
    inside = files("qnas").joinpath(folder)
    if inside.is_dir():
        return inside
    beside = Path(__file__).resolve().parents[2] / folder
    assert beside.is_dir(), f"the installation lacks {folder}"
    return beside


def user_folder(name: str, variable: str, default: str) -> Path:
    """Return a folder of the user: $QNAS_HOME/NAME, else qnas/NAME in $VARIABLE or ~/DEFAULT."""
    if os.environ.get("QNAS_HOME"):
        return Path(os.environ["QNAS_HOME"]) / name
    given = os.environ.get(variable, "")
    # the XDG base directory specification says to ignore a relative path
    return (Path(given) if os.path.isabs(given) else Path.home() / default) / "qnas" / name


def user_cache(name: str) -> Path:
    """Return a folder for files that can be computed again."""
    return user_folder(name, "XDG_CACHE_HOME", ".cache")


def stems(folder: str, suffix: str) -> dict[str, Traversable]:
    """Return the shipped files of a folder with a suffix, sorted, by name without the suffix."""
    found = {
        entry.name.removesuffix(suffix): entry
        for entry in shipped(folder).iterdir()
        if entry.name.endswith(suffix)
    }
    return dict(sorted(found.items()))


def read_named(
    folder: str, name_or_path: str | Path, what: str, error: Callable[[str], QnasError]
) -> tuple[str, str]:
    """Read a shipped YAML file by name, or your own by path; return its text and its name for messages.

    `error` makes the exception for a missing file.
    """
    shipped = stems(folder, ".yaml")
    name = str(name_or_path)
    if name in shipped:
        return shipped[name].read_text(encoding="utf-8"), f"{what} {name}"
    path = Path(name_or_path)
    if is_file(path):
        return read_text(path, error, what, limit=YAML_BYTES), str(path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise error(f"{what} {one_line(name)}: no such file")
    raise error(f"unknown {what} {quoted(name)}: {nearest(name, shipped)}")
