"""What several commands have in common: options, and small helpers around them."""

import json
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas import __version__
from qnas.errors import UsageError

if TYPE_CHECKING:
    from qnas.arch import Arch
    from qnas.space import SearchSpace

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what a former run wrote.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, fashion-mnist:DIR, cifar10:DIR or imagefolder:DIR. Default: digits for a search, "
        "else what the run was searched on.",
        show_default=False,
    ),
]
Space = Annotated[
    str | None,
    typer.Option(help="A shipped space by name, or the path of your own YAML.", show_default=False),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random. One seed, one result.")]
Epochs = Annotated[int | None, typer.Option(min=1, show_default=False)]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images a step.", show_default=False)]
Threads = Annotated[
    int | None, typer.Option(min=0, help="Of torch; 0 takes all cores.  [default: 1 for digits, else 0]")
]
Resolution = Annotated[
    int | None, typer.Option(min=1, help="Height and width in pixels while training.", show_default=False)
]


Latency = Annotated[
    str,
    typer.Option(
        "--latency",
        help="device: the device's own table or model. nn-meter: nn-Meter's predictors, once imported.",
    ),
]


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # as in a device file


def check_device_name(name: str) -> None:
    """Raise UsageError where a device of one's own cannot have this name."""
    from qnas.latency.device import device_names

    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"--device-name {name!r}: expected letters, digits, '.', '_' and '-', such as my-phone"
        )
    taken = {known for device, aliases in device_names().items() for known in (device, *aliases)}
    if name in taken:
        raise UsageError(f"--device-name {name}: a device that ships has this name: choose another")


def print_json(content: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(content, indent=2))


def find_network(target: str, space: str | None) -> "tuple[SearchSpace, Arch | None]":
    """Return a space and the architecture that is meant; None where the space has many."""
    from qnas.arch import find_arch, only_arch
    from qnas.space import load_space

    path = Path(target)
    if path.is_dir() or path.suffix == ".json":
        found = find_arch(path, space)
        return found.space, found.arch
    searched = load_space(target)
    return searched, only_arch(searched) if searched.is_fixed else None


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
    from qnas import run

    return run.free_folder("-".join(part.replace(" ", "") for part in parts))
