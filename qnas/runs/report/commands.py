"""The commands on a page, which repeat its run."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from qnas.runs import names

_OTHER_NAMES = {"search_epochs": "epochs", "resolution_px": "resolution"}  # from config.json to the option


def search_command(config: Mapping[str, Any]) -> str:
    """Return the command of the same search, with every option written out."""
    words = ["qnas", "search", *_option_words(config, ("space", "data", "max_broken", "latency"))]
    if "resolutions_px" in config:
        words += ["--resolutions", ",".join(map(str, config["resolutions_px"]))]
    if "width_multipliers" in config:
        words += ["--width-multipliers", ",".join(f"{by:g}" for by in config["width_multipliers"])]
    words += _pretrained(config)
    for entry in config.get("limits", []):
        if "device" in entry:
            words += ["--device", entry["device"], "--budget", entry["budget"]]
        elif "energy_of" not in entry:
            words += [f"--max-{entry['name']}", entry["budget"]]
    energies = [entry["budget"] for entry in config.get("limits", []) if "energy_of" in entry]
    words += ["--max-energy", energies[0]] if energies else []  # one for all devices that state energies
    settings = config.get("search", {})  # all of them, whatever preset they come from
    return shlex.join([*words, *_option_words(settings, [name for name in settings if name != "preset"])])


def training_command(config: Mapping[str, Any], *, of_run: bool) -> str:
    """Return the command of the same training, to be run in the folder of the page."""
    recipe, network = names.RECIPE_FILE, names.ARCH_FILE
    if of_run:
        recipe, network = f"{names.SUBNET_FOLDER}/{recipe}", "."
    weights = "supernet" if config.get("from_supernet") else "scratch"
    weights = "finalist" if config.get("from_finalist") else weights
    words = ["qnas", "train-subnet", network, "--recipe", recipe]
    words += _pretrained(config) or ["--weights", weights]
    words += _option_words(config, ("data", "max_broken", "teacher"))
    settings = config.get("train", {})
    words += _option_words(settings, [name for name in settings if name != "recipe"])
    return shlex.join([*words, "--out", "again"])


def _pretrained(config: Mapping[str, Any]) -> list[str]:
    return ["--pretrained", config["pretrained"]["name"]] if "pretrained" in config else []


def _option_words(values: Mapping[str, Any], options: Iterable[str]) -> list[str]:
    """Return the command-line options for these values: True is a flag, None and False are left out."""
    words = []
    for name in options:
        value = values.get(name)
        if value is not None and value is not False:
            words.append(f"--{_OTHER_NAMES.get(name, name).replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words
