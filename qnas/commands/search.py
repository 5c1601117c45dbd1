"""`qnas search`: a search from a budget to an architecture."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnas.commands import completion, options
from qnas.commands.fields import Fields, field_command, takes_fields
from qnas.commands.options import option
from qnas.common.text import escaped, shown
from qnas.common.units import format_count, format_ms
from qnas.runs.folders import read_config
from qnas.runs.names import BROKEN_FILE, LEFT_OUT_FILE
from qnas.runs.text import (
    BALANCING,
    balanced_beside,
    balanced_text,
    choice_line,
    field,
    files_in,
    mean_and_spread,
    never_text,
    next_command,
    wrapped,
)

if TYPE_CHECKING:
    from qnas.api.results import SearchResult
    from qnas.api.searching import Started
    from qnas.runs.finished_run import FinishedRun

# the fields of SearchConfig about finalists, known without loading pydantic
FINALISTS_PANEL = "Finalists"
FINALISTS = (
    *("finalists", "finalist_epochs", "finalists_from", "finalist_factor", "finalist_rounds"),
    "finalist_recipe",
)

Command = field_command(
    Fields(
        "qnas.search.config:SearchConfig",
        panels={
            options.DATA: ("resolution_px", "batch_size"),
            options.LENGTH: ("search_epochs", "warmup_epochs", "effect_networks", "screened", "k_best"),
            FINALISTS_PANEL: FINALISTS,
            options.MACHINE: ("seed", "threads", "torch_device", "precision", "compile"),
        },
        rest=options.EXPERT,
    )
)


@takes_fields
def search(
    device: options.Devices = None,
    budget: options.Budgets = None,
    max_params: options.MaxParams = None,
    max_macs: options.MaxMacs = None,
    max_energy: options.MaxEnergy = None,
    confidence: options.Confidence = None,
    space: options.Space = None,
    resolutions: options.Resolutions = None,
    width_multipliers: options.WidthMultipliers = None,
    latency: Annotated[
        str | None,
        option(
            f"{options.LATENCY_HELP}  [default: device]", panel=options.BUDGET, complete=options.LATENCIES
        ),
    ] = None,
    data: options.Data = None,
    max_broken: options.MaxBroken = None,
    preset: Annotated[
        str | None,
        option(
            "Search settings that options change: digits, small, photos, or the path of a YAML file. "
            "Default: by the kind of data.",
            panel=options.LENGTH,
            complete=completion.presets,
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        option(
            "A network whose weights the search starts from: efficientnet-lite0, -lite1, -lite2, or "
            "timm:NAME. The default space is then the one around it.",
            panel=options.BUDGET,
            complete=completion.pretrained,
        ),
    ] = None,
    out: Annotated[
        Path | None, option("The run's folder. Default: a new one in runs/.", panel=options.OUTPUT)
    ] = None,
    resume: options.Resume = False,
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    **changes: Any,
) -> None:
    """Search for the best network of a space within a latency budget, or several.

    Example: qnas search --device vpu --budget 30ms
    """
    from qnas.api.searching import run_search

    former = read_config(out) if resume and out is not None else None
    result = run_search(
        space,
        None if resume and not device and not budget else options.pair_budgets(device, budget, former),
        resolutions=options.whole_numbers(resolutions, "--resolutions"),
        width_multipliers=options.numbers(width_multipliers, "--width-multipliers"),
        data=data,
        out=out,
        max_params=max_params,
        max_macs=max_macs,
        max_energy=max_energy,
        confidence=confidence,
        latency=latency,
        max_broken=max_broken,
        preset=preset,
        pretrained=pretrained,
        resume=resume,
        force=force,
        progress=options.progress(quiet),
        on_start=(lambda started: None) if as_json else _announce,
        **changes,
    )
    found = result.run.found
    keys = ("ranking", "random", "macs_guided", "largest", "seeds", "finalists")
    report = {key: found[key] for key in keys if key in found}
    accuracies = {"random_accuracies": result.random_accuracies}
    content = {"run": str(result.folder), **result.document, **accuracies, **report}
    options.show(content, _lines(result), as_json=as_json)


def _announce(started: "Started") -> None:
    """Print the limits, the images with their size, and the folder of a search before it begins."""
    from qnas.runs.family_text import describe_layouts
    from qnas.runs.latency_text import describe_limits

    images, folder = started.images, started.folder
    if started.family is None:
        typer.echo(describe_limits(started.space, started.limits))
    else:
        typer.echo(describe_layouts(started.family, started.within))
    what = f"trains on {shown(images.name)} at {images.resolution_px} px: {images.described_counts} images"
    typer.echo(wrapped(f"{what}; run in {folder}"))
    if started.finalists is not None:
        px, most = started.finalists.resolution_px, started.finalists.recipe.epochs
        stay = f"those that stay for {most} epoch{'s' * (most != 1)}"
        typer.echo(wrapped(f"then trains the finalists by themselves at {px} px, {stay}"))
    deployed_px = started.space.input.resolution_px
    if started.family is not None:
        typer.echo(
            wrapped(
                f"images of {deployed_px} px are trained at {images.resolution_px} px, those of other "
                "resolutions in proportion; qnas train-subnet ends its training at the chosen one"
            )
        )
    elif images.resolution_px != deployed_px:
        typer.echo(
            wrapped(
                f"the budget holds for images of {deployed_px} px, not of {images.resolution_px} px: "
                f"qnas train-subnet ends its training at {deployed_px} px"
            )
        )
    classes = len(images.classes)
    if started.space.head.classes != classes:
        typer.echo(
            wrapped(
                f"the budget holds for {started.space.head.classes} classes, not for the {classes} of the "
                "data: a device's table was measured with fewer"
            )
        )
    if images.broken:
        count = f"{len(images.broken)} broken image{'s' * (len(images.broken) > 1)}"
        typer.echo(wrapped(f"{count} left out, listed in {folder / BROKEN_FILE}"))
    if images.left_out:
        files = sum(each.files for each in images.left_out)
        what = f"{files} file{'s' * (files > 1)} of the data not used"
        typer.echo(wrapped(f"{what}, listed in {folder / LEFT_OUT_FILE}"))
    for note in images.notes:
        typer.echo(wrapped(escaped(note)))


def _lines(result: "SearchResult") -> Iterator[str]:
    from qnas.runs.family_text import family_lines
    from qnas.runs.finished_run import asked_devices
    from qnas.runs.latency_text import energy_lines, latency_lines, measured_lines
    from qnas.runs.network_text import choices_by_stage, size_line
    from qnas.runs.pretrained_text import pretrained_lines

    run, space, arch = result.run, result.space, result.arch
    yield from ("", choices_by_stage(space, arch), "")
    if run.family is not None:
        yield from family_lines(run.family)
    asked = run.config["latency"], asked_devices(run)
    yield from latency_lines(run.limits, space, arch, *asked)
    for limit, amount in zip(run.limits, run.found["expected"], strict=True):
        on = f" on {limit.name}" if limit.table is not None and len(run.limits) > 1 else ""
        on += f" at the upper end of {limit.confidence:.4g} intervals" if limit.confidence else ""
        off = f"{amount / limit.limit - 1:+.1%}"
        yield field("", f"expected of the architecture parameters: {limit.describe(amount)}{on}, {off}")
    yield from measured_lines(run.limits, space, arch, *asked)
    yield from energy_lines(run.limits, arch.indices(space))
    yield field("size", size_line(space, run.limits, result.macs, result.params))
    yield from pretrained_lines(space, arch, result.document)
    yield from _comparison(result)
    yield field("files", files_in(result.folder))
    yield next_command(f"qnas train-subnet {result.folder}")


def _trained_px(run: "FinishedRun") -> int:
    """Return the size of the images of the chosen network in its search."""
    if run.family is not None:
        return int(run.family.entry(run.family.layout)["trained_px"])
    return int(run.config["search"]["resolution_px"])


def _comparison(result: "SearchResult") -> Iterator[str]:
    """Describe the accuracy of the derived network and its rivals, with the supernet's weights."""
    from qnas.runs.finalists_text import finalist_lines

    found, random, px = result.run.found, result.random_accuracies, result.space.input.resolution_px
    tested = found["images"]["test"]
    kind = found.get("split_names", {}).get("test", "test")
    at = f"at {_trained_px(result.run)} px"
    yield field("accuracy", f"{result.accuracy:.1%} on {tested} {kind} images {at}, with supernet weights")
    if balanced := balanced_text(result.accuracy, result.balanced_accuracy, digits=1):
        yield field("", balanced)
    if never := never_text(result.never_predicted, len(found.get("classes", ()))):
        yield field("warning", f"{never}; {BALANCING}")
    for name, value in found["derived"].get("metrics", {}).items():
        yield field("", f"{name} {value:.1%}")
    yield field("solved", _solved_for(found["effects"], result.run.config["search"]))
    if (finalists := found.get("finalists")) is None:
        yield field("chosen", choice_line(result.ranking, result.certificate["solved"]))
    else:
        yield from finalist_lines(finalists, result.run.limits, result.space, result.run.family)
    if random:
        lowest = format_ms(min(entry["latency_ms"] for entry in found["random"]))
        known = [entry["balanced_accuracy"] for entry in found["random"] if "balanced_accuracy" in entry]
        beside = balanced_beside(mean(random), mean(known)) if known else ""
        yield field(
            "against",
            f"{mean_and_spread(random)}{beside} for {len(random)} random networks of {lowest} or more at "
            f"{px} px, best {max(random):.1%}",
        )
    else:
        yield field("against", "no random networks to compare with")
    for what, rival in (
        ("the network that MACs alone would choose", found["macs_guided"]),
        ("the network of most MACs within the budget", found["largest"]),
    ):
        if rival is None:
            yield field("", f"{what}: none is within the budget")
        else:
            same = ": the same network" if rival["choices"] == list(result.arch.choices) else ""
            took = f"{format_ms(rival['latency_ms'])} at {px} px, {format_count(rival['macs'])} MACs"
            beside = balanced_beside(rival["accuracy"], rival.get("balanced_accuracy"))
            yield field("", f"{rival['accuracy']:.1%}{beside} for {what} ({took}){same}")
    seeds = found["seeds"]["accuracies"]
    if len(seeds) > 1:
        spread = mean_and_spread([seeds[seed] for seed in sorted(seeds, key=int)])
        yield field("seeds", f"{spread} for the {len(seeds)} runs here that differ only in the seed")


def _solved_for(effects: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> str:
    if settings.get("effect_networks") == 0:
        return "by the probabilities, as asked by --effect-networks 0"
    if effects is None:
        return "by the probabilities: the candidates' effects on the loss could not be measured"
    return (
        f"by the candidates' effects on the loss, fitted to {effects['networks']} networks near the budget; "
        f"they explain {effects['explained']:.0%} of the variance of networks left out"
    )
