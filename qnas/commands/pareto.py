"""`qnas pareto`: the best networks of a finished search over each device's range of budgets."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnas.commands import completion
from qnas.commands.options import Force, Json, Latency, Quiet, print_json
from qnas.common.errors import CheckpointError, DataError, UsageError
from qnas.runs.names import PARETO_FOLDER

if TYPE_CHECKING:
    from qnas.runs.finished_run import FinishedRun
    from qnas.runs.pareto import Accuracy, Solved
    from qnas.solver.solve import CandidateIndices


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
    from qnas.common.files import write_json, write_text
    from qnas.latency.device import load_device
    from qnas.latency.prediction import table_from
    from qnas.runs.finished_run import read_finished_run
    from qnas.runs.pareto import (
        front_points,
        fronts_csv,
        fronts_document,
        make_front,
        solve_budgets,
        spread_budgets,
    )
    from qnas.runs.plots import draw_fronts
    from qnas.runs.run_text import describe_fronts
    from qnas.runs.text import field, files_in
    from qnas.solver.limits import latency_limit

    if source is None:
        from qnas.runs.run_folder import latest_run  # imports torch, which solving does without

        source = latest_run()
    record = read_finished_run(source)
    folder = out or source / PARETO_FOLDER
    if (folder / "pareto.json").exists() and not force:
        raise CheckpointError(f"{folder / 'pareto.json'}: exists already: give --force to replace it")
    searched_for = {limit.name: limit.budget for limit in record.limits if limit.table is not None}
    asked = [e["device"] for e in record.config["limits"] if "device" in e]
    known = {}  # by name, so that an alias and its device are one
    for name in map(str.strip, device.split(",") if device is not None else asked):
        found = load_device(name)
        known[found.name] = found
    counts = tuple(limit for limit in record.limits if limit.table is None)
    limits, solved = [], []
    for found in known.values():
        table = table_from(latency, found, record.space)
        limits.append(latency_limit(table, table.slowest_ms))
        budgets = spread_budgets(limits[-1], points, searched_for.get(found.name))
        solved.append(solve_budgets(record, limits[-1], counts, budgets, k_best))
    accuracies: Mapping[CandidateIndices, Accuracy] = {}
    unranked = "" if rerank is not False else "as asked"
    if rerank is not False:
        try:
            accuracies = _rank(record, list(chain(*solved)), quiet=quiet)
        except (CheckpointError, DataError, UsageError) as error:
            if rerank:
                raise
            unranked = str(error)
    fronts = []
    for limit, of_budgets in zip(limits, solved, strict=True):
        own_ms = searched_for.get(limit.name)
        found_points = front_points(record, of_budgets, accuracies, own_ms)
        fronts.append(make_front(record, limit, found_points, own_ms))
    details = {"latency_source": latency, "k_best": k_best, "ranked": bool(accuracies), "unranked": unranked}
    document = fronts_document(record.space, fronts, details)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "pareto.csv", fronts_csv(document))
    draw_fronts(document, folder / "pareto.png")
    write_json(folder / "pareto.json", document)
    if out is None:
        from qnas.runs.report.page import write_report  # imports torch, see above

        write_report(source)
    if as_json:
        print_json({"folder": str(folder), **document})
        return
    typer.echo("\n".join([describe_fronts(document), "", field("files", files_in(folder))]))


def _rank(
    record: "FinishedRun", solved: "Sequence[Solved]", *, quiet: bool
) -> "Mapping[CandidateIndices, Accuracy]":
    """Return the held-out accuracy of every network that was solved for, each measured once."""
    from qnas.common.progress import Progress
    from qnas.runs.pareto import Accuracy
    from qnas.search.selection import rerank_saved
    from qnas.training.loop import set_up_process

    networks = list({s.indices: s for each in solved for s in each.solutions}.values())
    set_up_process(record.config["search"]["threads"])
    with Progress(len(networks), "rank", quiet=quiet) as progress:
        ranked = rerank_saved(record.folder, record.config, record.space, networks, on_scored=progress.step)
    return {r.solution.indices: Accuracy(r.heldout.accuracy, r.heldout.images) for r in ranked}
