"""`qnas derive` and `qnas pareto`: new solutions of a finished search, without training."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qnas.commands import completion, options
from qnas.commands.options import option
from qnas.runs.folders import latest_run
from qnas.runs.text import choice_line, field, files_in, next_command

if TYPE_CHECKING:
    from qnas.api.deriving import Derivation


def derive(
    device: options.Devices = None,
    budget: options.Budgets = None,
    max_params: options.MaxParams = None,
    max_macs: options.MaxMacs = None,
    max_energy: options.MaxEnergy = None,
    confidence: options.Confidence = None,
    source: options.Run = None,
    latency: options.Latency = "device",
    k_best: Annotated[
        int | None,
        option("Networks to solve for and rank. Default: --k-best and --screened of the search.", least=1),
    ] = None,
    rerank: options.Rerank = None,
    out: Annotated[Path | None, option("Default: RUN/derived/DEVICE-BUDGET.")] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Solve a finished search again for any devices and budgets.

    The scores are those of the search: the further a budget is from the searched one, the more a new
    search would gain.

    Example: qnas derive runs/union-mobile-vpu-30ms --device cpu --budget 60ms
    """
    from qnas.api.deriving import derive as derive_network

    pairs = options.pair_budgets(device, budget)
    found = derive_network(
        source or latest_run(),
        pairs,
        max_params=max_params,
        max_macs=max_macs,
        max_energy=max_energy,
        confidence=confidence,
        latency=latency,
        k_best=k_best,
        rerank=rerank,
        out=out,
        force=force,
        progress=options.progress(quiet),
    )
    devices = [name for name, _ in pairs]
    lines = _derived_lines(found, devices, latency, says_why=rerank is not False)
    options.show({"folder": str(found.folder), **found.document}, lines, as_json=as_json)


def _derived_lines(found: "Derivation", devices: list[str], latency: str, *, says_why: bool) -> Iterator[str]:
    from qnas.runs.latency_text import describe_budgets, energy_lines, latency_lines, measured_lines
    from qnas.runs.network_text import choices_by_stage, size_line
    from qnas.runs.pretrained_text import pretrained_lines

    space, arch, limits = found.space, found.arch, found.limits
    yield from (choices_by_stage(space, arch), "")
    yield from latency_lines(limits, space, arch, latency, devices)
    yield from measured_lines(limits, space, arch, latency, devices)
    yield from energy_lines(limits, arch.indices(space))
    yield field("size", size_line(space, limits, found.macs, found.params))
    yield from pretrained_lines(space, arch, found.document)
    of_layouts = f", with {found.layouts} solved" if found.layouts else ""
    networks = f"the {found.solved} best networks within the budget"
    yield field("solved", f"{networks} in {found.solve_s:.2f} s{of_layouts}")
    if ranking := found.document["ranking"]:
        yield field("chosen", choice_line(ranking, found.solved))
    else:
        why = f", not ranked on held-out images: {found.unranked}" if says_why else ""
        yield field("chosen", f"the first network by the search's scores{why}")
    searched_px = found.searched.space.input.resolution_px
    searched_for = describe_budgets(found.searched.document["limits"])
    yield field("searched", f"for {searched_for}, at {searched_px} px")
    if found.warning:
        yield field("warning", found.warning)
    yield field("files", files_in(found.folder))
    yield next_command(f"qnas train-subnet {found.folder}")


def pareto(
    source: options.Run = None,
    device: Annotated[
        str | None,
        option(
            "Devices, separated by commas: names, aliases or paths of device files. Default: those of the "
            "search.",
            complete=completion.device_lists,
        ),
    ] = None,
    latency: options.Latency = "device",
    points: Annotated[int, option("Budgets per device.", least=2)] = 12,
    k_best: Annotated[int, option("Networks to solve for and rank per budget.", least=1)] = 5,
    rerank: options.Rerank = None,
    out: Annotated[Path | None, option("Default: RUN/pareto.")] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Solve a finished search for budgets over each device's whole range: latency against accuracy.

    Writes pareto.csv, pareto.json and pareto.png, and without --out also the run's page. The search's limits
    on parameters, MACs and energy still apply.

    Example: qnas pareto runs/union-mobile-vpu-30ms --device cpu,vpu,gpu
    """
    from qnas.api.deriving import pareto as solve_fronts
    from qnas.runs.run_text import describe_fronts

    found = solve_fronts(
        source or latest_run(),
        None if device is None else [name.strip() for name in device.split(",")],
        latency=latency,
        points=points,
        k_best=k_best,
        rerank=rerank,
        out=out,
        force=force,
        progress=options.progress(quiet),
    )
    lines = (describe_fronts(found.document), "", field("files", files_in(found.folder)))
    options.show({"folder": str(found.folder), **found.document}, lines, as_json=as_json)
