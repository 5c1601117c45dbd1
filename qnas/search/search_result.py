"""The result of a search: the derived network, its certificate, and a comparison with its rivals.

The derived network is the first that `search.selection` ranks, or the best finalist (`search.finalists`). It
is compared, on the test images and with
the same supernet's weights, with random networks of its latency, the network that MACs alone would choose,
and the largest network within the budget, and with the derived networks of the same search under other seeds
whose runs lie beside this one. None of these figures influences the choice.
"""

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from qnas.common.errors import CheckpointError
from qnas.common.files import write_json
from qnas.common.progress import Display, silent
from qnas.data.broken_images import broken_copies
from qnas.data.left_out import left_out_facts, write_left_out
from qnas.latency.prediction import DEVICE, predict_arch
from qnas.latency.table import table_text
from qnas.nn.pretrained.derivation import own_choices
from qnas.runs import names
from qnas.runs.documents import read_search_document
from qnas.runs.folders import read_config
from qnas.runs.metrics import read_metrics
from qnas.runs.plots import draw_budget
from qnas.runs.report.page import close_with_report
from qnas.runs.run_folder import opened, remove_states
from qnas.runs.tensors import save_supernet
from qnas.search.evaluator import Evaluator, evaluator_of
from qnas.search.family_result import write_family
from qnas.search.family_selection import FamilySelection, select_of_family
from qnas.search.finalists import (
    Finals,
    finals_document,
    hold_finals,
    save_weights,
    winner_document,
)
from qnas.search.problem import Problem
from qnas.search.searcher import Searcher
from qnas.search.selection import Ranked, Selection, count_screened, ranking_document, rerank, select
from qnas.search.state import SearchState
from qnas.solver.distributions import sample_near
from qnas.solver.kinds import corrected, kinds_of
from qnas.solver.limits import beside_latency
from qnas.solver.solve import CandidateIndices, largest, macs_guided, solution_document
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.lower import count_macs, lower
from qnas.training.loop import run_to_end
from qnas.training.processes import World, joined
from qnas.training.recipe import TrainConfig

RANDOM_WINDOW = 0.97  # random networks have this share of the derived network's latency or more, up to all


def run_search(
    searcher: Searcher,
    folder: Path,
    request: Mapping[str, Any],
    *,
    finalists: TrainConfig | None = None,
    resume: bool = False,
    force: bool = False,
    display: Display = silent,
) -> Selection:
    """Search to the end in a run folder, write the results there, and return the ranked networks.

    Of a family, these are the networks at the chosen layout.

    `request` goes to config.json. `finalists` is their training where the configuration has any. Raises
    CheckpointError where the folder cannot be used, Interrupted once the state is saved after Ctrl-C or
    SIGTERM.
    """
    problem = searcher.problem
    request = {"search": problem.config.record() | problem.objective.record(), **request}
    if finalists is not None:
        request["finalists"] = finalists.record()
    copies = {
        **_space_copies(problem),
        **broken_copies(names.BROKEN_FILE, problem.data.broken),
    }
    seed, world = problem.config.seed, problem.world
    with opened(folder, request, copies, result=names.ARCH_FILE, resume=resume, force=force):
        write_left_out(folder / names.LEFT_OUT_FILE, problem.data.left_out)
        with _together(world, finalists):
            run_to_end(searcher, folder, seed=seed, resume=resume, display=display, world=world)
            selection, finals = _choose(searcher.state, folder, finalists, display)
        return _finish(searcher.state, selection, finals, folder, request, display)


def _space_copies(problem: Problem) -> dict[str, str]:
    """Return the texts of the space and its tables; of a family, whose space is chosen last, its own."""
    if problem.family is not None:
        return {names.FAMILY_SPACE_FILE: problem.family.family.to_yaml()}
    tables = [limit.table for limit in problem.limits if limit.table is not None]
    return {
        names.SPACE_FILE: problem.space.to_yaml(),
        **{names.table_file(table.device): table_text(table, problem.space) for table in tables},
    }


def follow_search(searcher: Searcher, *, finalists: TrainConfig | None = None, resume: bool = False) -> None:
    """Take all steps of a search in a process that is not the main one, which writes the results."""
    problem = searcher.problem
    with _together(problem.world, finalists):
        run_to_end(searcher, Path(), seed=problem.config.seed, resume=resume, world=problem.world)
        if finalists is not None:
            _choose(searcher.state, Path(), finalists, silent)


@contextmanager
def _together(world: World, finalists: TrainConfig | None) -> Iterator[None]:
    """Keep the processes connected between the last step of a search and the trainings of its finalists."""
    if finalists is None:
        yield
        return
    with joined(world), world.watched():
        yield


def _choose(
    state: SearchState, folder: Path, finalists: TrainConfig | None, display: Display
) -> tuple[Selection | FamilySelection, Finals | None]:
    """Select the best networks by the supernet, and hold the finals where there are finalists.

    With several processes, each selects, so that none waits for another for longer than processes may.
    """
    over_family = state.problem.family is not None
    selection = select_of_family(state, display) if over_family else select(state, display)
    if finalists is None:
        return selection, None
    return selection, hold_finals(state, selection, folder, finalists, display)


def _winner(state: SearchState, selection: Selection, finals: Finals | None) -> Ranked:
    """Return the derived network: the first of the ranking, or the best finalist, ranked alike."""
    if finals is None:
        return selection.ranking[0]
    problem, solution = state.problem, finals.winner.solution
    return rerank(problem.space, [solution], problem.data, evaluator_of(state).classify)[0]


def _finish(
    state: SearchState,
    selection: Selection | FamilySelection,
    finals: Finals | None,
    folder: Path,
    request: Mapping[str, Any],
    display: Display,
) -> Selection:
    """Compare the chosen network, and write the files of a search that has taken its last step.

    Those of a search over a family are of the space at the chosen layout, whose networks are returned.
    """
    family = None
    if isinstance(selection, Selection):
        winner = _winner(state, selection, finals)
    else:
        assert state.problem.family is not None
        family = state.problem.family.family
        layout = finals.winner.layout if finals is not None else selection.ranking[0].layout
        own = state.at(layout)
        of_layout = selection.at(layout, own.problem.space)
        winner = _winner(own, of_layout, finals)
        write_family(state, selection, layout, winner, folder)
        state, selection = own, replace(of_layout, ranking=of_layout.ranking or (winner,))
    found = _search_document(state, selection, winner, finals, folder, display)
    of_finals = {}
    if finals is not None:
        weights_sha256 = save_weights(finals, folder)
        found["finalists"] = finals_document(finals, state.problem.space, weights_sha256, family)
        of_finals = {"finalist": winner_document(finals, weights_sha256)}
    metrics, plot = read_metrics(folder / names.METRICS_FILE), folder / names.BUDGET_PLOT_FILE
    draw_budget(metrics, plot, multiplier_bound=state.multiplier.bound)
    write_json(folder / names.SEARCH_FILE, found | {"layers": _layers(state.problem, winner.arch, request)})
    supernet_sha256 = save_supernet(folder / names.SUPERNET_FILE, state.supernet.state_dict())
    details = {
        "supernet_sha256": supernet_sha256,
        "latency_source": request.get("latency"),
        "supernet_accuracy": found["derived"]["accuracy"],
        "supernet_balanced_accuracy": found["derived"]["balanced_accuracy"],
        "heldout_accuracy": winner.heldout.accuracy,
        "heldout_balanced_accuracy": winner.heldout.balanced_accuracy,
        **of_finals,
        **_pretrained(state.problem),
        "seed": state.problem.config.seed,
        "versions": request.get("versions", {}),
    }
    document = solution_document(state.problem.space, winner.solution, details)
    close_with_report(folder, {names.ARCH_FILE: document})
    # last, since its presence marks the run as complete
    write_json(folder / names.ARCH_FILE, document)
    remove_states(folder)
    return selection


def _pretrained(problem: Problem) -> dict[str, Any]:
    """Return what arch.json says of the network whose weights the search started from, if there is one."""
    network = problem.pretrained
    if network is None:
        return {}
    return {"pretrained": network.record() | {"choices": list(own_choices(problem.space, network.space))}}


def _search_document(
    state: SearchState,
    selection: Selection,
    winner: Ranked,
    finals: Finals | None,
    folder: Path,
    display: Display,
) -> dict[str, Any]:
    """Return the content of search.json without the layers and the finalists."""
    problem, effects = state.problem, selection.effects
    compared = _compare(state, selection, winner, finals, display)
    by_seed = {**seeds_beside(folder), problem.config.seed: float(compared["derived"]["accuracy"])}
    accuracies = list(by_seed.values())
    return {
        "schema": "qnas.search/1",
        "expected_ms": float(state.expected[0]),
        "expected": [float(amount) for amount in state.expected],
        "budget_binds": problem.binds,
        "images": problem.data.counts,
        "classes": list(problem.data.classes),
        "broken_images": len(problem.data.broken),
        **left_out_facts(problem.data.left_out, problem.data.split_names),
        "log_probabilities": state.log_probabilities,
        "effects": asdict(effects) if effects else None,
        "screened": count_screened(problem),
        "ranking": ranking_document(selection.ranking),
        **compared,
        "seeds": {
            "accuracies": {str(seed): by_seed[seed] for seed in sorted(by_seed)},
            "mean": statistics.mean(accuracies),
            "sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        },
    }


def _compare(
    state: SearchState, selection: Selection, winner: Ranked, finals: Finals | None, display: Display
) -> dict[str, Any]:
    """Evaluate the derived network and its rivals on the test images; return them as JSON values."""
    problem = state.problem
    space, limits, latency_ms = problem.space, problem.limits, winner.solution.latency_ms
    table = limits[0].table
    assert table is not None, "the first limit is a device's"
    count, rng = problem.config.random_networks, np.random.default_rng(problem.config.seed)
    random = sample_near(
        table, RANDOM_WINDOW * latency_ms, latency_ms, count, rng, within=beside_latency(limits)
    )
    derived, most = winner.solution.indices, largest(space, limits).indices
    scores = selection.scores
    if finals is not None:
        scores = corrected(scores, kinds_of(space), finals.biases)
    guided = macs_guided(space, scores, limits)
    networks = dict.fromkeys([derived, most, *([guided.indices] if guided else []), *random])
    evaluator, tested = evaluator_of(state), dict[CandidateIndices, dict[str, Any]]()
    with display(len(networks), "compare") as progress:
        for indices in networks:
            tested[indices] = _test(problem, evaluator, indices)
            progress.step()
    return {
        "derived": tested[derived]
        | {
            "heldout_accuracy": winner.heldout.accuracy,
            "heldout_balanced_accuracy": winner.heldout.balanced_accuracy,
        },
        "random": [tested[indices] for indices in random],
        "macs_guided": tested[guided.indices] if guided else None,
        "largest": tested[most],
    }


def _test(problem: Problem, evaluator: Evaluator, indices: CandidateIndices) -> dict[str, Any]:
    """Evaluate a network with the supernet's weights on the test images; return it as JSON values."""
    arch = arch_from_indices(problem.space, indices)
    found = evaluator.classify(arch, problem.data.test)
    amounts = [limit.amount(indices) for limit in problem.limits]
    metrics, score = problem.objective.figures(found.predicted, found.labels), found.score
    return {
        "choices": list(arch.choices),
        "latency_ms": problem.limits[0].latency_ms(indices),
        "amounts": amounts,
        "macs": count_macs(lower(problem.space, arch)),
        "accuracy": score.accuracy,
        "balanced_accuracy": score.balanced_accuracy,
        "never_predicted": found.never_predicted(problem.data.classes),
        **({"metrics": metrics} if metrics else {}),
    }


def _layers(problem: Problem, arch: Arch, request: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the latency of each kernel of a network, on each device with a limit."""
    latency = request.get("latency", DEVICE)
    devices = [limit.table.origin for limit in problem.limits if limit.table and limit.table.origin]
    return {
        device.name: [vars(part) for part in predict_arch(latency, device, problem.space, arch).parts]
        for device in devices
    }


def seeds_beside(folder: Path) -> dict[int, float]:
    """Return the test accuracies of the derived networks of finished runs beside this one, by seed.

    Only runs whose requests equal this one's apart from the seed count; versions may differ.
    """
    asked = _without_seed(read_config(folder))
    found: dict[int, float] = {}
    for path in sorted(folder.resolve().parent.glob(f"*/{names.CONFIG_FILE}")):
        if path.parent == folder.resolve() or not (path.parent / names.ARCH_FILE).is_file():
            continue
        try:
            config = read_config(path.parent)
            if _without_seed(config) == asked:
                found[config["search"]["seed"]] = read_search_document(path.parent)["derived"]["accuracy"]
        except (CheckpointError, KeyError):
            continue  # not a complete run of qnas
    return found


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    search = config.get("search")
    if isinstance(search, dict):
        search = search | {"seed": None}
    return {**config, "versions": None, "search": search}
