"""The result of a search: the network, its certificate, and a comparison with its rivals.

The candidates' effects on the held-out loss are measured, and the best networks by them are solved for (by
the probabilities where effects cannot be told). Those that do best on some held-out images are ranked by all
of these (`search.rerank`), and the first is the derived network. It is compared, on the test images and with
the same supernet's weights, with cheaper alternatives: random networks of its latency, the network that MACs
alone would choose, and the largest within the budget; and with the same search under other seeds where such
runs lie beside this one. None of these figures chooses anything.
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qnas.common.errors import CheckpointError
from qnas.common.files import read_json, write_json
from qnas.common.progress import Display, silent
from qnas.data.broken_images import broken_copies
from qnas.latency.prediction import DEVICE, predict_arch
from qnas.latency.table_file import table_text
from qnas.runs.checkpoint import Checkpoints
from qnas.runs.folders import read_config
from qnas.runs.metrics import read_metrics
from qnas.runs.names import (
    ARCH_FILE,
    BROKEN_FILE,
    BUDGET_PLOT_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    SEARCH_FILE,
    SPACE_FILE,
    SUPERNET_FILE,
    table_file,
)
from qnas.runs.plots import draw_budget
from qnas.runs.report.page import close_with_report
from qnas.runs.run_folder import opened
from qnas.runs.tensors import save_supernet
from qnas.search.evaluator import Evaluator, evaluator_of
from qnas.search.problem import Problem
from qnas.search.rerank import Ranked, ranking_document
from qnas.search.searcher import Searcher
from qnas.search.selection import Selection, count_screened, select
from qnas.search.state import SearchState
from qnas.solver.limits import Limits
from qnas.solver.sampling import sample_near
from qnas.solver.solution_document import solution_document
from qnas.solver.solve import CandidateIndices, Solution, largest, macs_guided
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import count_macs, lower
from qnas.spaces.space import SearchSpace
from qnas.training.loop import run_to_end

RANDOM_WINDOW = 0.97  # random networks lie between this share of the derived network's latency and it


@dataclass(frozen=True)
class NetworkScore:
    """A network of the supernet, and its score on the test images with inherited weights."""

    arch: Arch
    amounts: tuple[float, ...]  # by limit; the first is the latency on the first device
    macs: int
    accuracy: float
    metrics: Mapping[str, float]  # beside it, by name, where there are any

    @property
    def latency_ms(self) -> float:
        """The latency on the first device."""
        return self.amounts[0]


@dataclass(frozen=True)
class Rivals:
    """The networks that the derived one is compared with, all within the same limits."""

    random: tuple[NetworkScore, ...]  # of nearly its latency
    macs_guided: NetworkScore | None  # chosen by the same scores under a limit on MACs; None: none is
    largest: NetworkScore  # of the most MACs


@dataclass(frozen=True)
class FinishedSearch:
    """The result of a finished search."""

    searcher: Searcher
    folder: Path
    selection: Selection
    derived: NetworkScore  # the first of its ranking
    rivals: Rivals
    by_seed: Mapping[int, float]  # test accuracy of what this search derived, and its likes with other seeds

    @property
    def ranking(self) -> tuple[Ranked, ...]:
        """The k best networks by held-out images."""
        return self.selection.ranking

    @property
    def solution(self) -> Solution:
        """The derived network's certificate."""
        return self.ranking[0].solution


def run_search(
    searcher: Searcher,
    folder: Path,
    request: Mapping[str, Any],
    *,
    resume: bool = False,
    force: bool = False,
    display: Display = silent,
) -> FinishedSearch:
    """Search to the end in a run folder, and write what was found.

    `request` is what was asked, for config.json. Raises CheckpointError where the folder cannot be
    used, Interrupted once the state is saved after Ctrl-C or SIGTERM.
    """
    problem = searcher.problem
    request = {"search": problem.config.record() | problem.objective.record(), **request}
    copies = {
        SPACE_FILE: problem.space.to_yaml(),
        **{
            table_file(limit.name): table_text(limit.table, problem.space)
            for limit in problem.limits
            if limit.table is not None
        },
        **broken_copies(BROKEN_FILE, problem.data.broken),
    }
    seed, world = problem.config.seed, problem.world
    with opened(folder, request, copies, result=ARCH_FILE, resume=resume, force=force):
        run_to_end(searcher, folder, seed=seed, resume=resume, display=display, world=world)
        return _finish(searcher, folder, request, display)


def _finish(searcher: Searcher, folder: Path, request: Mapping[str, Any], display: Display) -> FinishedSearch:
    """Select a network, compare it, and write the files of a search that has taken its last step."""
    state, problem = searcher.state, searcher.problem
    selection = select(state, display)
    derived, rivals = _compare(state, selection, display)
    by_seed = {**seeds_beside(folder), problem.config.seed: derived.accuracy}
    result = FinishedSearch(searcher, folder, selection, derived, rivals, by_seed)
    draw_budget(
        read_metrics(folder / METRICS_FILE),
        folder / BUDGET_PLOT_FILE,
        multiplier_bound=state.multiplier.bound,
    )
    layers = _layers(problem.space, derived.arch, problem.limits, request.get("latency", DEVICE))
    write_json(folder / SEARCH_FILE, _search_document(result) | {"layers": layers})
    save_supernet(folder / SUPERNET_FILE, state.supernet.state_dict())
    document = _arch_document(result, request)
    close_with_report(folder, {ARCH_FILE: document})
    # last, since its presence says that the run is complete
    write_json(folder / ARCH_FILE, document)
    Checkpoints(folder).remove()
    return result


def _compare(state: SearchState, selection: Selection, display: Display) -> tuple[NetworkScore, Rivals]:
    """Evaluate the derived network and its rivals on the test images."""
    problem, solution = state.problem, selection.ranking[0].solution
    space, limits, latency_ms = problem.space, problem.limits, solution.latency_ms
    table = limits[0].table
    assert table is not None, "the first limit is a device's"
    random = sample_near(
        table,
        RANDOM_WINDOW * latency_ms,
        latency_ms,
        problem.config.random_networks,
        np.random.default_rng(problem.config.seed),
        within=limits[1:],
    )
    guided = macs_guided(space, selection.scores, limits)
    most = largest(space, limits)
    networks = [solution.indices, most.indices, *([guided.indices] if guided else []), *random]
    evaluator, tested = evaluator_of(state), dict[CandidateIndices, NetworkScore]()
    with display(len(set(networks)), "compare") as progress:
        for indices in networks:
            if indices not in tested:
                tested[indices] = network_score(problem, evaluator, indices)
                progress.step()
    return tested[solution.indices], Rivals(
        random=tuple(tested[indices] for indices in random),
        macs_guided=tested[guided.indices] if guided else None,
        largest=tested[most.indices],
    )


def network_score(problem: Problem, evaluator: Evaluator, indices: CandidateIndices) -> NetworkScore:
    """Evaluate a network of the supernet, given by its candidates' indices, on the test images."""
    arch = arch_from_indices(problem.space, indices)
    found = evaluator.classify(arch, problem.data.test)
    return NetworkScore(
        arch,
        tuple(limit.amount(indices) for limit in problem.limits),
        count_macs(lower(problem.space, arch)),
        found.score.accuracy,
        problem.objective.figures(found.predicted, found.labels),
    )


def seeds_beside(folder: Path) -> dict[int, float]:
    """Return the derived networks' test accuracies of finished runs beside this one, by seed.

    Only runs count whose requests differ in nothing but the seed; versions may differ.
    """
    asked = _without_seed(read_config(folder))
    found: dict[int, float] = {}
    for path in sorted(folder.resolve().parent.glob(f"*/{CONFIG_FILE}")):
        if path.parent == folder.resolve() or not (path.parent / ARCH_FILE).is_file():
            continue
        try:
            config = read_json(path, CheckpointError)
            if _without_seed(config) == asked:
                document = read_json(path.parent / SEARCH_FILE, CheckpointError)
                found[int(config["search"]["seed"])] = float(document["derived"]["accuracy"])
        except (CheckpointError, OSError, KeyError, TypeError, ValueError):
            continue  # not a whole run of ours, which is nothing to stop for
    return found


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    search = config.get("search")
    rest = {key: value for key, value in config.items() if key not in ("versions", "search")}
    return rest | {
        "search": {key: value for key, value in search.items() if key != "seed"}
        if isinstance(search, dict)
        else search
    }


def _search_document(result: FinishedSearch) -> dict[str, Any]:
    def entry(score: NetworkScore) -> dict[str, Any]:
        return {
            "choices": list(score.arch.choices),
            "latency_ms": score.latency_ms,
            "amounts": list(score.amounts),
            "macs": score.macs,
            "accuracy": score.accuracy,
            **({"metrics": score.metrics} if score.metrics else {}),
        }

    rivals, accuracies = result.rivals, list(result.by_seed.values())
    state, problem, effects = result.searcher.state, result.searcher.problem, result.selection.effects
    return {
        "schema": "qnas.search/1",
        "expected_ms": float(state.expected[0]),
        "expected": [float(amount) for amount in state.expected],
        "budget_binds": problem.binds,
        "images": problem.data.counts,
        "broken_images": len(problem.data.broken),
        "log_probabilities": state.log_probabilities,
        "effects": asdict(effects) if effects else None,
        "screened": count_screened(problem),
        "ranking": ranking_document(result.ranking),
        "derived": entry(result.derived) | {"heldout_accuracy": result.ranking[0].heldout.accuracy},
        "random": [entry(score) for score in rivals.random],
        "macs_guided": entry(rivals.macs_guided) if rivals.macs_guided else None,
        "largest": entry(rivals.largest),
        "seeds": {
            "accuracies": {str(seed): result.by_seed[seed] for seed in sorted(result.by_seed)},
            "mean": statistics.mean(accuracies),
            "sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        },
    }


def _layers(space: SearchSpace, arch: Arch, limits: Limits, latency: str) -> dict[str, list[dict[str, Any]]]:
    """Return the latency of each kernel of a network on each device that it is limited on."""
    devices = [limit.table.origin for limit in limits if limit.table is not None]
    return {
        device.name: [vars(part) for part in predict_arch(latency, device, space, arch).parts]
        for device in devices
        if device is not None
    }


def _arch_document(result: FinishedSearch, request: Mapping[str, Any]) -> dict[str, Any]:
    details = {
        "latency_source": request.get("latency"),
        "supernet_accuracy": result.derived.accuracy,
        "heldout_accuracy": result.ranking[0].heldout.accuracy,
        "seed": result.searcher.problem.config.seed,
        "versions": request.get("versions", {}),
    }
    return solution_document(result.searcher.problem.space, result.solution, details)
