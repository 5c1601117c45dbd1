"""`qnas derive`: a finished search solved again, for other devices or budgets."""

from pathlib import Path
from typing import Annotated

import typer

from qnas.commands import completion
from qnas.commands.options import (
    Budgets,
    Devices,
    Force,
    Json,
    Latency,
    MaxMacs,
    MaxParams,
    Quiet,
    pair_budgets,
    print_json,
    shown,
)


def derive(
    device: Devices = None,
    budget: Budgets = None,
    max_params: MaxParams = None,
    max_macs: MaxMacs = None,
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="A finished search. Default: the latest run.",
            autocompletion=completion.runs,
            show_default=False,
        ),
    ] = None,
    latency: Latency = "device",
    k_best: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Networks that are solved for and ranked. Default: as the search, which screens more.",
            show_default=False,
        ),
    ] = None,
    rerank: Annotated[
        bool | None,
        typer.Option(
            help="Whether to rank them by the supernet's accuracy on held-out images. Default: if possible.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: RUN/derived/DEVICE-BUDGET.", show_default=False)
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Solve a finished search again for any devices and budgets.

    The probabilities are those of the search: the further its budget from these, the more a search of
    its own would find.

    Example: qnas derive runs/quadranet-mobile-vpu-30ms --device cpu --budget 60ms
    """
    from qnas.api.deriving import derive as derive_network
    from qnas.api.limits import AskedLimits
    from qnas.latency.prediction import source_note
    from qnas.runs.folders import latest_run
    from qnas.runs.latency_text import describe_budgets, latency_lines
    from qnas.runs.network_text import choices_by_stage, size_line
    from qnas.runs.text import choice_line, field, files_in, next_command

    asked = AskedLimits.of(pair_budgets(device, budget), max_params, max_macs)
    found = derive_network(
        source or latest_run(),
        asked,
        latency=latency,
        k_best=k_best,
        rerank=rerank,
        out=out,
        force=force,
        progress=shown(quiet),
    )
    if as_json:
        print_json({"folder": str(found.folder), **found.document})
        return
    space, limits, indices = found.space, found.limits, found.arch.indices(found.space)
    notes = [source_note(latency, device, space, found.arch) for device in asked.known]
    if ranking := found.document["ranking"]:
        chosen = choice_line(ranking, found.solved)
    else:
        chosen = "the first network by the search's scores"
        chosen += f", not ranked on held-out images: {found.unranked}" if rerank is not False else ""
    lines = [
        choices_by_stage(space, found.arch),
        "",
        *latency_lines(limits, indices, notes),
        field("size", size_line(space, limits, found.macs, found.params)),
        field("solved", f"the {found.solved} best networks within the budget in {found.solve_s:.2f} s"),
        field("chosen", chosen),
        field("searched", f"for {describe_budgets(found.searched.document['limits'])}"),
        *([field("warning", found.warning)] if found.warning else []),
        field("files", files_in(found.folder)),
        next_command(f"qnas train-subnet {found.folder}"),
    ]
    typer.echo("\n".join(lines))
