"""One small search over three resolutions, and all facts in its result."""

import json
import math
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.mutants import byte_mutants, json_mutants, read_or_refuse
from helpers.searches import QUICK
from helpers.tiny import TINY_SPACE

from qnas.api.deriving import derive, pareto
from qnas.common.errors import CheckpointError, InfeasibleBudgetError, Interrupted, UsageError
from qnas.common.files import write_json
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.supernet import expected_latency, limit_tensors
from qnas.runs import names
from qnas.runs.explain import explain
from qnas.runs.finished_run import read_finished_run, verify_certificate
from qnas.runs.found_arch import find_arch
from qnas.runs.run_text import describe_fronts
from qnas.search.diversity import parts_of
from qnas.search.effects import fit_effects, fit_family_effects
from qnas.search.evaluator import evaluator_of
from qnas.search.family_selection import (
    choose_over_layouts,
    effects_of_family,
    measure_family_effects,
    rank_layouts,
    screen_layouts,
    select_of_family,
)
from qnas.search.finalists import finalist_training
from qnas.search.problem import FamilySearch
from qnas.search.search_result import run_search
from qnas.search.searcher import Searcher
from qnas.search.selection import Selection
from qnas.solver.layouts import layouts_within, mean_limits, solve_family
from qnas.solver.limits import Limits, count_limit, latency_limit
from qnas.solver.solve import solve_best
from qnas.spaces.arch import Arch, arch_from_indices
from qnas.spaces.block_order import block_labels, place_blocks_first
from qnas.spaces.family import Layout, SpaceFamily, make_family
from qnas.spaces.lower import count_macs, lower
from qnas.spaces.space import SearchSpace, load_space, parse_space
from qnas.training.processes import ALONE
from qnas.training.recipe import Recipe

CONFIG = QUICK.override(
    {"resolution_px": 16, "effect_networks": 60, "k_best": 5, "screened": 12, "random_networks": 2}
)
RECIPE = Recipe(epochs=1, batch_size=64, learning_rate=2e-3)
FAMILY = make_family(
    parse_space(TINY_SPACE.replace("layernorm", "batchnorm").replace("gelu", "relu6"), "t"), [16, 24, 32]
)
MUTANTS_OF_FAMILY = 40
BUDGET_MS = 0.6  # all resolutions have networks within, and the largest networks of none are


def limits_of(space: SearchSpace) -> Limits:
    return (
        latency_limit(compute_table(load_device("cpu"), space), BUDGET_MS),
        count_limit(space, "params", 20_000),
    )


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(parse_data_spec("digits"), resolution_px=16, quiet=True)


def over(data: ImageData, family: SpaceFamily = FAMILY, **changes: Any) -> Searcher:
    within = layouts_within(family, limits_of)
    limits = mean_limits([each.limits for each in within])
    search = FamilySearch(family, limits_of, within)
    return Searcher(family.largest, limits, data, CONFIG.override(changes), family=search)


@dataclass(frozen=True)
class Finished:
    searcher: Searcher
    selection: Selection
    folder: Path
    document: dict[str, Any]  # family.json


@pytest.fixture(scope="module")
def finished(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("runs") / "run"
    searcher = over(digits)
    selection = run_search(searcher, folder, {"data": "digits", "data_digest": digits.digest})
    return Finished(searcher, selection, folder, json.loads((folder / names.FAMILY_FILE).read_text()))


@pytest.fixture
def changed(finished: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "changed"))


def layout_named(name: str) -> Layout:
    return next(layout for layout in FAMILY.layouts() if FAMILY.name_of(layout) == name)


# ---- steps


def test_every_step_draws_a_layout_and_its_images_have_the_size_of_it(digits: ImageData) -> None:
    searcher, seen = over(digits), []
    supernet = searcher.state.supernet
    hook = supernet.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[-1]))
    for _ in range(25):
        searcher.step()
    hook.remove()
    assert set(seen) == {8, 12, 16}
    assert max(map(seen.count, set(seen))) < 0.7 * len(seen)


def test_weight_and_architecture_steps_see_the_size_of_the_drawn_layout(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher, seen = over(digits, arch_every=1, warmup_epochs=0), []
    smallest = searcher.problem.layouts[0]
    monkeypatch.setattr(searcher.problem, "draw_layout", lambda generator: smallest)
    hook = searcher.state.supernet.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].shape[-1])
    )
    assert "arch_loss" in searcher.step()
    hook.remove()
    assert seen == [8, 8]


def test_the_expected_amounts_are_the_means_over_the_layouts(digits: ImageData) -> None:
    state = over(digits).state
    expected = []
    for each in state.problem.layouts:
        fixed, cells, _ = limit_tensors(each.limits)
        expected.append(expected_latency(state.logits, state.supernet.mask, fixed, cells))
        assert torch.allclose(state.at(each.layout).expected, expected[-1])
    assert torch.allclose(state.expected, torch.stack(expected).mean(0))


def test_paths_of_weight_steps_are_even_within_the_limits_of_their_layout(digits: ImageData) -> None:
    searcher = over(digits)
    mask, found = searcher.state.supernet.mask, []
    for each in searcher.problem.layouts:
        fixed, cells, limit = limit_tensors(each.limits)
        expected = expected_latency(searcher._weight_steps._even(each), mask, fixed, cells)
        assert (expected <= limit * (1 + 1e-4)).all()
        found.append(expected[0] / limit[0])
    # the means would be above the budget at the largest, or waste it at the smallest
    assert found[-1] == pytest.approx(1.0, abs=1e-3)


def test_all_networks_of_a_sandwich_see_the_images_of_one_layout(digits: ImageData) -> None:
    searcher = over(digits, weight_steps="sandwich")
    sizes: list[int] = []
    searcher.state.supernet.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-1]))
    steps = []
    for _ in range(12):
        sizes.clear()
        figures = searcher.step()
        assert math.isfinite(figures["distilled_loss"])
        weights = sizes[:4]  # behind these, an architecture step may have another layout
        assert len(set(weights)) == 1
        steps.append(weights[0])
    assert set(steps) == {each.trained_px for each in searcher.problem.layouts}


def test_images_too_small_for_the_smallest_resolution_are_refused(digits: ImageData) -> None:
    small = load_data(parse_data_spec("digits"), resolution_px=4, quiet=True)
    with pytest.raises(UsageError, match=r"`resolution_px=4`: of 3 resolutions, .* expected at least 7"):
        over(small)


# ---- the layouts within the limits


def test_layouts_without_a_network_within_the_limits_are_left_out() -> None:
    fastest = compute_table(load_device("cpu"), FAMILY.at(Layout(24, (8, 16)))).fastest_ms

    def tight(space: SearchSpace) -> Limits:
        return (latency_limit(compute_table(load_device("cpu"), space), fastest),)

    assert [each.layout.resolution_px for each in layouts_within(FAMILY, tight)] == [16, 24]

    def tighter(space: SearchSpace) -> Limits:
        return (latency_limit(compute_table(load_device("cpu"), space), 0.001),)

    with pytest.raises(
        InfeasibleBudgetError, match=r"no network of tiny-16px .*: the least of 3 layouts of tiny"
    ):
        layouts_within(FAMILY, tighter)


def test_mean_limits_are_the_means_of_a_networks_amounts() -> None:
    every = [limits_of(FAMILY.at(layout)) for layout in FAMILY.layouts()]
    mean, rng = mean_limits(every), np.random.default_rng(0)
    for _ in range(10):
        network = tuple(int(rng.integers(len(p.names))) for p in FAMILY.largest.positions)
        for at, limit in enumerate(mean):
            amounts = [limits[at].amount(network) for limits in every]
            assert limit.amount(network) == pytest.approx(np.mean(amounts), rel=1e-12)
            assert (limit.limit, limit.unit) == (every[0][at].limit, every[0][at].unit)


# ---- effects


def test_the_model_finds_what_a_resolution_adds() -> None:
    space, rng = FAMILY.largest, np.random.default_rng(0)
    labels, layouts = block_labels(space), list(FAMILY.layouts())
    adds = {16: 0.3, 24: 0.0, 32: -0.3}
    worth = [[0.0 if name == "identity" else -0.2 for name in p.names] for p in space.positions]
    networks, places, losses, groups = [], [], [], []
    for at in range(300):
        network = tuple(int(rng.integers(len(p.names))) for p in space.positions)
        networks.append(place_blocks_first(labels, network))
        places.append(layouts[int(rng.integers(3))])
        hard = float(at // 10 % 3)  # images of a group
        own = sum(row[i] for row, i in zip(worth, networks[-1], strict=True))
        losses.append(own + adds[places[-1].resolution_px] + hard + 0.01 * rng.normal())
        groups.append(at // 10)
    effects, found = fit_family_effects(space, networks, places, np.array(losses), np.array(groups))
    assert effects.explained > 0.95
    for px, nats in adds.items():
        assert found.resolutions[px] - found.resolutions[24] == pytest.approx(nats, abs=0.03)
    blind = fit_effects(space, networks, np.array(losses), np.array(groups))
    assert blind.explained < 0.8


def test_each_drawn_network_is_measured_at_its_layout_beside_those_of_others(digits: ImageData) -> None:
    problem, together, asked = over(digits).problem, list[set[int]](), list[int]()
    images, labels = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)

    def of(px: int) -> Any:
        def losses(networks: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            asked.append(px)
            return torch.full((len(networks), 2), px / 10.0, dtype=torch.float64)

        return losses

    def batches() -> Any:
        while True:
            if asked:
                together.append(set(asked))
                asked.clear()
            yield images, labels

    even = tuple(tuple(math.log(1 / len(p.names)) for _ in p.names) for p in FAMILY.largest.positions)
    found = measure_family_effects(
        problem.layouts,
        even,
        {each.layout: of(each.layout.resolution_px) for each in problem.layouts},
        batches(),
        90,
        np.random.default_rng(0),
    )
    assert found is not None
    effects, nats = found[0], found[1].resolutions
    assert effects.networks == 90
    assert all(pxs == {16, 24, 32} for pxs in together)
    assert nats[24] - nats[16] == pytest.approx(0.8, abs=0.05)
    assert nats[32] - nats[24] == pytest.approx(0.8, abs=0.05)


# ---- the result


def test_the_derived_network_is_the_best_of_all_layouts_on_held_out_images(finished: Finished) -> None:
    state = finished.searcher.state
    evaluators = {each.layout: evaluator_of(state.at(each.layout)) for each in state.problem.layouts}
    found = effects_of_family(state, evaluators)
    assert found is not None
    effects, nats = found
    assert effects == finished.selection.effects
    numbers = {entry["resolution_px"]: entry["number"] for entry in finished.document["spaces"]}
    assert numbers == {px: -value for px, value in nats.resolutions.items()}
    run = read_finished_run(finished.folder)
    assert run.family is not None
    solved = solve_family(FAMILY, run.family.scores(effects.scores), limits_of, 12)
    spaces = {each.layout: each.space for each in state.problem.layouts}
    screened = screen_layouts(spaces, solved.networks, state.problem.data, evaluators, 5)
    assert len(screened) == 5
    ranked = rank_layouts(spaces, screened, state.problem.data, evaluators)
    ranking = finished.document["ranking"]
    assert [(entry["space"], tuple(entry["choices"])) for entry in ranking] == [
        (FAMILY.name_of(each.layout), each.ranked.arch.choices) for each in ranked
    ]
    assert (run.space.name, run.arch.choices) == (ranking[0]["space"], tuple(ranking[0]["choices"]))
    level = [entry for entry in ranking if entry["level"]]
    assert min(ranking, key=lambda entry: entry["heldout_loss"]) in level
    assert ranking[0]["params"] == max(entry["params"] for entry in level)


def test_networks_are_evaluated_at_the_size_of_their_layout(finished: Finished) -> None:
    state = finished.searcher.state
    network = tuple(0 for _ in FAMILY.largest.positions)
    images, labels = torch.rand(6, 3, 16, 16), torch.arange(6)
    for each, px in zip(state.problem.layouts, (8, 12, 16), strict=True):
        losses = evaluator_of(state.at(each.layout)).losses([network], images, labels)
        small = torch.nn.functional.interpolate(images, (px, px), mode="bilinear", antialias=True)
        plain = evaluator_of(state).losses([network], small, labels)
        assert torch.allclose(losses, plain)
        arch = arch_from_indices(each.space, network)
        resized, same = (
            e.build(arch).eval() for e in (evaluator_of(state.at(each.layout)), evaluator_of(state))
        )
        assert torch.allclose(resized(images), same(small))


def test_the_run_is_one_in_the_space_at_the_chosen_layout(finished: Finished) -> None:
    run = read_finished_run(finished.folder)
    assert run.family is not None
    assert run.space == FAMILY.at(run.family.layout) == load_space(finished.folder / names.SPACE_FILE)
    assert run.limits[0].table is not None
    assert run.limits[0].table.digest == compute_table(load_device("cpu"), run.space).digest
    assert find_arch(finished.folder).arch == run.arch
    explain(run)
    page = (finished.folder / names.REPORT_FILE).read_text()
    assert "Layouts of the family" in page


def test_the_certificate_over_the_layouts_holds_by_brute_force(finished: Finished) -> None:
    from helpers.networks import all_networks

    run, certificate = read_finished_run(finished.folder), finished.document["certificate"]
    rows, scores = run.searched.measured, []
    for entry in finished.document["spaces"]:
        limits = limits_of(FAMILY.at(layout_named(entry["space"])))
        for network in all_networks(run.space):
            if all(limit.amount(network) <= limit.limit for limit in limits):
                score = entry["number"] + sum(row[i] for row, i in zip(rows, network, strict=True))
                scores.append(score)
                assert entry["bound"] >= score - 1e-9
    assert certificate["score_bound"] == pytest.approx(max(scores), abs=1e-6)
    own = next(e for e in finished.document["spaces"] if e["space"] == run.space.name)["number"]
    mine = own + sum(row[i] for row, i in zip(rows, run.indices, strict=True))
    assert certificate["score"] == pytest.approx(mine, abs=1e-9)


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        ("score_bound", lambda value: value + 0.1, "certificate.score_bound is"),
        ("rest_bound", lambda value: 0.1 if value is None else value + 0.1, "certificate.rest_bound is"),
        ("score", lambda value: value - 0.1, "certificate.score is"),
        ("layouts", lambda value: value + 1, "certificate.layouts is 4, expected 3"),
    ],
)
def test_an_edited_certificate_is_refused(changed: Path, key: str, change: Any, problem: str) -> None:
    document = json.loads((changed / names.FAMILY_FILE).read_text())
    document["certificate"][key] = change(document["certificate"][key])
    write_json(changed / names.FAMILY_FILE, document)
    with pytest.raises(CheckpointError, match=problem):
        explain(read_finished_run(changed))


@pytest.mark.parametrize(
    ("place", "change", "problem"),
    [
        (("spaces", 0, "bound"), lambda value: value + 0.1, r"spaces\[0\]\.bound is"),
        (("spaces", 1, "limits", 0, "budget"), lambda value: 2 * value, r"spaces\[1\]\.limits is"),
        (("spaces", 1, "limits"), lambda value: value[:1], r"spaces\[1\]\.limits is"),
        (("spaces", 2, "resolution_px"), lambda value: value + 1, r"spaces\[2\]\.resolution_px is 33"),
        (("ranking", 1, "amounts", 0), lambda value: 0.9 * value, r"ranking\[1\]\.amounts\[0\] is"),
        (("ranking", 1, "score"), lambda value: value + 0.1, r"ranking\[1\]\.score is"),
        (("ranking", 1, "space"), lambda value: "tiny-17px", r"no space 'tiny-17px' in tiny"),
        (("family_digest",), lambda value: "0" * 16, "family_digest is"),
        (("spaces",), lambda value: value[:2], "spaces is"),
    ],
)
def test_an_edited_fact_of_a_layout_is_refused(
    changed: Path, place: tuple[Any, ...], change: Any, problem: str
) -> None:
    document = json.loads((changed / names.FAMILY_FILE).read_text())
    *steps, last = place
    part = document
    for step in steps:
        part = part[step]
    part[last] = change(part[last])
    write_json(changed / names.FAMILY_FILE, document)
    with pytest.raises(CheckpointError, match=problem):
        explain(read_finished_run(changed))


def test_an_edited_number_of_a_resolution_is_refused(changed: Path) -> None:
    document = json.loads((changed / names.FAMILY_FILE).read_text())
    chosen = next(entry for entry in document["spaces"] if entry["space"] == document["space"])
    chosen["number"] += 1.0
    write_json(changed / names.FAMILY_FILE, document)
    with pytest.raises(CheckpointError, match="when solved again: edited or damaged"):
        explain(read_finished_run(changed))


def test_a_family_that_does_not_hold_the_runs_space_is_refused(changed: Path) -> None:
    other = make_family(FAMILY.largest, [16, 32, 40])
    (changed / names.FAMILY_SPACE_FILE).write_text(other.to_yaml())
    with pytest.raises(CheckpointError, match=r"family\.json: family_digest is"):
        read_finished_run(changed)


# ---- resume


@pytest.mark.parametrize("steps", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_resumed_search_over_layouts_equals_an_uninterrupted_one(
    finished: Finished, digits: ImageData, steps: int, tmp_path: Path
) -> None:
    folder, searcher = tmp_path / "stopped", over(digits)
    step = searcher.step

    def step_and_stop() -> dict[str, Any]:
        row = step()
        if searcher.steps_done == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    searcher.step = step_and_stop  # type: ignore[method-assign]
    request = {"data": "digits", "data_digest": digits.digest}
    with pytest.raises(Interrupted, match="state is saved"):
        run_search(searcher, folder, request)
    assert not (folder / names.ARCH_FILE).exists()
    run_search(over(digits), folder, request, resume=True)
    for name in (
        *(names.ARCH_FILE, names.METRICS_FILE, names.SUPERNET_FILE, names.SEARCH_FILE, names.FAMILY_FILE),
        *(names.SPACE_FILE, names.FAMILY_SPACE_FILE, names.table_file("cortex-a76")),
    ):
        assert (finished.folder / name).read_bytes() == (folder / name).read_bytes(), name


# ---- without effects


@pytest.mark.slow
def test_without_effects_the_layouts_compete_by_images_alone(digits: ImageData, tmp_path: Path) -> None:
    searcher = over(digits, effect_networks=0, screened=30, k_best=30)
    run_search(searcher, tmp_path / "run", {"data": "digits"})
    document = json.loads((tmp_path / "run" / names.FAMILY_FILE).read_text())
    assert all(entry["best"] == pytest.approx(0, abs=1e-9) for entry in document["spaces"])
    assert {entry["space"] for entry in document["ranking"]} == {s["space"] for s in document["spaces"]}
    explain(read_finished_run(tmp_path / "run"))


# ---- other budgets


def test_other_budgets_are_solved_over_all_layouts(finished: Finished, tmp_path: Path) -> None:
    run = read_finished_run(finished.folder)
    assert run.family is not None
    fastest_ms = compute_table(load_device("cpu"), FAMILY.at(Layout(16, (8, 16)))).fastest_ms
    for at, budget_ms in enumerate((1.02 * fastest_ms, 1.2 * BUDGET_MS)):

        def other_limits(space: SearchSpace, budget_ms: float = budget_ms) -> Limits:
            return (latency_limit(compute_table(load_device("cpu"), space), budget_ms),)

        found = derive(
            finished.folder, {"cpu": f"{budget_ms}ms"}, rerank=False, k_best=5, out=tmp_path / str(at)
        )
        best = solve_family(FAMILY, run.family.scores(run.searched.scores), other_limits, 5)
        assert found.space == FAMILY.at(best.networks[0].layout)
        assert found.arch.indices(found.space) == best.networks[0].solution.indices
        family = found.document["family"]
        assert (family["score"], family["score_bound"]) == (best.networks[0].score, best.bound)
        verify_certificate(find_arch(tmp_path / str(at)))
        assert found.layouts.endswith("of 3 layouts")
        if not at:  # the others have no network that is as fast
            assert found.space.input.resolution_px == 16


def test_networks_of_other_budgets_are_ranked_at_their_own_sizes(finished: Finished, tmp_path: Path) -> None:
    found = derive(
        finished.folder, {"cpu": f"{BUDGET_MS}ms"}, max_params="20000", rerank=True, out=tmp_path / "same"
    )
    # the same budget has the same networks, ranked by the same images with the same weights
    first = finished.document["ranking"][0]
    assert (found.space.name, found.arch.choices) == (first["space"], tuple(first["choices"]))
    assert found.heldout_accuracy == pytest.approx(first["heldout_accuracy"], abs=1e-9)
    assert found.document["ranking"][0]["heldout_loss"] == pytest.approx(first["heldout_loss"], abs=1e-5)


def test_each_budget_of_a_front_is_solved_over_all_layouts(
    finished: Finished, changed: Path, tmp_path: Path
) -> None:
    # a larger resolution is worth something, so that several are on the front
    document = json.loads((changed / names.FAMILY_FILE).read_text())
    document["numbers"] = [
        {"stage": 0, "value": entry["resolution_px"], "number": 0.2 * at}
        for at, entry in enumerate(document["spaces"])
    ]
    write_json(changed / names.FAMILY_FILE, document)
    run = read_finished_run(changed)
    assert run.family is not None
    front = pareto(changed, points=6, k_best=3, rerank=False, out=tmp_path / "front").document
    (device,) = front["devices"]
    tables = [compute_table(load_device("cpu"), FAMILY.at(layout)) for layout in FAMILY.layouts()]
    assert device["fastest_ms"] == min(table.fastest_ms for table in tables)
    assert device["slowest_ms"] == max(table.slowest_ms for table in tables)
    for point in device["points"]:

        def within(space: SearchSpace, budget_ms: float = point["budget_ms"]) -> Limits:
            return latency_limit(compute_table(load_device("cpu"), space), budget_ms), limits_of(space)[1]

        best = solve_family(FAMILY, run.family.scores(run.searched.scores), within, 3).networks[0]
        space = FAMILY.at(best.layout)
        assert point["score"] == pytest.approx(best.score, abs=1e-9)
        assert point["space"] == space.name
        assert point["resolution_px"] == space.input.resolution_px
        indices = Arch(tuple(point["choices"])).indices(space)
        assert point["latency_ms"] == within(space)[0].amount(indices) <= point["budget_ms"]
        assert point["macs"] == count_macs(lower(space, Arch(tuple(point["choices"]))))
    assert len({point["space"] for point in device["points"]}) > 1
    own = next(point for point in device["points"] if point["own_budget"])
    assert not own["far"]
    assert device["expected_ms"] == pytest.approx(float(finished.searcher.state.expected[0]), rel=1e-6)


def test_networks_of_a_front_are_ranked_at_their_own_sizes(finished: Finished, tmp_path: Path) -> None:
    front = pareto(finished.folder, points=3, k_best=2, rerank=True, out=tmp_path / "front").document
    evaluators = {
        FAMILY.name_of(each.layout): evaluator_of(finished.searcher.state.at(each.layout))
        for each in finished.searcher.problem.layouts
    }
    for point in front["devices"][0]["points"]:
        found = evaluators[point["space"]].classify(
            Arch(tuple(point["choices"])), finished.searcher.problem.data.heldout
        )
        assert point["heldout_accuracy"] == pytest.approx(found.score.accuracy, abs=1e-9)
    said = " ".join(describe_fronts(front).split())
    assert all(f" {point['resolution_px']} px " in said for point in front["devices"][0]["points"])
    pareto(finished.folder, points=2, k_best=1, rerank=False, force=True)  # and the page
    assert "ms, each at its own resolution" in (finished.folder / names.REPORT_FILE).read_text()


# ---- finalists


def test_finalists_over_layouts_are_the_best_of_each_stage_and_of_each_layout(finished: Finished) -> None:
    selection = select_of_family(finished.searcher.state)
    # as a supernet that favours a resolution: the best of each stage are there
    smallest, favoured, largest = FAMILY.layouts()
    scores = replace(selection.scores, resolutions={favoured.resolution_px: 100.0})
    rows = scores.candidates(FAMILY.largest)
    worst = solve_best(FAMILY.at(favoured), rows, limits_of(FAMILY.at(favoured)), 1000)[-1].indices
    known = [(favoured, worst)]
    chosen = choose_over_layouts(
        finished.searcher.problem, replace(selection, scores=scores), rows, 8, 12, known
    )
    assert len(chosen) == 8

    def best(layout: Layout, *part: Any) -> tuple[Layout, tuple[int, ...]]:
        space = FAMILY.at(layout)
        return layout, solve_best(space, rows, limits_of(space), 1, *part)[0].indices

    networks = [(layout, each.indices) for layout, each in chosen]
    assert networks[0] == best(favoured)
    assert {best(layout) for layout in (smallest, largest)} < set(networks)
    of_parts = set()
    for part in parts_of(FAMILY.largest):
        with suppress(InfeasibleBudgetError):  # no network with blocks there is within the limits
            of_parts.add(best(favoured, *part))
    assert len(of_parts) > 1
    assert of_parts < set(networks)


@pytest.mark.slow
def test_finalists_are_of_several_layouts_and_are_trained_at_their_sizes(
    digits: ImageData, tmp_path: Path
) -> None:
    searcher = over(digits, finalists=4, finalist_epochs=3, search_epochs=1)
    world = ALONE
    training = finalist_training(searcher.problem.config, RECIPE, FAMILY.largest, len(digits.train), world)
    run_search(searcher, tmp_path / "run", {"data": "digits"}, finalists=training)
    run = read_finished_run(tmp_path / "run")
    assert run.family is not None
    networks = run.found["finalists"]["networks"]
    assert len(networks) == 4
    assert len({entry["space"] for entry in networks}) > 1
    for entry in networks:
        px = layout_named(entry["space"]).resolution_px
        assert entry["resolution_px"] == round(training.resolution_px * px / 32)
        limits = limits_of(FAMILY.at(layout_named(entry["space"])))
        indices = Arch(tuple(entry["choices"])).indices(run.space)
        assert entry["amounts"] == pytest.approx([limit.amount(indices) for limit in limits])
    winner = networks[run.found["finalists"]["winner"] - 1]
    assert winner["space"] == run.space.name == run.document["space"]
    assert run.document["finalist"]["resolution_px"] == winner["resolution_px"]
    assert math.isclose(winner["heldout_accuracies"][-1], run.document["finalist"]["heldout_accuracy"])
    explain(run)
    # a network of another layout that was edited is refused too
    other = next(i for i, entry in enumerate(networks) if entry["space"] != run.space.name)
    document = json.loads((tmp_path / "run" / names.SEARCH_FILE).read_text())
    document["finalists"]["networks"][other]["amounts"][0] *= 0.5
    write_json(tmp_path / "run" / names.SEARCH_FILE, document)
    with pytest.raises(CheckpointError, match=rf"finalists.networks\[{other}\].amounts"):
        read_finished_run(tmp_path / "run")


def test_any_damage_to_the_files_of_a_family_is_refused_in_one_line_or_read(changed: Path) -> None:
    def load(path: Path) -> None:
        explain(read_finished_run(changed))

    for name, make in ((names.FAMILY_FILE, json_mutants), (names.FAMILY_SPACE_FILE, byte_mutants)):
        content = (changed / name).read_bytes()
        given: Any = json.loads(content) if make is json_mutants else content
        for mutant in make(given, MUTANTS_OF_FAMILY, seed=1):
            read_or_refuse(load, changed / name, mutant)
        (changed / name).write_bytes(content)
    load(changed)
