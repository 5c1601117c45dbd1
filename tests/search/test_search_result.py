"""One small search, and all facts in its result."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.searches import QUICK
from helpers.tiny import TINY_SPACE

from qnas.common.errors import CheckpointError, DataError
from qnas.common.progress import Report, reporting_to
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.runs.finished_run import read_finished_run, read_searched
from qnas.runs.folders import read_config
from qnas.runs.found_arch import find_arch
from qnas.runs.metrics import read_metrics
from qnas.runs.names import ARCH_FILE, BUDGET_PLOT_FILE, CONFIG_FILE, METRICS_FILE, SEARCH_FILE
from qnas.runs.plots import draw_budget
from qnas.search.evaluator import evaluator_of
from qnas.search.search_result import RANDOM_WINDOW, run_search, seeds_beside
from qnas.search.searcher import Searcher
from qnas.search.selection import Selection, effects_of, ranking_document, rerank_saved, screen
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.solver.solve import largest, macs_guided, solve_best
from qnas.spaces.arch import Arch
from qnas.spaces.lower import count_params, lower
from qnas.spaces.space import SearchSpace, parse_space
from qnas.training.losses import CROSS_ENTROPY

CONFIG = QUICK.override({"effect_networks": 60, "k_best": 6, "screened": 12, "random_networks": 4})


@dataclass(frozen=True)
class Finished:
    """A search that ran, and what it wrote."""

    space: SearchSpace
    limits: Limits
    data: ImageData
    searcher: Searcher
    selection: Selection
    folder: Path
    config: dict[str, Any]
    document: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    space = parse_space(TINY_SPACE, "tiny.yaml")
    data = load_data(parse_data_spec("digits"), resolution_px=8, quiet=True)
    table, other = (compute_table(load_device(name), space) for name in ("vpu", "cpu"))
    # on the second device kernels cost otherwise: of networks that are alike on the first some are over it
    rng = np.random.default_rng(0)
    shuffled = replace(other, cells=tuple(tuple(rng.permutation(np.array(row))) for row in other.cells))
    limits = (
        latency_limit(table, 0.8 * table.slowest_ms),
        latency_limit(shuffled, (shuffled.fastest_ms + shuffled.slowest_ms) / 2),
        count_limit(space, "params", 5000),
    )
    folder = tmp_path_factory.mktemp("runs") / "run"
    request = {"data": "digits", "data_digest": data.digest}
    searcher = Searcher(space, limits, data, CONFIG)
    selection = run_search(searcher, folder, request)
    config = read_config(folder)
    document = json.loads((folder / SEARCH_FILE).read_text())
    return Finished(space, limits, data, searcher, selection, folder, config, document)


def arch_params(finished: Finished, choices: list[str]) -> int:
    return count_params(lower(finished.space, Arch(tuple(choices))))


def test_the_derived_network_is_the_winner_among_the_k_best(finished: Finished) -> None:
    ranking = finished.document["ranking"]
    assert len(ranking) == 6
    assert len({entry["rank"] for entry in ranking}) == 6
    assert {entry["rank"] for entry in ranking} <= set(range(1, 13))
    level = [entry for entry in ranking if entry["level"]]
    assert level == ranking[: len(level)]
    assert min(ranking, key=lambda entry: entry["heldout_loss"]) in level
    best = max(level, key=lambda entry: (entry["params"], -entry["heldout_loss"]))
    assert best["params"] == arch_params(finished, best["choices"])
    arch = find_arch(finished.folder)
    assert list(arch.arch.choices) == ranking[0]["choices"] == best["choices"]
    certificate = arch.document["certificate"]
    assert (certificate["rank"], certificate["score"]) == (best["rank"], best["score"])
    assert certificate["solved"] == finished.document["screened"] == 12
    assert certificate["score_bound"] >= max(entry["score"] for entry in ranking)
    assert arch.document["heldout_accuracy"] == best["heldout_accuracy"]
    solutions = solve_best(
        finished.space, read_searched(finished.folder, finished.space).scores, finished.limits, 12
    )
    evaluator = evaluator_of(finished.searcher.state)
    chosen = screen(finished.space, solutions, finished.data, evaluator.losses, 6, evaluator.device)
    assert [s.score for s in chosen] == sorted((entry["score"] for entry in ranking), reverse=True)


def test_networks_are_derived_by_the_measured_effects(finished: Finished) -> None:
    effects = finished.document["effects"]
    found, state = finished.selection.effects, finished.searcher.state
    assert found is not None
    assert effects == asdict(found) | {"nats": [list(row) for row in effects["nats"]]}
    assert found == effects_of(state, evaluator_of(state))
    for entry in finished.document["ranking"]:
        indices = Arch(tuple(entry["choices"])).indices(finished.space)
        assert entry["score"] == pytest.approx(-sum(effects["nats"][i][j] for i, j in enumerate(indices)))


def test_without_effects_networks_are_derived_by_their_probabilities(
    finished: Finished, tmp_path: Path
) -> None:
    config = CONFIG.override({"search_epochs": 1, "effect_networks": 0})
    searcher = Searcher(finished.space, finished.limits, finished.data, config)
    result = run_search(searcher, tmp_path / "run", {"data": "digits"})
    assert json.loads((tmp_path / "run" / SEARCH_FILE).read_text())["effects"] is None
    for ranked in result.ranking:
        log_p = [searcher.state.log_probabilities[i][j] for i, j in enumerate(ranked.solution.indices)]
        assert ranked.solution.score == pytest.approx(sum(log_p))
    searched = read_searched(tmp_path / "run", finished.space)
    assert searched.scores == searched.log_probabilities == searcher.state.log_probabilities


def test_effects_that_are_damaged_are_said_to_be(finished: Finished, tmp_path: Path) -> None:
    effects = finished.document["effects"]
    for damaged, said in (
        ({**effects, "nats": [[0.0]]}, "no effects.nats for each candidate"),
        ({**effects, "nats": "none"}, "effects.nats: expected a list"),
        ({}, "effects.nats: missing"),
        (3, "effects: expected a mapping"),
    ):
        document = finished.document | {"effects": damaged}
        (tmp_path / SEARCH_FILE).write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=said):
            read_searched(tmp_path, finished.space)


def test_every_network_of_the_report_is_within_all_limits(finished: Finished) -> None:
    networks = [finished.document[key] for key in ("derived", "macs_guided", "largest")]
    for entry in [*filter(None, networks), *finished.document["random"], *finished.document["ranking"]]:
        indices = Arch(tuple(entry["choices"])).indices(finished.space)
        assert entry["amounts"] == [limit.amount(indices) for limit in finished.limits]
        for amount, limit in zip(entry["amounts"], finished.limits, strict=True):
            assert amount <= limit.limit
    latency_ms = finished.document["derived"]["latency_ms"]
    for entry in finished.document["random"]:
        assert RANDOM_WINDOW * latency_ms <= entry["latency_ms"] <= latency_ms
    assert finished.document["random"]
    # of all networks in this window some are over another limit
    alike = [
        indices
        for indices in product(*(range(len(p.candidates)) for p in finished.space.positions))
        if RANDOM_WINDOW * latency_ms <= finished.limits[0].amount(indices) <= latency_ms
    ]
    assert any(limit.amount(indices) > limit.limit for limit in finished.limits for indices in alike)


def test_the_rivals_are_what_they_are_called(finished: Finished) -> None:
    scores = read_searched(finished.folder, finished.space).scores
    guided = macs_guided(finished.space, scores, finished.limits)
    most = largest(finished.space, finished.limits)
    for key, solution in (("macs_guided", guided), ("largest", most)):
        entry = finished.document[key]
        if solution is None:  # MACs say so little of the second device that none may be found
            assert entry is None
        else:
            assert Arch(tuple(entry["choices"])).indices(finished.space) == solution.indices
    assert finished.document["largest"]["macs"] == most.score + count_limit(finished.space, "macs", 1.0).fixed
    assert finished.document["largest"]["macs"] >= finished.document["derived"]["macs"]


def test_accuracies_are_those_on_test_images(finished: Finished) -> None:
    evaluator = evaluator_of(finished.searcher.state)
    for key in ("derived", "largest"):
        entry = finished.document[key]
        found = evaluator.classify(Arch(tuple(entry["choices"])), finished.data.test)
        assert entry["accuracy"] == found.score.accuracy
    arch = Arch(tuple(finished.document["derived"]["choices"]))
    heldout = evaluator.classify(arch, finished.data.heldout).score
    assert finished.document["derived"]["heldout_accuracy"] == heldout.accuracy


def test_each_device_has_its_table_in_the_run(finished: Finished) -> None:
    assert {path.name for path in finished.folder.glob("table-*.csv")} == {
        "table-myriad-vpu.csv",
        "table-cortex-a76.csv",
    }


def test_the_way_to_the_budget_is_drawn(finished: Finished, tmp_path: Path) -> None:
    drawn = tmp_path / "again.png"
    bound = finished.searcher.state.multiplier.bound
    draw_budget(read_metrics(finished.folder / METRICS_FILE), drawn, multiplier_bound=bound)
    assert (finished.folder / BUDGET_PLOT_FILE).read_bytes() == drawn.read_bytes()


def test_a_saved_supernet_ranks_as_the_search_did(finished: Finished) -> None:
    run, steps = read_finished_run(finished.folder), list[Report]()
    solutions = solve_best(run.space, run.searched.scores, finished.limits, run.searched.screened)
    ranked = rerank_saved(run, solutions, 6, display=reporting_to(steps.append))
    assert ranking_document(ranked) == finished.document["ranking"]
    assert [report.done for report in steps] == list(range(1, 12 + 6 + 1))
    other = replace(run, config={**run.config, "data_digest": "0" * 16})
    with pytest.raises(DataError, match=r"not the images that .* was searched on"):
        rerank_saved(other, solutions)


def test_only_finished_runs_that_differ_in_the_seed_alone_count_as_seeds(
    finished: Finished, tmp_path: Path
) -> None:
    def put(name: str, accuracy: float, *, arch: bool = True, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads(json.dumps(finished.config))
        config["search"] |= {key: value for key, value in changes.items() if key in config["search"]}
        config |= {key: value for key, value in changes.items() if key not in config["search"]}
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        document = finished.document | {"derived": {**finished.document["derived"], "accuracy": accuracy}}
        (folder / SEARCH_FILE).write_text(json.dumps(document))
        if arch:
            shutil.copy(finished.folder / ARCH_FILE, folder)
        return folder

    this = put("this", 0.1)
    put("a", 0.5, seed=1)
    put("b", 0.6, seed=2, versions={"torch": "another"})
    put("c", 0.7, seed=3, batch_size=64)
    put("d", 0.8, seed=4, data="cifar10:x")
    put("e", 0.9, seed=5, arch=False)
    (put("f", 0.9, seed=6) / SEARCH_FILE).write_text("{")
    (put("g", 0.9, seed=7) / CONFIG_FILE).write_text("[]")
    (tmp_path / "file").write_text("")
    assert seeds_beside(this) == {1: 0.5, 2: 0.6}


def test_the_spread_over_seeds_is_in_the_report(finished: Finished, tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        config = CONFIG.override(
            {"seed": seed, "search_epochs": 1, "warmup_epochs": 0, "random_networks": 0, "k_best": 1}
        )
        searcher = Searcher(finished.space, finished.limits, finished.data, config)
        run_search(searcher, tmp_path / f"run-{seed}", {"data": "digits"})
        found.append(json.loads((tmp_path / f"run-{seed}" / SEARCH_FILE).read_text()))
    first, second = (document["derived"]["accuracy"] for document in found)
    assert found[0]["seeds"] == {"accuracies": {"1": first}, "mean": first, "sd": None}
    assert found[1]["seeds"]["accuracies"] == {"1": first, "2": second}
    assert found[1]["seeds"]["mean"] == pytest.approx((first + second) / 2)
    assert found[1]["seeds"]["sd"] == pytest.approx(abs(first - second) / 2**0.5)


def test_a_search_by_another_loss_ranks_by_it_and_reports_the_metric(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.override({"search_epochs": 1, "warmup_epochs": 0, "loss": "focal", "k_best": 2})
    config = config.override({"metric": "balanced-accuracy"})
    request = {"data": "digits", "data_digest": finished.data.digest}
    searcher = Searcher(finished.space, finished.limits, finished.data, config)
    ranking = run_search(searcher, tmp_path / "run", request).ranking
    assert capsys.readouterr() == ("", "")
    document = json.loads((tmp_path / "run" / SEARCH_FILE).read_text())
    assert 0 < document["derived"]["metrics"]["balanced-accuracy"] < 1
    assert "metrics" not in finished.document["derived"]
    evaluator = evaluator_of(searcher.state)
    found = evaluator.classify(ranking[0].arch, finished.data.heldout)
    assert document["ranking"][0]["heldout_loss"] == pytest.approx(found.score.loss)
    # of a network with the same answers the focal loss is the smaller one
    plain = replace(evaluator, objective=CROSS_ENTROPY).classify(ranking[0].arch, finished.data.heldout).score
    assert found.score.loss < plain.loss
    asked = read_config(tmp_path / "run")
    assert asked["search"]["loss"] == "focal"
    solutions = [ranked.solution for ranked in ranking]
    again = rerank_saved(read_finished_run(tmp_path / "run"), solutions)
    assert ranking_document(again) == document["ranking"]


def test_a_saved_search_by_a_loss_of_ones_own_is_not_ranked_by_another(finished: Finished) -> None:
    run = read_finished_run(finished.folder)
    config = {**run.config, "search": run.config["search"] | {"loss": "somewhere.mine"}}
    with pytest.raises(CheckpointError, match=r"a custom loss, somewhere\.mine: give it again"):
        rerank_saved(replace(run, config=config), [])
