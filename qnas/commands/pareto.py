"""`qnas pareto`: the best networks of a finished search over each device's range of budgets."""

from pathlib import Path
from typing import Annotated

import typer

from qnas.commands import completion
from qnas.commands.options import Force, Json, Latency, Quiet, print_json, shown


def pareto(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="A finished search. Default: the latest run.",
            autocompletion=completion.runs,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Devices, set apart by commas: names, aliases or paths of device files. Default: those "
            "that were searched for.",
            autocompletion=completion.device_lists,
            show_default=False,
        ),
    ] = None,
    latency: Latency = "device",
    points: Annotated[int, typer.Option(min=2, help="Budgets a device.")] = 12,
    k_best: Annotated[
        int, typer.Option(min=1, help="Networks a budget that are solved for, to be ranked.")
    ] = 5,
    rerank: Annotated[
        bool | None,
        typer.Option(
            help="Whether to rank them by the supernet's accuracy on held-out images. Default: if possible.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/pareto.", show_default=False)] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Solve a finished search for budgets over each device's whole range: latency against accuracy.

    Writes pareto.csv, pareto.json and pareto.png, and in a run's folder its page anew. Limits of the search
    on parameters and MACs hold.

    Example: qnas pareto runs/quadranet-mobile-vpu-30ms --device cpu,vpu,gpu
    """
    from qnas.api.deriving import pareto as solve_fronts
    from qnas.runs.folders import latest_run
    from qnas.runs.run_text import describe_fronts
    from qnas.runs.text import field, files_in

    found = solve_fronts(
        source or latest_run(),
        None if device is None else [name.strip() for name in device.split(",")],
        latency=latency,
        points=points,
        k_best=k_best,
        rerank=rerank,
        out=out,
        force=force,
        progress=shown(quiet),
    )
    if as_json:
        print_json({"folder": str(found.folder), **found.document})
    else:
        typer.echo("\n".join([describe_fronts(found.document), "", field("files", files_in(found.folder))]))
