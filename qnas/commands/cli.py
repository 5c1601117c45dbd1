"""The command line: its commands, and its exit codes.

Exit codes: 0 done, 1 an error that the user can fix (one line on stderr), 2 wrong usage, 130 interrupted
with the state saved.
"""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qnas import __version__
from qnas.commands import (
    check_data,
    derive,
    doctor,
    latency,
    look,
    own_device,
    predictors,
    profile,
    rivals,
    search,
    subnet,
)
from qnas.commands.options import as_flags
from qnas.common.errors import Interrupted, QnasError, QnasWarning
from qnas.common.plugins import load_plugins
from qnas.common.text import escaped

app = typer.Typer(
    name="qnas",
    help="Search for an image network inside a latency budget, train it, export it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qnas {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.py|MODULE",
            help="Run this Python code first, which registers blocks and neurons. May be given several "
            "times; $QNAS_PLUGINS names more.",
        ),
    ] = None,
) -> None:
    load_plugins(plugin or [])


# short_help is the entry in the list of commands, which is narrow
# the images
app.command("check-data", short_help="Check a data set before hours are spent on it.")(check_data.check_data)
# from a budget to a network file
app.command(cls=search.Command, short_help="Find the best network within a latency budget, or several.")(
    search.search
)
app.command(short_help="Solve a finished search again for other budgets.")(derive.derive)
app.command("train-subnet", cls=subnet.TrainSubnetCommand, short_help="Train a derived network.")(
    subnet.train_subnet
)
app.command(short_help="Write a trained network as files to ship, each checked.")(subnet.export)
# to look at it
app.command(short_help="Latency against accuracy over each device's whole range.")(derive.pareto)
app.command(short_help="Write a run's page, report.html, again.")(look.report)
app.command(short_help="Explain block costs, the value of latency, and identities.")(look.explain)
app.command(short_help="Show runs side by side.")(look.compare)
app.command(short_help="Write a run's metrics for TensorBoard.")(look.tensorboard)
# networks and devices
app.command()(latency.describe)
app.command(short_help="A network's latency on known devices, by layer.")(latency.predict)
app.command(short_help="The public networks within a budget, by accuracy.")(rivals.rivals)
app.command(short_help="List the devices whose latencies are known.")(latency.devices)
app.command("eval-latency", short_help="Compare a device's predictions with measurements.")(
    latency.eval_latency
)
app.command(short_help="A space's latency table on a device, as CSV.")(latency.table)
app.add_typer(predictors.app)
# your own device
app.command(short_help="Time a space's blocks here: this machine as a device.")(profile.profile)
app.command(short_help="Write networks of a space, to be timed anywhere.")(own_device.sample)
app.command(short_help="Time networks on this machine.")(own_device.measure)
app.command("fit-latency")(own_device.fit_latency)
app.command(short_help="Correct a device by about 20 measured networks.")(own_device.calibrate)
# this machine
app.command(short_help="Check this machine, with advice on what is missing.")(doctor.doctor)


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")  # of a process that torchrun started
    who = "qnas" if rank == "0" else f"qnas, process {rank}"
    print(f"{who}: {as_flags(escaped(' '.join(message.split())))}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print our warnings as lines on stderr; those of other packages stay as they are.

    Pillow's are left out: it warns of damaged metadata, which do not matter, and of images that are too
    large, which are listed as broken.
    """
    show = warnings.showwarning

    def show_ours(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if issubclass(category, QnasWarning):
            print(f"qnas: warning: {as_flags(escaped(str(message)))}", file=sys.stderr)
        elif Path(filename).parent.name != "PIL":
            show(message, category, filename, *rest)

    warnings.showwarning = show_ours  # type: ignore[assignment]  # called with these by position
    try:
        yield
    finally:
        warnings.showwarning = show


def main() -> None:
    """Run the command line; an error that the user can fix becomes one line and exit code 1."""
    # SIGTERM ends a command as Ctrl-C does, at any time: files stay whole, the exit code is 130
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _warnings_in_a_line():
            app(prog_name="qnas")  # also where a module is run: usage and completion use it
    except QnasError as error:
        _fail(f"error: {error}", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"error: {where}{error.strerror or error}", 1)
    except Interrupted as error:
        _fail(f"interrupted: {error}", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


if __name__ == "__main__":
    main()
