"""`qnas search`: a search from a budget to an architecture."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas.commands import completion
from qnas.commands.fields import Fields, field_command, takes_fields
from qnas.commands.options import (
    BUDGET,
    DATA,
    EXPERT,
    LENGTH,
    MACHINE,
    OUTPUT,
    AskedLimits,
    Budgets,
    Data,
    Devices,
    Force,
    Json,
    MaxBroken,
    MaxMacs,
    MaxParams,
    Quiet,
    Resume,
    Space,
    free_folder,
    print_json,
    versions,
)
from qnas.common.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from qnas.search.config import SearchConfig
    from qnas.search.search_result import SearchResult
    from qnas.search.state import SearchState

Command = field_command(
    Fields(
        "qnas.search.config:SearchConfig",
        panels={
            DATA: ("resolution_px", "batch_size"),
            LENGTH: ("search_epochs", "warmup_epochs", "effect_networks", "screened", "k_best"),
            EXPERT: (
                "loss",
                "metric",
                "weights",
                "gradient",
                "paths",
                "nested_weight_steps",
                "latency_loss",
                "learning_rate",
                "arch_learning_rate",
                "arch_every",
                "weight_decay",
                "label_smoothing",
                "random_networks",
            ),
            MACHINE: ("seed", "threads", "torch_device", "precision", "compile"),
        },
        flags={"resolution_px": "--resolution", "search_epochs": "--epochs"},
    )
)


@takes_fields
def search(
    device: Devices = None,
    budget: Budgets = None,
    max_params: MaxParams = None,
    max_macs: MaxMacs = None,
    space: Space = None,
    latency: Annotated[
        str | None,
        typer.Option(
            help="device: the device's own table or model. nn-meter: nn-Meter's predictors, once imported.  "
            "[default: device]",
            autocompletion=completion.one_of("device", "nn-meter"),
            rich_help_panel=BUDGET,
        ),
    ] = None,
    data: Data = None,
    max_broken: MaxBroken = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Search settings that options change: digits, small, photos, or the path of a YAML file. "
            "Default: by the kind of data.",
            show_default=False,
            autocompletion=completion.presets,
            rich_help_panel=LENGTH,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder. Default: a new one in runs/.", rich_help_panel=OUTPUT),
    ] = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
    **changes: Any,
) -> None:
    """Search for the best network of a space within a latency budget, or several.

    Example: qnas search --device vpu --budget 30ms
    """
    from qnas.data.sources import parse_data_spec
    from qnas.latency.device import load_device
    from qnas.latency.prediction import source_note
    from qnas.search.config import PRESET_OF_DATA, SearchConfig

    asked: dict[str, Any] = {"space": space, "data": data, "latency": latency, "max_broken": max_broken}
    former = _former_request(out) if resume else {}
    for key, default in (("space", "quadranet-mobile"), ("data", "digits"), ("latency", "device")):
        asked[key] = asked[key] or former.get(key, default)
    asked["max_broken"] = former.get("max_broken") if max_broken is None else max_broken
    asked_limits = AskedLimits.of(device, budget, max_params, max_macs, former)
    if former and preset is None:
        config = SearchConfig.check(former["search"], f"{out}: search")
    else:
        config = SearchConfig.load(preset or PRESET_OF_DATA[parse_data_spec(asked["data"]).kind])
    result = _search(
        asked,
        asked_limits,
        config.override(changes),
        out,
        resume=resume,
        force=force,
        quiet=quiet,
        announce=not as_json,
    )
    notes = [
        source_note(asked["latency"], load_device(name), result.searcher.problem.space, result.derived.arch)
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
    config: "SearchConfig",
    out: Path | None,
    *,
    resume: bool,
    force: bool,
    quiet: bool,
    announce: bool,
) -> "SearchResult":
    from qnas.data.sources import parse_data_spec
    from qnas.spaces.space import load_space

    space = load_space(asked["space"])
    limits = asked_limits.limits(space, asked["latency"])
    spec = parse_data_spec(asked["data"])

    # torch takes seconds to import: what can be refused is refused before
    from qnas.common.progress import on_stderr, warnings_only
    from qnas.data.broken_images import MAX_BROKEN
    from qnas.data.loading import load_data
    from qnas.data.sources import parse_data_spec
    from qnas.runs.latency_text import describe_limits
    from qnas.runs.names import BROKEN_FILE
    from qnas.runs.text import wrapped
    from qnas.search.problem import check_searchable
    from qnas.search.search_result import run_search
    from qnas.search.searcher import Searcher
    from qnas.spaces.lower import check_resolution
    from qnas.training.loop import run_to_end, set_up_process
    from qnas.training.processes import world_of_environment

    check_searchable(space, limits)
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
        run_to_end(searcher, Path(), seed=config.seed, resume=resume, world=world)
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
    display = warnings_only if quiet else on_stderr
    return run_search(searcher, folder, request, resume=resume, force=force, display=display)


def _print_search(result: "SearchResult", notes: Sequence[str], *, as_json: bool) -> None:
    from qnas.runs.latency_text import latency_lines
    from qnas.runs.names import ARCH_FILE, SEARCH_FILE
    from qnas.runs.network_text import choices_by_stage, size_line
    from qnas.runs.text import field, files_in, next_command

    problem, derived, folder = result.searcher.problem, result.derived, result.folder
    document = json.loads((folder / ARCH_FILE).read_text(encoding="utf-8"))
    if as_json:
        found = json.loads((folder / SEARCH_FILE).read_text(encoding="utf-8"))
        report = {key: found[key] for key in ("ranking", "random", "macs_guided", "largest", "seeds")}
        accuracies = [score.accuracy for score in result.rivals.random]
        print_json({"run": str(folder), **document, "random_accuracies": accuracies, **report})
        return
    lines = [
        "",
        choices_by_stage(problem.space, derived.arch),
        "",
        *latency_lines(problem.limits, result.solution.indices, notes),
        *_expected(result.searcher.state),
        field("size", size_line(problem.space, problem.limits, document["macs"], document["params"])),
        *_comparison(result),
        field("files", files_in(folder)),
        next_command(f"qnas train-subnet {folder}"),
    ]
    typer.echo("\n".join(lines))


def _expected(state: "SearchState") -> Iterator[str]:
    """Describe the expected amounts of a network drawn from the final probabilities, against each limit."""
    from qnas.runs.text import field

    limits = state.problem.limits
    for limit, amount in zip(limits, state.expected.tolist(), strict=True):
        on = f" on {limit.name}" if limit.table is not None and len(limits) > 1 else ""
        off = f"{amount / limit.limit - 1:+.1%}"
        yield field("", f"expected of the architecture parameters: {limit.describe(amount)}{on}, {off}")


def _comparison(result: "SearchResult") -> Iterator[str]:
    """Describe the accuracy of the derived network and its rivals, all with the supernet's weights."""
    from qnas.common.units import format_count, format_ms
    from qnas.runs.text import choice_line, field, mean_and_spread
    from qnas.search.rerank import ranking_document

    derived, rivals = result.derived, result.rivals
    tested = len(result.searcher.problem.data.test)
    yield field("accuracy", f"{derived.accuracy:.1%} on {tested} test images, with supernet weights")
    for name, value in derived.metrics.items():
        yield field("", f"{name} {value:.1%}")
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
    """Describe the objective that the derived network is the best by."""
    effects = result.selection.effects
    if effects is None:
        return "for the most probable networks: effects on the loss could not be told"
    return (
        f"for the least loss by effects of candidates, fitted to {effects.networks} networks near the "
        f"budget; they explain {effects.explained:.0%} of what networks left out differ by"
    )
