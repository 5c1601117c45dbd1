"""What a shell may complete: devices, spaces, recipes, runs, and options with few values.

A completer gets what was typed of a word and returns what the word may become, each with a word on what it
is. Where it returns nothing the shell completes files. A shell waits for each press of Tab: torch is never
imported, and a folder that cannot be read has no runs.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

Words = list[tuple[str, str]]  # each with what it is, which bash does not show


def _begin_with(typed: str, words: Iterable[tuple[str, str]]) -> Words:
    return [(word, what) for word, what in words if word.startswith(typed)]


def one_of(*values: str) -> Callable[[str], Words]:
    """Return a completer of an option that takes one of these."""

    def complete(incomplete: str) -> Words:
        return _begin_with(incomplete, ((value, "") for value in values))

    return complete


def _known_devices() -> Words:
    from qnas.latency.device import device_names, load_device

    known = [(load_device(name), (name, *aliases)) for name, aliases in device_names().items()]
    return [(name, device.title) for device, names in known for name in names]


def devices(incomplete: str) -> Words:
    """Complete a shipped device, by its name or an alias."""
    return _begin_with(incomplete, _known_devices())


def devices_or_all(incomplete: str) -> Words:
    """Complete a shipped device or `all`."""
    return _begin_with(incomplete, [*_known_devices(), ("all", "every shipped device")])


def device_lists(incomplete: str) -> Words:
    """Complete the last of several devices that are set apart by commas."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [(f"{before}{comma}{name}", title) for name, title in devices(last) if name not in given]


def spaces(incomplete: str) -> Words:
    """Complete a shipped search space."""
    from qnas.common.resources import stems

    return _begin_with(incomplete, ((name, "a space") for name in stems("search_spaces", ".yaml")))


def recipes(incomplete: str) -> Words:
    """Complete a shipped recipe."""
    from qnas.common.resources import stems

    return _begin_with(incomplete, ((name, "a recipe") for name in stems("recipes", ".yaml")))


def presets(incomplete: str) -> Words:
    """Complete a shipped search preset."""
    from qnas.common.resources import stems

    return _begin_with(incomplete, ((name, "a search preset") for name in stems("recipes/search", ".yaml")))


def runs(incomplete: str) -> Words:
    """Complete a finished run: those of the folder that is being typed, `runs/` where none is."""
    folder = incomplete.rpartition("/")[0] or ("/" if incomplete.startswith("/") else "runs")
    try:
        found = sorted(path.parent for path in Path(folder).glob("*/arch.json"))
    except OSError:
        return []
    return _begin_with(incomplete, ((str(path), "a run") for path in found))


def networks(incomplete: str) -> Words:
    """Complete what has layers: a shipped space or a finished run."""
    return [*spaces(incomplete), *runs(incomplete)]
