"""New solutions of a finished search: for other budgets, or over a device's whole range of budgets.

Solving takes milliseconds and needs no torch; ranking on held-out images needs the run's supernet and data.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnas.api.limits import AskedLimits, Budgets
from qnas.api.results import DerivedNetwork, SearchResult
from qnas.common.arguments import check_arguments
from qnas.common.errors import CheckpointError, DataError, TableError, UsageError
from qnas.common.files import write_json, write_text
from qnas.latency.device import Device, load_device
from qnas.latency.prediction import DEVICE, table_from
from qnas.latency.table import LatencyTable, write_table
from qnas.runs import pareto as budget_fronts
from qnas.runs.finished_run import FinishedRun, asked_devices, check_rankable
from qnas.runs.names import ARCH_FILE, DERIVED_FOLDER, PARETO_FOLDER, SPACE_FILE, SUPERNET_FILE, table_file
from qnas.runs.plots import draw_fronts
from qnas.solver.limits import far_from_searched, latency_limit
from qnas.solver.solve import K_BEST, CandidateIndices, Solution, solution_document, solve_best
from qnas.spaces.arch import arch_from_indices

if TYPE_CHECKING:
    from qnas.api.session import Progress
    from qnas.data.loading import GivenData
    from qnas.search.selection import Ranked
    from qnas.training.losses import LossFunction


@dataclass(frozen=True, repr=False)
class Derivation(DerivedNetwork):
    """A network from solving a finished search again."""

    searched: SearchResult
    solved: int  # number of networks that the solver returned
    solve_s: float  # seconds that the solve took
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

    Raises InfeasibleBudgetError if no network is within the limits, CheckpointError if the run is incomplete
    or `out` already holds a network.
    """
    check_arguments(k_best=k_best, loss=loss, progress=progress)
    searched = result if isinstance(result, SearchResult) else SearchResult.load(result)
    run, space = searched.run, searched.space
    asked = AskedLimits.of(budgets, max_params, max_macs, max_energy=max_energy, confidence=confidence)
    limits = asked.limits(space, latency)
    folder = Path(out) if out is not None else run.folder / DERIVED_FOLDER / asked.label
    _check_free(folder / ARCH_FILE, force=force)
    started = time.perf_counter()
    keep = k_best or run.config.get("search", {}).get("k_best", K_BEST)
    solved = max(keep, 0 if rerank is False or k_best is not None else run.searched.screened)
    solutions = solve_best(space, run.searched.scores, limits, solved)
    solve_s = time.perf_counter() - started
    ranked, unranked = _rank_if_possible(run, solutions, keep, rerank, data, loss, progress)
    solution, ranking = solutions[0], []
    if ranked:
        from qnas.search.selection import ranking_document

        solution, ranking = ranked[0].solution, ranking_document(ranked)
    warning = far_from_searched(run.searched.log_probabilities, limits, pressed=run.searched.pressed)
    details = {
        "latency_source": latency,
        "supernet": os.path.relpath(run.folder / SUPERNET_FILE, folder),
        "supernet_sha256": run.document.get("supernet_sha256"),
        **({"pretrained": run.document["pretrained"]} if "pretrained" in run.document else {}),
        "heldout_accuracy": ranking[0]["heldout_accuracy"] if ranking else None,
        "heldout_balanced_accuracy": ranking[0]["heldout_balanced_accuracy"] if ranking else None,
        "ranking": ranking,
        "warning": warning,
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
    return Derivation(space, arch, document, folder, searched, len(solutions), solve_s, unranked)


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
    that of public networks, by their accuracy on ImageNet. Raises the errors of `derive`.
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
    limits, solved = [], []
    for table in {table.device: table for table in found}.values():  # an alias is the same device
        own = searched_for.get(table.device)
        limits.append(latency_limit(table, table.slowest_ms, own.confidence if own is not None else None))
        own_ms = own.budget if own is not None else None
        budgets_ms = budget_fronts.spread_budgets(limits[-1], points, own_ms)
        solved.append(budget_fronts.solve_budgets(run, limits[-1], counts, budgets_ms, k_best))
    solutions = {s.indices: s for each in chain(*solved) for s in each.solutions}
    ranked, unranked = _rank_if_possible(run, list(solutions.values()), None, rerank, data, loss, progress)
    accuracies: dict[CandidateIndices, budget_fronts.Accuracy] = {
        r.solution.indices: budget_fronts.Accuracy(
            r.heldout.accuracy, r.heldout.images, r.heldout.balanced_accuracy
        )
        for r in ranked
    }
    fronts = []
    for limit, of_budgets in zip(limits, solved, strict=True):
        own_ms = searched_for[limit.name].budget if limit.name in searched_for else None
        of_device = budget_fronts.front_points(run, of_budgets, accuracies, own_ms)
        device = limit.table.origin if limit.table is not None and latency == DEVICE else None
        fronts.append(budget_fronts.front_document(run, limit, of_device, own_ms, device))
    details = {"latency_source": latency, "k_best": k_best, "ranked": bool(ranked), "unranked": unranked}
    document = budget_fronts.fronts_document(run.space, fronts, details)
    write_text(folder / "pareto.csv", budget_fronts.fronts_csv(document))
    draw_fronts(document, folder / "pareto.png")
    write_json(folder / "pareto.json", document)
    if out is None:
        from qnas.runs.report.page import write_report  # imports torch, which solving does not need

        write_report(run.folder)
    return ParetoFronts(folder, document)


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
    if rerank is False:
        return (), "as asked"
    from qnas.api.session import display_of, threads_set
    from qnas.search.selection import rerank_saved

    try:
        check_rankable(run.folder, run.config)
        with threads_set(run.config["search"]["threads"]):
            display = display_of(progress)
            return rerank_saved(run, solutions, keep, data=data, loss=loss, display=display), ""
    except (CheckpointError, DataError, UsageError) as error:
        if rerank:
            raise
        return (), str(error)
