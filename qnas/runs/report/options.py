"""The options of the command line that repeat a run, for the commands on its page."""

from collections.abc import Iterable, Mapping
from typing import Any

_OTHER_NAMES = {"search_epochs": "epochs", "resolution_px": "resolution"}  # of config.json -> of the option


def option_words(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the words of a command that give the values of these names, and `--compile` where it is set."""
    words = []
    for name in names:
        if values.get(name) is not None:
            words += [f"--{_OTHER_NAMES.get(name, name).replace('_', '-')}", str(values[name])]
    return [*words, *(["--compile"] if values.get("compile") else [])]
