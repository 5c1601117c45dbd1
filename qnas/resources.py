"""Where the files lie that ship with qnas: search spaces and latency tables.

In a wheel they are inside the package; in a source tree they are the folders beside it.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def shipped(folder: str) -> Traversable:
    """Return a folder of shipped data: `search_spaces` or `latency_tables`."""
    inside = files("qnas").joinpath(folder)
    if inside.is_dir():
        return inside
    beside = Path(__file__).resolve().parent.parent / folder
    assert beside.is_dir(), f"the installation lacks {folder}"
    return beside


def stems(folder: str, suffix: str) -> dict[str, Traversable]:
    """Return the shipped files of a folder with that suffix, by name without it, sorted."""
    found = {
        entry.name.removesuffix(suffix): entry
        for entry in shipped(folder).iterdir()
        if entry.name.endswith(suffix)
    }
    return dict(sorted(found.items()))
