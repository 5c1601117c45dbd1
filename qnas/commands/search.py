"""`qnas search`: from a budget to an architecture."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas.commands import completion
from qnas.commands.options import (
    AskedLimits,
    BatchSize,
    Budgets,
    Compile,
    Data,
    Devices,
    Force,
    Json,
    MaxBroken,
    MaxMacs,
    MaxParams,
    Precision,
    Quiet,
    Resolution,
    Resume,
    Space,
    Threads,
    TorchDevice,
    free_folder,
    print_json,
    versions,
)
from qnas.common.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from qnas.search.search_result import SearchResult
    from qnas.search.searcher import Searcher


def search(
    device: Devices = None,
    budget: Budgets = None,
    max_params: MaxParams = None,
    max_macs: MaxMacs = None,
    latency: Annotated[
        str | None,
        typer.Option(
            help="device: the device's own table or model. nn-meter: nn-Meter's predictors, once imported.  "
            "[default: device]",
            autocompletion=completion.one_of("device", "nn-meter"),
        ),
    ] = None,
    space: Space = None,
    data: Data = None,
    max_broken: MaxBroken = None,
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
        str | None,
        typer.Option(
            help="multiplier, add-linear or mul-log.  [default: multiplier]",
            autocompletion=completion.one_of("multiplier", "add-linear", "mul-log"),
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of the candidates: independent, shared (slices of the largest) or nested (all at once)."
            "  [default: shared]",
            autocompletion=completion.one_of("independent", "shared", "nested"),
            show_default=False,
        ),
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option(
            help="Of the architecture: two-path, all-paths or gumbel; exact for nested weights.",
            autocompletion=completion.one_of("two-path", "all-paths", "gumbel", "exact"),
            show_default=False,
        ),
    ] = None,
    paths: Annotated[
        str | None,
        typer.Option(
            help="That train the weights: drawn even (within the limits), or by the architecture's"
            " probabilities.  [default: even]",
            autocompletion=completion.one_of("even", "probabilities"),
            show_default=False,
        ),
    ] = None,
    effect_networks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Networks to measure the candidates' effects by; 0 derives by probabilities."
            "  [default: as many as the effects need]",
            show_default=False,
        ),
    ] = None,
    k_best: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Networks that are ranked on all held-out images.  [default: 20]",
            show_default=False,
        ),
    ] = None,
    screened: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Networks that are solved for, of which those of least loss on some of these images are"
            " ranked.  [default: 16 times as many, fewer in a short search]",
            show_default=False,
        ),
    ] = None,
    random_networks: Annotated[
        int | None, typer.Option(min=0, help="Random networks of equal latency to compare with.")
    ] = None,
    threads: Threads = None,
    torch_device: TorchDevice = None,
    precision: Precision = None,
    compile_: Compile = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search for the best network of a space within a latency budget, or several.

    Example: qnas search --device vpu --budget 30ms
    """
    from qnas.latency.device import load_device
    from qnas.latency.prediction import source_note

    asked: dict[str, Any] = {"space": space, "data": data, "latency": latency, "max_broken": max_broken}
    config = {
        "seed": seed,
        "search_epochs": epochs,
        "warmup_epochs": warmup_epochs,
        "batch_size": batch_size,
        "resolution_px": resolution,
        "latency_loss": latency_loss,
        "weights": weights,
        "gradient": gradient,
        "paths": paths,
        "effect_networks": effect_networks,
        "k_best": k_best,
        "screened": screened,
        "random_networks": random_networks,
        "threads": threads,
        "torch_device": torch_device,
        "precision": precision,
        "compile": compile_,
    }
    former = _former_request(out) if resume else {}
    for key, default in (("space", "quadranet-mobile"), ("data", "digits"), ("latency", "device")):
        asked[key] = asked[key] or former.get(key, default)
    asked["max_broken"] = former.get("max_broken") if max_broken is None else max_broken
    asked_limits = AskedLimits.of(device, budget, max_params, max_macs, former)
    if former:
        config = {
            # an older version may not have had this option; then what changed is said
            key: former["search"].get(key) if value is None else value
            for key, value in config.items()
        }
    result = _search(
        asked, asked_limits, config, out, resume=resume, force=force, quiet=quiet, announce=not as_json
    )
    notes = [
        source_note(asked["latency"], load_device(name), result.searcher.space, result.derived.arch)
        for name, _ in asked_limits.devices
    ]
    _print_search(result, notes, as_json=as_json)


def _former_request(out: Path | None) -> dict[str, Any]:
    from qnas.runs.run_folder import read_config

    if out is None:
        raise UsageError("--resume needs --out: the folder of the run to go on with")
    request = read_config(out)
    if "search" not in request:
        raise CheckpointError(f"{out}: this run is not a search")
    return request


def _search(
    asked: dict[str, Any],
    asked_limits: AskedLimits,
    changes: dict[str, Any],
    out: Path | None,
    *,
    resume: bool,
    force: bool,
    quiet: bool,
    announce: bool,
) -> "SearchResult":
    from qnas.spaces.space import load_space

    space = load_space(asked["space"])
    limits = asked_limits.limits(space, asked["latency"])

    # torch takes seconds to import: what can be refused is refused before
    from qnas.data.broken_images import MAX_BROKEN
    from qnas.data.images import load_data
    from qnas.data.sources import parse_data_spec
    from qnas.runs.latency_text import describe_limits
    from qnas.runs.names import BROKEN_FILE
    from qnas.runs.text import wrapped
    from qnas.search.search_result import run_search
    from qnas.search.searcher import Searcher, check_searchable, preset_for
    from qnas.spaces.lower import check_resolution
    from qnas.training.loop import run_to_end, set_up_process
    from qnas.training.processes import world_of_environment

    check_searchable(space, limits)
    spec = parse_data_spec(asked["data"])
    config = preset_for(spec.kind, **changes)
    check_resolution(space, config.resolution_px)
    set_up_process(config.threads)
    world = world_of_environment()
    quiet = quiet or not world.is_main
    max_broken = asked["max_broken"]
    data = load_data(
        spec,
        resolution_px=config.resolution_px,
        channels=space.input.channels,
        max_broken=MAX_BROKEN if max_broken is None else max_broken,
        quiet=quiet,
    )
    searcher = Searcher(space, limits, data, config, world)
    if not world.is_main:  # takes the same steps, writes and says nothing
        run_to_end(searcher, Path(), seed=config.seed, resume=resume, quiet=quiet, world=world)
        raise typer.Exit
    folder = out or free_folder(space.name, asked_limits.label)
    if announce:
        counts = ", ".join(f"{count} {name}" for name, count in data.counts.items())
        typer.echo(describe_limits(space, limits))
        typer.echo(wrapped(f"{data.name} at {config.resolution_px} px: {counts} images; run in {folder}"))
        if data.broken:
            count = f"{len(data.broken)} broken image{'s' * (len(data.broken) > 1)}"
            typer.echo(wrapped(f"{count} left out, listed in {folder / BROKEN_FILE}"))
    first, table = limits[0], limits[0].table
    assert table is not None, "the first limit is a device's"
    device, budget = asked_limits.devices[0]
    request = {
        "command": "search",
        "device": device,
        "latency": asked["latency"],
        "budget": budget,
        "budget_ms": first.budget,
        "limits": asked_limits.entries(limits),
        "space": asked["space"],
        "space_digest": space.digest,
        "table_digest": table.digest,
        "data": str(spec),
        "data_digest": data.digest,
        **({} if max_broken is None else {"max_broken": max_broken}),
        "versions": versions(),
    }
    return run_search(searcher, folder, request, resume=resume, force=force, quiet=quiet)


def _print_search(result: "SearchResult", notes: Sequence[str], *, as_json: bool) -> None:
    from qnas.runs.latency_text import latency_lines
    from qnas.runs.names import ARCH_FILE, SEARCH_FILE
    from qnas.runs.network_text import choices_by_stage, size_line
    from qnas.runs.text import field, files_in, next_command

    searcher, derived, folder = result.searcher, result.derived, result.folder
    document = json.loads((folder / ARCH_FILE).read_text(encoding="utf-8"))
    if as_json:
        found = json.loads((folder / SEARCH_FILE).read_text(encoding="utf-8"))
        report = {key: found[key] for key in ("ranking", "random", "macs_guided", "largest", "seeds")}
        accuracies = [score.accuracy for score in result.rivals.random]
        print_json({"run": str(folder), **document, "random_accuracies": accuracies, **report})
        return
    lines = [
        "",
        choices_by_stage(searcher.space, derived.arch),
        "",
        *latency_lines(searcher.limits, result.solution.indices, notes),
        *_expected(searcher),
        field("size", size_line(searcher.space, searcher.limits, document["macs"], document["params"])),
        *_comparison(result),
        field("files", files_in(folder)),
        next_command(f"qnas train-subnet {folder}"),
    ]
    typer.echo("\n".join(lines))


def _expected(searcher: "Searcher") -> Iterator[str]:
    """Say what a network drawn from the final probabilities takes on average, against each limit."""
    from qnas.runs.text import field

    for limit, amount in zip(searcher.limits, searcher.expected.tolist(), strict=True):
        on = f" on {limit.name}" if limit.table is not None and len(searcher.limits) > 1 else ""
        off = f"{amount / limit.limit - 1:+.1%}"
        yield field("", f"expected of the architecture parameters: {limit.describe(amount)}{on}, {off}")


def _comparison(result: "SearchResult") -> Iterator[str]:
    """Say how well the derived network does, and its rivals, all with the supernet's weights."""
    from qnas.common.units import format_count, format_ms
    from qnas.runs.text import choice_line, field, mean_and_spread
    from qnas.search.rerank import ranking_document

    derived, rivals = result.derived, result.rivals
    tested = len(result.searcher.data.test)
    yield field("accuracy", f"{derived.accuracy:.1%} on {tested} test images, with supernet weights")
    yield field("solved", _solved_for(result))
    yield field("chosen", choice_line(ranking_document(result.ranking), result.solution.solved))
    random = [score.accuracy for score in rivals.random]
    if random:
        lowest = format_ms(min(score.latency_ms for score in rivals.random))
        yield field(
            "against",
            f"{mean_and_spread(random)} for {len(random)} random networks of {lowest} or more, "
            f"best {max(random):.1%}",
        )
    else:
        yield field("against", "no random networks to compare with")
    for what, score in (
        ("the network that MACs alone would choose", rivals.macs_guided),
        ("the network of most MACs within the budget", rivals.largest),
    ):
        if score is None:
            yield field("", f"{what}: none is within the budget")
        else:
            same = ": the same network" if score.arch == derived.arch else ""
            took = f"{format_ms(score.latency_ms)}, {format_count(score.macs)} MACs"
            yield field("", f"{score.accuracy:.1%} for {what} ({took}){same}")
    if len(result.by_seed) > 1:
        accuracies = [result.by_seed[seed] for seed in sorted(result.by_seed)]
        yield field(
            "seeds",
            f"{mean_and_spread(accuracies)} for the {len(accuracies)} runs here that differ in the seed",
        )


def _solved_for(result: "SearchResult") -> str:
    """Say what the derived network is the best by."""
    effects = result.effects
    if effects is None:
        return "for the most probable networks: effects on the loss could not be told"
    return (
        f"for the least loss by effects of candidates, fitted to {effects.networks} networks near the "
        f"budget; they explain {effects.explained:.0%} of what networks left out differ by"
    )
