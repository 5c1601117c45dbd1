"""The command line: which commands there are, and how errors end.

Exit codes: 0 done, 1 what the user can mend (one line on stderr), 2 usage, 130 interrupted with the
state saved.
"""

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from qnas import __version__
from qnas.commands import (
    derive,
    doctor,
    latency,
    look,
    own_device,
    pareto,
    predictors,
    profile,
    search,
    subnet,
)
from qnas.errors import Interrupted, QnasError

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
) -> None:
    pass


# from a budget to a network file
app.command()(search.search)
app.command()(derive.derive)
app.command("train-subnet")(subnet.train_subnet)
app.command()(subnet.export)
# to look at it
app.command()(pareto.pareto)
app.command()(look.report)
app.command()(look.explain)
app.command()(look.compare)
app.command()(look.tensorboard)
# what is known of networks and devices
app.command()(latency.describe)
app.command()(latency.predict)
app.command()(latency.devices)
app.command("eval-latency")(latency.eval_latency)
app.command()(latency.table)
app.add_typer(predictors.app)
# a device of one's own
app.command()(profile.profile)
app.command()(own_device.sample)
app.command()(own_device.measure)
app.command("fit-latency")(own_device.fit_latency)
app.command()(own_device.calibrate)
# this machine
app.command()(doctor.doctor)


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")  # of a process that torchrun started
    who = "qnas" if rank == "0" else f"qnas, process {rank}"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run the command line; what the user can mend becomes one line and exit code 1."""
    # SIGTERM ends a command as Ctrl-C does, wherever it comes: files stay whole, the code is 130
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="qnas")  # of `python -m qnas` too: usage and completion name it
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
