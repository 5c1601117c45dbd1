"""`qnas search`: from a budget to an architecture."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas.commands.options import (
    BatchSize,
    Data,
    Force,
    Json,
    Quiet,
    Resolution,
    Resume,
    Space,
    Threads,
    free_folder,
    print_json,
    versions,
)
from qnas.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from qnas.outcome import SearchResult


def search(
    device: Annotated[
        str | None,
        typer.Option(help="A device by name or alias (qnas devices), or the path of your own device file."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="The latency that the network may take, with its unit: 30ms, 800us.")
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            help="device: the device's own table or model. nn-meter: nn-Meter's predictors, once imported.  "
            "[default: device]"
        ),
    ] = None,
    space: Space = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: a new one in runs/.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random.  [default: 0]")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of searching, after the warm-up.", show_default=False)
    ] = None,
    warmup_epochs: Annotated[
        int | None, typer.Option(min=0, help="Epochs of weights alone, before it.", show_default=False)
    ] = None,
    batch_size: BatchSize = None,
    resolution: Resolution = None,
    latency_loss: Annotated[
        str | None, typer.Option(help="multiplier, add-linear or mul-log.  [default: multiplier]")
    ] = None,
    random_networks: Annotated[
        int | None, typer.Option(min=0, help="Random networks of equal latency to compare with.")
    ] = None,
    threads: Threads = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search for the best network of a space within a latency budget.

    Example: qnas search --device vpu --budget 30ms
    """
    from qnas.latency.device import load_device
    from qnas.latency.prediction import source_note

    asked: dict[str, Any] = {
        "device": device,
        "budget": budget,
        "space": space,
        "data": data,
        "latency": latency,
    }
    config = {
        "seed": seed,
        "search_epochs": epochs,
        "warmup_epochs": warmup_epochs,
        "batch_size": batch_size,
        "resolution_px": resolution,
        "latency_loss": latency_loss,
        "random_networks": random_networks,
        "threads": threads,
    }
    former = _former_request(out) if resume else {}
    for key, default in (("space", "quadranet-mobile"), ("data", "digits"), ("latency", "device")):
        asked[key] = asked[key] or former.get(key, default)
    for key, example in (("device", "--device vpu"), ("budget", "--budget 30ms")):
        asked[key] = asked[key] or former.get(key)
        if asked[key] is None:
            raise typer.BadParameter(f"missing, for instance {example}", param_hint=f"--{key}")
    if former:
        config = {key: former["search"][key] if value is None else value for key, value in config.items()}
    result = _search(asked, config, out, resume=resume, force=force, quiet=quiet, announce=not as_json)
    note = source_note(
        asked["latency"], load_device(asked["device"]), result.searcher.space, result.derived.arch
    )
    _print_search(result, note, as_json=as_json)


def _former_request(out: Path | None) -> dict[str, Any]:
    from qnas.run import read_config

    if out is None:
        raise UsageError("--resume needs --out: the folder of the run to go on with")
    request = read_config(out)
    if "search" not in request:
        raise CheckpointError(f"{out}: this run is not a search")
    return request


def _search(
    asked: dict[str, Any],
    changes: dict[str, Any],
    out: Path | None,
    *,
    resume: bool,
    force: bool,
    quiet: bool,
    announce: bool,
) -> "SearchResult":
    from qnas.latency.device import load_device
    from qnas.latency.prediction import table_from
    from qnas.limits import latency_limit
    from qnas.space import load_space
    from qnas.units import format_ms, parse_latency

    budget_ms = parse_latency(asked["budget"])
    space = load_space(asked["space"])
    device = load_device(asked["device"])
    table = table_from(asked["latency"], device, space)
    limits = (latency_limit(table, budget_ms),)

    # torch takes seconds to import: what can be refused is refused before
    from qnas.data import load_data
    from qnas.lower import check_resolution
    from qnas.originals import parse_data_spec
    from qnas.outcome import run_search
    from qnas.search import Searcher, check_searchable, preset_for
    from qnas.train import set_up_process

    check_searchable(space, limits)
    spec = parse_data_spec(asked["data"])
    config = preset_for(spec.kind, **changes)
    check_resolution(space, config.resolution_px)
    set_up_process(config.threads)
    data = load_data(spec, resolution_px=config.resolution_px, channels=space.input.channels, quiet=quiet)
    searcher = Searcher(space, limits, data, config)
    folder = out or free_folder(
        space.name, device.aliases[0] if device.aliases else device.name, asked["budget"]
    )
    if announce:
        counts = ", ".join(f"{count} {name}" for name, count in data.counts.items())
        typer.echo(
            f"{space.name} on {device.name} within {format_ms(budget_ms)}: "
            f"networks take {format_ms(table.fastest_ms)} to {format_ms(table.slowest_ms)}"
        )
        typer.echo(f"{data.name} at {config.resolution_px} px: {counts} images; run in {folder}")
        if not searcher.binds:
            typer.echo("the budget does not bind: the slowest network of the space is within it")
        if table.margin:
            typer.echo(
                f"a margin of {table.margin:.1%} is kept: predictions may be up to "
                f"{format_ms(searcher.limit_ms)}"
            )
    request = {
        "command": "search",
        "device": asked["device"],
        "latency": asked["latency"],
        "budget": asked["budget"],
        "budget_ms": budget_ms,
        "space": asked["space"],
        "space_digest": space.digest,
        "table_digest": table.digest,
        "data": str(spec),
        "data_digest": data.digest,
        "versions": versions(),
    }
    return run_search(searcher, folder, request, resume=resume, force=force, quiet=quiet)


def _print_search(result: "SearchResult", note: str, *, as_json: bool) -> None:
    from qnas import run
    from qnas.text import (
        choices_by_stage,
        field,
        files_in,
        latency_line,
        mean_and_spread,
    )
    from qnas.units import format_count, format_ms

    searcher, derived, folder = result.searcher, result.derived, result.folder
    document = json.loads((folder / run.ARCH).read_text(encoding="utf-8"))
    rivals = [score.accuracy for score in result.random]
    if as_json:
        print_json({"run": str(folder), **document, "random_accuracies": rivals})
        return
    indices = result.solution.indices
    lowest = format_ms(min((score.latency_ms for score in result.random), default=0.0))
    expected = format_ms(result.expected_ms)
    compared = (
        f"{mean_and_spread(rivals)} for {len(rivals)} random networks of {lowest} or more, "
        f"best {max(rivals):.1%}"
        if rivals
        else "no random networks to compare with"
    )
    lines = [
        "",
        choices_by_stage(searcher.space, derived.arch),
        "",
        field("latency", latency_line(searcher.table, indices, searcher.limits[0].budget)),
        *([field("", note)] if note else []),
        field("", f"expected of the architecture parameters: {expected}"),
        field(
            "size",
            f"{format_count(document['macs'])} MACs, {format_count(document['params'])} parameters, "
            f"at {searcher.space.input.resolution_px} px",
        ),
        field(
            "accuracy",
            f"{derived.accuracy:.1%} on {len(searcher.data.test)} test images, with supernet weights",
        ),
        field("", compared),
        field("files", files_in(folder)),
        f"next        qnas train-subnet {folder}",  # not wrapped: to be copied
    ]
    typer.echo("\n".join(lines))
