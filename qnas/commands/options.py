"""Options that several commands share, their names in messages, and the printing of results.

The code below the command line names arguments in backquotes: "`force=True` replaces it". Here these become
options: "--force replaces it".
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from qnas.commands import completion
from qnas.common.errors import UsageError
from qnas.common.progress import OnStderr

Number = TypeVar("Number", int, float)

# arguments with an option of another name
OPTIONS = {
    "budgets": "budget",
    "devices": "device",
    "formats": "format",
    "networks": "n",
    "resolution_px": "resolution",
    "start_resolution_px": "start-resolution",
    "search_epochs": "epochs",
    "timeout_s": "timeout",
}
Complete = Callable[[str], completion.Words]
_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]+))?`")

# panels of a command's help, in the order of its options
BUDGET, DATA, LENGTH, EXPERT, MACHINE, OUTPUT = (
    "Network and budget",
    "Data",
    "Length",
    "Method (for experts)",
    "Machine",
    "Output and resuming",
)


def option(
    help: str,
    *flags: str,
    panel: str | None = None,
    complete: Complete | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Return an option for an annotation, with the panel of the help and the bounds of its value."""
    return typer.Option(
        *flags, help=help, rich_help_panel=panel, autocompletion=complete, min=least, max=most
    )


def choice(*words: str, note: str = "", panel: str | None = None) -> Any:
    """Return an option that takes one of these words; its help lists them before a note."""
    help = f"{', '.join(words[:-1])} or {words[-1]}.{note}"
    return option(help, panel=panel, complete=completion.one_of(*words))


def argument(help: str, metavar: str | None = None, complete: Complete | None = None) -> Any:
    """Return an argument for an annotation."""
    return typer.Argument(metavar=metavar, help=help, autocompletion=complete)


Json = Annotated[bool, option("Print one JSON object instead of text.", "--json", panel=OUTPUT)]
Quiet = Annotated[bool, option("Show no progress.", "--quiet", "-q", panel=OUTPUT)]
Resume = Annotated[bool, option("Continue the interrupted run in --out.", "--resume", panel=OUTPUT)]
Force = Annotated[bool, option("Replace the output of an earlier run.", "--force", panel=OUTPUT)]
Run = Annotated[
    Path | None, argument("A finished search. Default: the latest run.", "[RUN]", completion.runs)
]
Data = Annotated[
    str | None,
    option(
        "digits, fashion-mnist:DIR, cifar10:DIR, imagefolder:DIR or shards:DIR. Default: digits for a "
        "search, else the data of the search.",
        panel=DATA,
    ),
]
MaxBroken = Annotated[
    float | None,
    option(
        "Largest share of broken images: they are left out and listed in the run; with more, the command "
        "stops.  [default: 0.01, or as searched]",
        panel=DATA,
        least=0,
        most=1,
    ),
]
Space = Annotated[
    str | None,
    option(
        "A shipped search space by name, or the path of a YAML file.",
        panel=BUDGET,
        complete=completion.spaces,
    ),
]
Resolutions = Annotated[
    str | None,
    option(
        "Input resolutions of the deployed network that the search chooses from, in pixels: 128,160,192,224. "
        "Default: those of the space.",
        panel=BUDGET,
    ),
]
WidthMultipliers = Annotated[
    str | None,
    option(
        "Multiples of each stage's channels that the search chooses from, for each stage by itself: "
        "0.75,1. Default: the widths of the space.",
        panel=BUDGET,
    ),
]
Seed = Annotated[int, option("Seed of all random numbers.", least=0)]
Threads = Annotated[int, option("CPU threads of the runtime.", least=1)]
LATENCY_HELP = "device: the device's own table or model. nn-meter: nn-Meter's predictors, once imported."
LATENCIES = completion.one_of("device", "nn-meter")
Latency = Annotated[str, option(LATENCY_HELP, complete=LATENCIES)]
Device = Annotated[str, option("A device by name, alias or path.", complete=completion.devices)]
Devices = Annotated[
    list[str] | None,
    option(
        "A device by name or alias (qnas devices), or the path of a device file. Several, each with its "
        "--budget in the same order, must all be met.",
        "--device",
        panel=BUDGET,
        complete=completion.devices,
    ),
]
Budgets = Annotated[
    list[str] | None,
    option(
        "The latency that the network may take on the device, with its unit: 30ms, 800us; of a throughput "
        "device also 5000img/s.",
        "--budget",
        panel=BUDGET,
    ),
]
MaxParams = Annotated[str | None, option("Parameters that the network may have: 2.5M.", panel=BUDGET)]
MaxMacs = Annotated[
    str | None, option("Multiply-adds per image that the network may take: 300M.", panel=BUDGET)
]
MaxEnergy = Annotated[
    str | None,
    option(
        "Energy per image that the network may take, on each device whose file states energies: 30mJ.",
        panel=BUDGET,
    ),
]
Confidence = Annotated[
    float | None,
    option(
        "Keep the upper end of the latency's interval at this level within the budget: 0.9. Default: the "
        "prediction itself.",
        panel=BUDGET,
    ),
]
Rerank = Annotated[
    bool | None, option("Rank networks by the supernet's accuracy on held-out images. Default: if possible.")
]


def as_flags(text: str) -> str:
    """Return a text with its arguments in backquotes turned into options.

    >>> as_flags("exists already: `force=True` replaces it, or another `out`")
    'exists already: --force replaces it, or another --out'
    >>> as_flags("`linear_start=False` or `weights='scratch'`, `resolution_px=64`")
    '--no-linear-start or --weights scratch, --resolution 64'
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        option = OPTIONS.get(name, name).replace("_", "-")
        if value in (None, "True"):
            return f"--{option}"
        return f"--no-{option}" if value == "False" else f"--{option} {value.strip(chr(39))}"

    return _ARGUMENT.sub(flag, text)


def pair_budgets(
    devices: Sequence[str] | None, budgets: Sequence[str] | None, former: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """Pair devices with budgets; missing ones are taken from a former run's config.json.

    Raises BadParameter if there are none, UsageError if their numbers differ.
    """
    entries = [entry for entry in (former or {}).get("limits", ()) if "device" in entry]
    devices = devices or [entry["device"] for entry in entries]
    budgets = budgets or [entry["budget"] for entry in entries]
    for name, given, example in (("--device", devices, "vpu"), ("--budget", budgets, "30ms")):
        if not given:
            raise typer.BadParameter(f"missing, for instance {name} {example}", param_hint=name)
    if len(devices) != len(budgets):
        pairs = " ".join(f"--device {device} --budget ..." for device in devices)
        raise UsageError(
            f"{len(devices)} times --device and {len(budgets)} times --budget: give each device its "
            f"budget, in the same order: {pairs}"
        )
    return list(zip(devices, budgets, strict=True))


def whole_numbers(text: str | None, option: str) -> list[int] | None:
    """Return the whole numbers of a list with commas. Raises BadParameter for another text.

    >>> whole_numbers("128, 160", "--resolutions")
    [128, 160]
    """
    return _listed(text, option, int, "whole numbers: 128,160")


def numbers(text: str | None, option: str) -> list[float] | None:
    """Return the numbers of a list with commas. Raises BadParameter for another text.

    >>> numbers("0.75, 1", "--width-multipliers")
    [0.75, 1.0]
    """
    return _listed(text, option, float, "numbers: 0.75,1")


def _listed(
    text: str | None, option: str, kind: Callable[[str], Number], expected: str
) -> list[Number] | None:
    """Return the parts of a list with commas as numbers, None without a list."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r:.60}: expected {expected}", param_hint=option) from None


def show(content: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """Print a result: its content as JSON, or else the lines that describe it, which may be a generator."""
    typer.echo(json.dumps(content, indent=2) if as_json else "\n".join(lines))


def progress(quiet: bool) -> OnStderr:
    """Return a display on stderr for a command; when quiet it shows warnings only."""
    return OnStderr(quiet, wording=as_flags)


def strong(text: str) -> str:
    """Highlight text on a terminal, unless NO_COLOR is set (no-color.org)."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return typer.style(text, bold=True, fg=typer.colors.YELLOW)
    return text
