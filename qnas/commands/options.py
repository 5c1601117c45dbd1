"""What several commands have in common: options, and small helpers around them."""

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas.commands import completion
from qnas.commands.flags import as_flags
from qnas.common.errors import UsageError
from qnas.common.progress import OnStderr

if TYPE_CHECKING:
    pass

# panels of a command's help, in the order in which its options come
BUDGET, DATA, LENGTH, EXPERT, MACHINE, OUTPUT = (
    "Network and budget",
    "Data",
    "Length",
    "Method (for experts)",
    "Machine",
    "Output and resuming",
)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of text.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=OUTPUT)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the interrupted run in --out.", rich_help_panel=OUTPUT)
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what a former run wrote.", rich_help_panel=OUTPUT)
]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, fashion-mnist:DIR, cifar10:DIR, imagefolder:DIR or shards:DIR. Default: digits for a "
        "search, else the data of the search.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
MaxBroken = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of the images that may be broken: they are left out and listed in the run; with more the "
        "command stops.  [default: 0.01, or as searched]",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
Space = Annotated[
    str | None,
    typer.Option(
        help="A shipped search space by name, or the path of a YAML file.",
        autocompletion=completion.spaces,
        show_default=False,
        rich_help_panel=BUDGET,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]
Latency = Annotated[
    str,
    typer.Option(
        "--latency",
        help="device: the device's own table or model. nn-meter: nn-Meter's predictors, once imported.",
        autocompletion=completion.one_of("device", "nn-meter"),
    ),
]


Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="A device by name or alias (qnas devices), or the path of a device file. Several, each "
        "with its --budget in the same order, must all be met.",
        autocompletion=completion.devices,
        show_default=False,
        rich_help_panel=BUDGET,
    ),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="The latency that the network may take on the device, with its unit: 30ms, 800us.",
        show_default=False,
        rich_help_panel=BUDGET,
    ),
]
MaxParams = Annotated[
    str | None,
    typer.Option(
        help="Parameters that the network may have: 2.5M.", show_default=False, rich_help_panel=BUDGET
    ),
]
MaxMacs = Annotated[
    str | None,
    typer.Option(
        help="Multiply-adds an image that the network may take: 300M.",
        show_default=False,
        rich_help_panel=BUDGET,
    ),
]


def pair_budgets(devices: Sequence[str] | None, budgets: Sequence[str] | None) -> list[tuple[str, str]]:
    """Pair devices with budgets. Raises BadParameter where there is none, UsageError for too few."""
    for name, given, example in (
        ("--device", devices, "--device vpu"),
        ("--budget", budgets, "--budget 30ms"),
    ):
        if not given:
            raise typer.BadParameter(f"missing, for instance {example}", param_hint=name)
    assert devices
    assert budgets
    if len(devices) != len(budgets):
        pairs = " ".join(f"--device {device} --budget ..." for device in devices)
        raise UsageError(
            f"{len(devices)} times --device and {len(budgets)} times --budget: give each device its "
            f"budget, in the same order: {pairs}"
        )
    return list(zip(devices, budgets, strict=True))


def print_json(content: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(content, indent=2))


def shown(quiet: bool) -> OnStderr:
    """Return the progress of a command; warnings are shown when quiet too."""
    return OnStderr(quiet, wording=as_flags)


def strong(text: str) -> str:
    """Set text off, on a terminal alone and where NO_COLOR is not set (no-color.org)."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return typer.style(text, bold=True, fg=typer.colors.YELLOW)
    return text
