"""`qnas derive`: a finished search solved again, for other devices or budgets."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas.commands import completion
from qnas.commands.options import (
    AskedLimits,
    Budgets,
    Devices,
    Force,
    Json,
    Latency,
    MaxMacs,
    MaxParams,
    Quiet,
    print_json,
)
from qnas.common.errors import CheckpointError, DataError, UsageError
from qnas.runs.names import CONFIG_FILE, DERIVED_FOLDER, SUPERNET_FILE, table_file

if TYPE_CHECKING:
    from qnas.solver.solve import Solution
    from qnas.spaces.space import SearchSpace


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
    from qnas.common.files import read_json, write_json, write_text
    from qnas.latency.device import load_device
    from qnas.latency.prediction import source_note
    from qnas.latency.table_file import write_table
    from qnas.runs.finished_run import read_searched
    from qnas.runs.found_arch import find_arch
    from qnas.runs.latency_text import describe_budgets, latency_lines
    from qnas.runs.names import ARCH_FILE, SPACE_FILE
    from qnas.runs.network_text import choices_by_stage, size_line
    from qnas.runs.text import choice_line, field, files_in, next_command
    from qnas.solver.searched_budget import far_from_searched
    from qnas.solver.solution_document import solution_document
    from qnas.solver.solve import K_BEST, solve_best
    from qnas.spaces.arch import arch_from_indices

    if source is None:
        from qnas.runs.run_folder import latest_run  # imports torch, which the solve does without

        source = latest_run()
    asked = AskedLimits.of(device, budget, max_params, max_macs)
    found = find_arch(source)
    space = found.space
    searched = read_searched(found.folder, space)
    limits = asked.limits(space, latency)
    folder = out or found.folder / DERIVED_FOLDER / asked.label
    if (folder / ARCH_FILE).exists() and not force:
        raise CheckpointError(f"{folder / ARCH_FILE}: exists already: give --force to replace it")
    config = read_json(found.folder / CONFIG_FILE, CheckpointError)
    started = time.perf_counter()
    keep = k_best or config["search"].get("k_best", K_BEST)
    solved = max(keep, 0 if rerank is False or k_best is not None else searched.screened)
    solutions = solve_best(space, searched.scores, limits, solved)
    solve_s = time.perf_counter() - started
    ranking: list[dict[str, Any]] = []
    solution, chosen = solutions[0], "the first network by the search's scores"
    if rerank is not False:
        try:
            ranking, solution = _rank(found.folder, config, space, solutions, keep, quiet=quiet)
            chosen = choice_line(ranking, len(solutions))
        except (CheckpointError, DataError, UsageError) as error:
            if rerank:
                raise
            chosen += f", not ranked on held-out images: {error}"
    warning = far_from_searched(searched.log_probabilities, limits, pressed=searched.pressed)
    details = {
        "latency_source": latency,
        "supernet": os.path.relpath(found.folder / SUPERNET_FILE, folder),
        "heldout_accuracy": ranking[0]["heldout_accuracy"] if ranking else None,
        "ranking": ranking,
        "warning": warning,
        "seed": found.document.get("seed"),
        "versions": found.document.get("versions", {}),
    }
    document = solution_document(space, solution, details)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SPACE_FILE, space.to_yaml())
    for limit in limits:
        if limit.table is not None:
            write_table(limit.table, space, folder / table_file(limit.name))
    write_json(folder / ARCH_FILE, document)
    if as_json:
        print_json({"folder": str(folder), **document})
        return
    arch = arch_from_indices(space, solution.indices)
    notes = [source_note(latency, load_device(name), space, arch) for name, _ in asked.devices]
    lines = [
        choices_by_stage(space, arch),
        "",
        *latency_lines(limits, solution.indices, notes),
        field("size", size_line(space, limits, document["macs"], document["params"])),
        field("solved", f"the {len(solutions)} best networks within the budget in {solve_s:.2f} s"),
        field("chosen", chosen),
        field("searched", f"for {describe_budgets(found.document['limits'])}"),
        *([field("warning", warning)] if warning else []),
        field("files", files_in(folder)),
        next_command(f"qnas train-subnet {folder}"),
    ]
    typer.echo("\n".join(lines))


def _rank(
    folder: Path,
    config: Mapping[str, Any],
    space: "SearchSpace",
    solutions: Sequence["Solution"],
    keep: int,
    *,
    quiet: bool,
) -> tuple[list[dict[str, Any]], "Solution"]:
    """Rank networks by the run's supernet; return the ranking, and its winner."""
    from qnas.common.progress import Progress
    from qnas.search.rerank import ranking_document
    from qnas.search.selection import rerank_saved
    from qnas.training.loop import set_up_process

    set_up_process(config["search"]["threads"])
    steps = len(solutions) + (keep if len(solutions) > keep else 0)
    with Progress(steps, "rank", quiet=quiet) as progress:
        ranked = rerank_saved(folder, config, space, solutions, keep, progress.step)
    return ranking_document(ranked), ranked[0].solution
