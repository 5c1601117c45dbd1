"""The commands on a page that repeat its run."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from qnas.runs import names

_OTHER_NAMES = {"search_epochs": "epochs", "resolution_px": "resolution"}  # from config.json to the option
# options of a search, recorded under `search` in config.json
_SEARCH_OPTIONS = (
    *("seed", "search_epochs", "warmup_epochs", "batch_size", "resolution_px", "latency_loss", "weights"),
    *("gradient", "paths", "effect_networks", "k_best", "screened", "random_networks", "threads"),
    *("torch_device", "precision"),
)


def search_command(config: Mapping[str, Any]) -> str:
    """Return the command of the same search, with every option written out."""
    words = ["qnas", "search", *_option_words(config, ("space", "data", "latency"))]
    for entry in config.get("limits", []):
        if "device" in entry:
            words += ["--device", entry["device"], "--budget", entry["budget"]]
        else:
            words += [f"--max-{entry['name']}", entry["budget"]]
    return shlex.join([*words, *_option_words(config.get("search", {}), _SEARCH_OPTIONS)])


def training_command(config: Mapping[str, Any], *, of_run: bool) -> str:
    """Return the command of the same training, to be run in the folder of the page."""
    recipe, network = names.RECIPE_FILE, names.ARCH_FILE
    if of_run:
        recipe, network = f"{names.SUBNET_FOLDER}/{recipe}", "."
    weights = "supernet" if config.get("from_supernet") else "scratch"
    words = ["qnas", "train-subnet", network, "--recipe", recipe, "--weights", weights]
    words += _option_words(config, ("data", "teacher"))
    words += _option_words(config.get("train", {}), ("seed", "threads", "torch_device", "precision"))
    return shlex.join([*words, "--out", "again"])


def _option_words(values: Mapping[str, Any], options: Iterable[str]) -> list[str]:
    """Return the command-line options for these values, and `--compile` if it is set."""
    words = []
    for name in options:
        if values.get(name) is not None:
            words += [f"--{_OTHER_NAMES.get(name, name).replace('_', '-')}", str(values[name])]
    return [*words, *(["--compile"] if values.get("compile") else [])]
