"""Shell completion of devices, spaces, recipes, runs, and options with few values.

A completer gets the beginning of a word and returns the words that start with it, each with a description.
If it returns nothing, the shell completes files. The user waits at each press of Tab, so torch is never
imported; a folder that cannot be read counts as one without runs.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from qnas.common.resources import stems

Words = list[tuple[str, str]]  # each with its description, which bash does not show


def _begin_with(typed: str, words: Iterable[tuple[str, str]]) -> Words:
    return [(word, what) for word, what in words if word.startswith(typed)]


def one_of(*values: str) -> Callable[[str], Words]:
    """Return a completer of an option that takes one of these values."""
    return lambda incomplete: _begin_with(incomplete, ((value, "") for value in values))


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
    """Complete the last of several devices separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [(f"{before}{comma}{name}", title) for name, title in devices(last) if name not in given]


def _shipped(folder: str, what: str) -> Callable[[str], Words]:
    """Return a completer of the YAML files that ship in a folder, by name."""
    return lambda incomplete: _begin_with(incomplete, ((name, what) for name in stems(folder, ".yaml")))


spaces = _shipped("search_spaces", "a space")
recipes = _shipped("recipes", "a recipe")
presets = _shipped("recipes/search", "a search preset")


def pretrained(incomplete: str) -> Words:
    """Complete a pretrained network: those of packages, and the beginning of timm's names."""
    from qnas.nn.pretrained.catalogue import TIMM
    from qnas.nn.pretrained.efficientnet_lite import LITES

    words = [(name, "ImageNet weights of a package") for name in LITES]
    return _begin_with(incomplete, [*words, (TIMM, "a network of timm")])


def runs(incomplete: str) -> Words:
    """Complete a finished run: from the folder being typed, or else from `runs/`."""
    folder = incomplete.rpartition("/")[0] or ("/" if incomplete.startswith("/") else "runs")
    try:
        found = sorted(path.parent for path in Path(folder).glob("*/arch.json"))
    except OSError:
        return []
    return _begin_with(incomplete, ((str(path), "a run") for path in found))


def networks(incomplete: str) -> Words:
    """Complete a shipped space or a finished run."""
    return [*spaces(incomplete), *runs(incomplete)]


def predictable(incomplete: str) -> Words:
    """Complete what `networks` does, and the public models that ship: `timm:NAME`."""
    library = "timm:"
    if not incomplete.startswith(library):
        return [*networks(incomplete), *_begin_with(incomplete, [(library, "a public model")])]
    from qnas.latency.public_networks import public_networks

    names = dict.fromkeys(network.name for network in public_networks().networks)
    return _begin_with(incomplete, ((f"{library}{name}", "a public model") for name in sorted(names)))
