"""nn-Meter's predictors on this machine: `predictors import`, `list`, `remove`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnas.commands.options import Json, Quiet, argument, choice, show
from qnas.common.progress import Progress
from qnas.runs.text import wrapped

if TYPE_CHECKING:
    from qnas.latency.nn_meter.predictors import Predictors

app = typer.Typer(
    name="predictors",
    help="Import nn-Meter's published predictors, for --latency nn-meter.",
    short_help="nn-Meter's published predictors: import, list, remove.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Device = Annotated[str, choice("cpu", "vpu", "adreno-640", "adreno-630")]


@app.command("import")
def import_(
    source: Annotated[Path, argument("The downloaded archive, or the folder of its files.", "ZIP|FOLDER")],
    device: Device,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read nn-Meter's predictors of a device, safely: nothing in the archive can run.

    Example: qnas predictors import cortexA76cpu_tflite21.zip --device cpu
    """
    from qnas.latency.nn_meter.predictors import import_predictors

    shown = 0
    with Progress(100, "import", quiet=quiet) as progress:

        def report(kernel: str, done: int, total: int) -> None:
            nonlocal shown
            while shown < 100 * done // total:
                shown += 1
                progress.step(kernel)

        found = import_predictors(source, device, report)
    lines = [wrapped(_line(found))]
    if found.ignored:
        lines.append(wrapped(f"not read: {', '.join(found.ignored)}"))
    lines.append(f"use them:  qnas search --device {device} --latency nn-meter ...")
    show({**asdict(found), "path": str(found.path)}, lines, as_json=as_json)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the imported predictors.

    Example: qnas predictors list
    """
    from qnas.latency.nn_meter.predictors import PUBLISHED, download_hint, list_predictors

    known = list_predictors()
    lines = [wrapped(_line(predictors)) for predictors in known]
    for device in sorted(PUBLISHED.keys() - {predictors.device for predictors in known}):
        lines.append(wrapped(f"{device}: none; {download_hint(device)}"))
    show([{**asdict(found), "path": str(found.path)} for found in known], lines, as_json=as_json)


@app.command()
def remove(device: Device, as_json: Json = False) -> None:
    """Delete the imported predictors of a device.

    Example: qnas predictors remove --device cpu
    """
    from qnas.latency.nn_meter.predictors import remove_predictors

    removed = remove_predictors(device)
    show({"removed": str(removed)}, [f"removed {removed}"], as_json=as_json)


def _line(found: "Predictors") -> str:
    trees = sum(forest.trees for forest in found.forests.values())
    nodes = sum(forest.nodes for forest in found.forests.values())
    return (
        f"{found.device}: {found.title}, {len(found.forests)} kernels, {trees} trees, "
        f"{nodes / 1e6:.2f}M nodes, {found.size_bytes / 1e6:.1f} MB, "
        f"imported {found.date} from {found.source}"
    )
