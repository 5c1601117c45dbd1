"""What several commands have in common: options, and small helpers around them."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas import __version__
from qnas.commands import completion
from qnas.common.errors import UsageError

if TYPE_CHECKING:
    from qnas.solver.limits import Limits
    from qnas.spaces.space import SearchSpace

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


@dataclass(frozen=True)
class AskedLimits:
    """What a network may take, as it was asked."""

    devices: tuple[tuple[str, str], ...]  # each with its budget
    max_params: str | None = None
    max_macs: str | None = None

    @classmethod
    def of(
        cls,
        devices: Sequence[str] | None,
        budgets: Sequence[str] | None,
        max_params: str | None,
        max_macs: str | None,
        former: Mapping[str, Any] | None = None,
    ) -> "AskedLimits":
        """Pair devices with budgets; what is not given is as in the request of a former run.

        Raises BadParameter where there is none, UsageError where they do not pair up.
        """
        entries = former.get("limits", []) if former else []
        counts = {entry["name"]: entry["budget"] for entry in entries if "device" not in entry}
        devices = devices or [entry["device"] for entry in entries if "device" in entry]
        budgets = budgets or [entry["budget"] for entry in entries if "device" in entry]
        for name, given, example in (
            ("--device", devices, "--device vpu"),
            ("--budget", budgets, "--budget 30ms"),
        ):
            if not given:
                raise typer.BadParameter(f"missing, for instance {example}", param_hint=name)
        if len(devices) != len(budgets):
            pairs = " ".join(f"--device {device} --budget ..." for device in devices)
            raise UsageError(
                f"{len(devices)} times --device and {len(budgets)} times --budget: give each device its "
                f"budget, in the same order: {pairs}"
            )
        return cls(
            tuple(zip(devices, budgets, strict=True)),
            max_params or counts.get("params"),
            max_macs or counts.get("macs"),
        )

    def limits(self, space: "SearchSpace", latency: str) -> "Limits":
        """Return the limits on networks of a space, with latencies from this source.

        Raises UsageError for what cannot be read, TableError where a device or its table is unknown.
        """
        from qnas.common.units import parse_count, parse_latency
        from qnas.latency.device import load_device
        from qnas.latency.prediction import table_from
        from qnas.solver.limits import COUNTS, count_limit, latency_limit

        budgets_ms = [parse_latency(budget) for _, budget in self.devices]
        most = {
            name: parse_count(asked, f"--max-{name}")
            for name, asked in zip(COUNTS, (self.max_params, self.max_macs), strict=True)
            if asked is not None
        }
        known = [load_device(device) for device, _ in self.devices]
        names = [device.name for device in known]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{twice[0]} is given twice: its smaller budget alone says the same")
        tables = [table_from(latency, device, space) for device in known]
        return (
            *(latency_limit(table, budget) for table, budget in zip(tables, budgets_ms, strict=True)),
            *(count_limit(space, name, count) for name, count in most.items()),
        )

    def entries(self, limits: "Limits") -> list[dict[str, Any]]:
        """Return what was asked with what it came to, a mapping a limit, for a run's config.json."""
        asked = [*self.devices, *((None, most) for most in (self.max_params, self.max_macs) if most)]
        return [
            {"name": limit.name, "budget": budget, "limit": limit.limit}
            | ({"device": device, "table_digest": limit.table.digest} if limit.table else {})
            for (device, budget), limit in zip(asked, limits, strict=True)
        ]

    @property
    def label(self) -> str:
        """A name for folders: `vpu-30ms-cpu-60ms-2.5M-params`."""
        from qnas.latency.device import load_device

        parts = []
        for name, budget in self.devices:
            device = load_device(name)
            parts += [device.aliases[0] if device.aliases else device.name, budget]
        parts += [
            f"{most}-{name}" for most, name in ((self.max_params, "params"), (self.max_macs, "macs")) if most
        ]
        return "-".join(part.replace(" ", "") for part in parts)


def print_json(content: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(content, indent=2))


def strong(text: str) -> str:
    """Set text off, on a terminal alone and where NO_COLOR is not set (no-color.org)."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return typer.style(text, bold=True, fg=typer.colors.YELLOW)
    return text


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import numpy
    import scipy
    import torch

    return {
        "qnas": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }


def free_folder(*parts: str) -> Path:
    """Return a new run's folder, named for what is asked."""
    from qnas.runs.run_folder import free_folder

    return free_folder("-".join(part.replace(" ", "") for part in parts))
