"""`qnas derive`: a finished search solved again, for another device or budget."""

import os
from pathlib import Path
from typing import Annotated

import typer

from qnas.commands.options import Force, Json, Latency, print_json
from qnas.errors import CheckpointError


def derive(
    device: Annotated[
        str, typer.Option(help="A device by name or alias (qnas devices), or the path of your own.")
    ],
    budget: Annotated[
        str, typer.Option(help="The latency that the network may take, with its unit: 30ms, 800us.")
    ],
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]", help="A finished search. Default: the latest run.", show_default=False
        ),
    ] = None,
    latency: Latency = "device",
    out: Annotated[
        Path | None, typer.Option(help="Default: RUN/derived/DEVICE-BUDGET.", show_default=False)
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Solve a finished search again for any device and budget.

    The probabilities are those of the search: the further its device and budget from these, the more
    a search of its own would find.

    Example: qnas derive runs/quadranet-mobile-vpu-30ms --device cpu --budget 60ms
    """
    from qnas.arch import ARCH_FILE, SPACE_FILE, arch_from_indices, find_arch
    from qnas.derive import read_scores, solution_document, solve
    from qnas.files import write_json, write_text
    from qnas.latency.device import load_device
    from qnas.latency.prediction import source_note, table_from
    from qnas.latency.table import write_table
    from qnas.limits import latency_limit
    from qnas.text import choices_by_stage, field, files_in, latency_line
    from qnas.units import format_count, format_ms, parse_latency

    if source is None:
        from qnas.run import latest_run  # imports torch, which the solve does without

        source = latest_run()
    budget_ms = parse_latency(budget)
    searched = find_arch(source)
    space = searched.space
    scores = read_scores(searched.folder, space)
    known = load_device(device)
    table = table_from(latency, known, space)
    solution = solve(scores, (latency_limit(table, budget_ms),))
    label = f"{known.aliases[0] if known.aliases else known.name}-{budget.replace(' ', '')}"
    folder = out or searched.folder / "derived" / label
    if (folder / ARCH_FILE).exists() and not force:
        raise CheckpointError(f"{folder / ARCH_FILE}: exists already: give --force to replace it")
    folder.mkdir(parents=True, exist_ok=True)
    details = {
        "latency_source": latency,
        "supernet": os.path.relpath(searched.folder / "supernet.safetensors", folder),
        "seed": searched.document.get("seed"),
        "versions": searched.document.get("versions", {}),
    }
    document = solution_document(space, solution, details)
    write_text(folder / SPACE_FILE, space.to_yaml())
    write_table(table, space, folder / f"table-{table.device}.csv")
    write_json(folder / ARCH_FILE, document)
    if as_json:
        print_json({"folder": str(folder), **document})
        return
    arch = arch_from_indices(space, solution.indices)
    note = source_note(latency, known, space, arch)
    of_search = f"{format_ms(searched.document['budget_ms'])} on {searched.document['device']}"
    lines = [
        choices_by_stage(space, arch),
        "",
        field("latency", latency_line(table, solution.indices, budget_ms)),
        *([field("", note)] if note else []),
        field(
            "size",
            f"{format_count(document['macs'])} MACs, {format_count(document['params'])} parameters, "
            f"at {space.input.resolution_px} px",
        ),
        field("searched", f"for {of_search}: these probabilities are that search's"),
        field("files", files_in(folder)),
        f"next        qnas train-subnet {folder}",
    ]
    typer.echo("\n".join(lines))
