"""New solutions of a finished search: for other budgets, or over a device's whole range of budgets.

Solving takes milliseconds and needs no torch; ranking on held-out images needs the run's supernet and data.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qnas.api.limits import AskedLimits, Budgets, limits_once
from qnas.api.results import DerivedNetwork, SearchResult
from qnas.common.arguments import check_arguments
from qnas.common.errors import CheckpointError, DataError, TableError, UsageError
from qnas.common.files import write_json, write_text
from qnas.latency.device import Device, load_device
from qnas.latency.prediction import DEVICE, table_from
from qnas.latency.table import LatencyTable, write_table
from qnas.runs import pareto as budget_fronts
from qnas.runs.family import FamilyRun, solved_document, solved_text
from qnas.runs.finished_run import FinishedRun, asked_devices, check_rankable
from qnas.runs.names import ARCH_FILE, DERIVED_FOLDER, PARETO_FOLDER, SPACE_FILE, SUPERNET_FILE, table_file
from qnas.runs.plots import draw_fronts
from qnas.solver.layouts import FamilyNetwork, layouts_within, mean_limits, solve_family
from qnas.solver.limits import Limits, far_from_searched, latency_limit
from qnas.solver.solve import K_BEST, Solution, solution_document, solve_best
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.family import Layout, layout_of

if TYPE_CHECKING:
    from qnas.api.session import Progress
    from qnas.common.progress import Display
    from qnas.data.loading import GivenData
    from qnas.search.family_selection import RankedAt
    from qnas.search.selection import Ranked
    from qnas.training.losses import LossFunction

Found = TypeVar("Found")


@dataclass(frozen=True, repr=False)
class Derivation(DerivedNetwork):
    """A network from solving a finished search again."""

    searched: SearchResult
    solved: int  # number of networks that the solver returned
    solve_s: float  # seconds that the solve took
    layouts: str  # what was solved of a family's layouts; empty without one
    unranked: str  # why the networks were not ranked on held-out images; empty if they were


def derive(
    result: SearchResult | str | Path,
    budgets: Budgets,
    *,
    max_params: str | int | None = None,
    max_macs: str | int | None = None,
    max_energy: str | None = None,
    confidence: float | None = None,
    latency: str = DEVICE,
    k_best: int | None = None,
    rerank: bool | None = None,
    data: "GivenData | None" = None,
    loss: "LossFunction | None" = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: "Progress" = False,
) -> Derivation:
    """Solve a finished search again for any devices and budgets.

    `budgets` maps devices to latencies with units, such as `{"cpu": "60ms"}`. The solver finds
    the networks with the best search scores exactly; `rerank` ranks them by the supernet's accuracy on
    held-out images (None: if the run's supernet and data are available). `data` and `loss` are needed
    if the search used Datasets or a loss function. Writes `out`, by default `RUN/derived/DEVICE-BUDGET`.

    `confidence` keeps the upper end of the network's latency interval at this level within each budget, in
    place of the prediction.

    After a search over several resolutions, the solve is over all of them again, and its network may be at
    another one than the search's.

    Raises InfeasibleBudgetError if no network is within the limits, CheckpointError if the run is incomplete
    or `out` already holds a network.
    """
    check_arguments(k_best=k_best, loss=loss, progress=progress)
    searched = result if isinstance(result, SearchResult) else SearchResult.load(result)
    run, space = searched.run, searched.space
    asked = AskedLimits.of(budgets, max_params, max_macs, max_energy=max_energy, confidence=confidence)
    folder = Path(out) if out is not None else run.folder / DERIVED_FOLDER / asked.label
    _check_free(folder / ARCH_FILE, force=force)
    started = time.perf_counter()
    keep = k_best or run.config.get("search", {}).get("k_best", K_BEST)
    solved = max(keep, 0 if rerank is False or k_best is not None else run.searched.screened)
    if run.family is None:
        limits = searched_limits = asked.limits(space, latency)
        solutions = solve_best(space, run.searched.scores, limits, solved)
        solve_s, layouts, of_family = time.perf_counter() - started, "", dict[str, Any]()
        count = len(solutions)
        ranked, unranked = _rank_if_possible(run, solutions, keep, rerank, data, loss, progress)
        solution = solutions[0]
    else:
        limits_of = limits_once(asked, latency)
        family = run.family.family
        found = solve_family(family, run.family.scores(run.searched.scores), limits_of, solved)
        within = layouts_within(family, limits_of)
        searched_limits = mean_limits([each.limits for each in within])
        solve_s, layouts = time.perf_counter() - started, solved_text(found)
        placed, unranked = _rank_layouts_if_possible(run, found.networks, keep, rerank, data, loss, progress)
        layout, solution = found.networks[0].layout, found.networks[0].solution
        if placed:
            layout, solution = placed[0].layout, placed[0].ranked.solution
        ranked = tuple(each.ranked for each in placed if each.layout == layout)
        count = len(found.networks)
        space, of_family = family.at(layout), {"family": solved_document(family, found, layout, solution)}
        limits = solution.limits
    ranking = []
    if ranked:
        from qnas.search.selection import ranking_document

        solution, ranking = ranked[0].solution, ranking_document(ranked)
    log_probabilities, pressed = run.searched.log_probabilities, run.searched.pressed
    warning = far_from_searched(log_probabilities, searched_limits, pressed=pressed)
    details = {
        "latency_source": latency,
        "supernet": os.path.relpath(run.folder / SUPERNET_FILE, folder),
        "supernet_sha256": run.document.get("supernet_sha256"),
        **({"pretrained": run.document["pretrained"]} if "pretrained" in run.document else {}),
        "heldout_accuracy": ranking[0]["heldout_accuracy"] if ranking else None,
        "heldout_balanced_accuracy": ranking[0]["heldout_balanced_accuracy"] if ranking else None,
        "ranking": ranking,
        "warning": warning,
        **of_family,
        "seed": run.document.get("seed"),
        "versions": run.document.get("versions", {}),
    }
    document = solution_document(space, solution, details)
    write_text(folder / SPACE_FILE, space.to_yaml())
    for limit in limits:
        if limit.table is not None:
            write_table(limit.table, space, folder / table_file(limit.name))
    write_json(folder / ARCH_FILE, document)
    arch = arch_from_indices(space, solution.indices)
    return Derivation(space, arch, document, folder, searched, count, solve_s, layouts, unranked)


@dataclass(frozen=True)
class ParetoFronts:
    """The best networks by budget, on each device: the content of `pareto.json`."""

    folder: Path
    document: Mapping[str, Any]

    @property
    def points(self) -> list[dict[str, Any]]:
        """All points as rows (device, budget_ms, latency_ms, heldout_accuracy, choices, ...)."""
        return [point for front in self.document["devices"] for point in front["points"]]


def pareto(
    result: SearchResult | str | Path,
    devices: str | Device | Sequence[str | Device] | None = None,
    *,
    latency: str = DEVICE,
    points: int = budget_fronts.POINTS,
    k_best: int = budget_fronts.POINT_K_BEST,
    rerank: bool | None = None,
    data: "GivenData | None" = None,
    loss: "LossFunction | None" = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: "Progress" = False,
) -> ParetoFronts:
    """Solve a finished search for budgets over each device's whole range: latency against accuracy.

    `devices` defaults to those of the search; `points` is the number of budgets per device. The search's
    limits on parameters, MACs and energy still apply. Writes `pareto.csv`, `pareto.json` and `pareto.png` to
    `out`; by default that is `RUN/pareto`, and the run's page is rewritten too. Beside each device's front is
    that of public networks, by their accuracy on ImageNet. After a search over several resolutions, all of
    them are solved over. Raises the errors of `derive`.
    """
    check_arguments(points=points, k_best=k_best, loss=loss, progress=progress)
    searched = result if isinstance(result, SearchResult) else SearchResult.load(result)
    run, folder = searched.run, Path(out) if out is not None else searched.folder / PARETO_FOLDER
    _check_free(folder / "pareto.json", force=force)
    searched_for = {limit.name: limit for limit in run.limits if limit.table is not None}
    asked = [devices] if isinstance(devices, str | Device) else devices
    found = [_table(run, device, latency) for device in (asked_devices(run) if asked is None else asked)]
    if not found:
        raise UsageError(f"`devices={devices!r}`: expected at least one")
    counts = tuple(limit for limit in run.limits if limit.table is None)
    limits, solved, over = [], [], list[dict[Layout, Limits] | None]()
    for table in {table.device: table for table in found}.values():  # an alias is the same device
        own = searched_for.get(table.device)
        confidence = own.confidence if own is not None else None
        limits.append(latency_limit(table, table.slowest_ms, confidence))
        own_ms = own.budget if own is not None else None
        if run.family is None:
            budgets_ms = budget_fronts.spread_budgets(limits[-1], points, own_ms)
            solved.append(budget_fronts.solve_budgets(run, limits[-1], counts, budgets_ms, k_best))
            over.append(None)
        else:
            layouts = _at_layouts(run, run.family, table, latency, confidence)
            ends = [first for first, *_ in layouts.values()]
            least, most = min(e.least for e in ends), max(e.most for e in ends)
            whole = replace(limits[-1], fixed=least, cells=((0.0, most - least),))  # of all layouts
            budgets_ms = budget_fronts.spread_budgets(whole, points, own_ms)
            solved.append(budget_fronts.solve_layouts(run, layouts, budgets_ms, k_best))
            over.append(layouts)
    solutions = {budget_fronts.network_key(run, s): s for each in chain(*solved) for s in each.solutions}
    ranked, unranked = _rank_points(run, list(solutions.values()), rerank, data, loss, progress)
    accuracies = {
        budget_fronts.network_key(run, r.solution): budget_fronts.Accuracy(
            r.heldout.accuracy, r.heldout.images, r.heldout.balanced_accuracy
        )
        for r in ranked
    }
    fronts = []
    for limit, of_budgets, of_layouts in zip(limits, solved, over, strict=True):
        own_ms = searched_for[limit.name].budget if limit.name in searched_for else None
        of_device = budget_fronts.front_points(run, of_budgets, accuracies, own_ms)
        device = limit.table.origin if limit.table is not None and latency == DEVICE else None
        fronts.append(budget_fronts.front_document(run, limit, of_device, own_ms, device, of_layouts))
    details: dict[str, Any] = {"latency_source": latency, "k_best": k_best}
    details |= {"ranked": bool(ranked), "unranked": unranked}
    if run.family is not None:
        details["family"] = run.family.family.name
    document = budget_fronts.fronts_document(run.space, fronts, details)
    write_text(folder / "pareto.csv", budget_fronts.fronts_csv(document))
    draw_fronts(document, folder / "pareto.png")
    write_json(folder / "pareto.json", document)
    if out is None:
        from qnas.runs.report.page import write_report  # imports torch, which solving does not need

        write_report(run.folder)
    return ParetoFronts(folder, document)


def _at_layouts(
    run: FinishedRun, family: FamilyRun, table: LatencyTable, latency: str, confidence: float | None
) -> dict[Layout, Limits]:
    """Return a device's limit and those on counts and energies at each layout, the former of all networks."""
    device, found = table.origin, {}
    for layout in family.family.layouts():
        kept = {limit.name: limit for limit in family.limits_at(layout)}
        own = kept[table.device].table if device is None else None  # of a device made in Python
        space = family.family.at(layout)
        at = own or table_from(latency, device or load_device(table.device), space)
        found[layout] = at, tuple(limit for limit in kept.values() if limit.table is None)
    most_ms = max(at.slowest_ms for at, _ in found.values())
    return {
        layout: (latency_limit(at, most_ms, confidence), *others) for layout, (at, others) in found.items()
    }


def _rank_points(
    run: FinishedRun,
    solutions: Sequence[Solution],
    rerank: bool | None,
    data: "GivenData | None",
    loss: "LossFunction | None",
    progress: "Progress",
) -> "tuple[Sequence[Ranked], str]":
    """Rank the networks of fronts, each at its own layout if there are several."""
    if run.family is None:
        return _rank_if_possible(run, solutions, None, rerank, data, loss, progress)
    networks = [
        FamilyNetwork(layout_of(budget_fronts.space_of(run, each)), each, each.score, each.rank)
        for each in solutions
    ]
    placed, unranked = _rank_layouts_if_possible(run, networks, None, rerank, data, loss, progress)
    return [each.ranked for each in placed], unranked


def _table(run: FinishedRun, device: str | Device, latency: str) -> LatencyTable:
    """Return a device's table: the run's own for a device that was made in Python and is not given again."""
    kept = {limit.name: limit.table for limit in run.limits}
    try:
        known = load_device(device)
    except TableError:
        table = kept.get(str(device)) if latency == DEVICE else None
        if table is None:
            raise
        return table
    return table_from(latency, known, run.space)


def _check_free(file: Path, *, force: bool) -> None:
    if file.exists() and not force:
        raise CheckpointError(f"{file}: exists already: `force=True` replaces it")


def _rank_if_possible(
    run: FinishedRun,
    solutions: Sequence[Solution],
    keep: int | None,
    rerank: bool | None,
    data: "GivenData | None",
    loss: "LossFunction | None",
    progress: "Progress",
) -> "tuple[Sequence[Ranked], str]":
    """Rank networks with the run's supernet; if that is unwanted or impossible, return the reason."""

    def rank(display: "Display") -> "Sequence[Ranked]":
        from qnas.search.selection import rerank_saved

        return rerank_saved(run, solutions, keep, data=data, loss=loss, display=display)

    return _if_possible(run, rank, rerank, progress)


def _rank_layouts_if_possible(
    run: FinishedRun,
    networks: Sequence[FamilyNetwork],
    keep: int | None,
    rerank: bool | None,
    data: "GivenData | None",
    loss: "LossFunction | None",
    progress: "Progress",
) -> "tuple[Sequence[RankedAt], str]":
    """Rank networks of several layouts as `_rank_if_possible` does."""

    def rank(display: "Display") -> "Sequence[RankedAt]":
        from qnas.search.family_selection import rank_saved_layouts

        return rank_saved_layouts(run, networks, keep, data=data, loss=loss, display=display)

    return _if_possible(run, rank, rerank, progress)


def _if_possible(
    run: FinishedRun,
    rank: "Callable[[Display], Sequence[Found]]",
    rerank: bool | None,
    progress: "Progress",
) -> "tuple[Sequence[Found], str]":
    if rerank is False:
        return (), "as asked"
    from qnas.api.session import display_of, threads_set

    try:
        check_rankable(run.folder, run.config)
        with threads_set(run.config["search"]["threads"]):
            return rank(display_of(progress)), ""
    except (CheckpointError, DataError, UsageError) as error:
        if rerank:
            raise
        return (), str(error)
