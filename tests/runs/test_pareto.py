import csv
import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.finished_runs import flat, make_record
from PIL import Image

from qnas.common.errors import InfeasibleBudgetError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.runs.finished_run import FinishedRun
from qnas.runs.pareto import (
    front_document,
    front_points,
    fronts_csv,
    fronts_document,
    solve_budgets,
    spread_budgets,
)
from qnas.runs.plots import draw_fronts
from qnas.runs.run_text import describe_fronts
from qnas.solver.limits import FAR, Limit, count_limit, latency_limit
from qnas.spaces.arch import Arch
from qnas.spaces.block_order import block_labels
from qnas.spaces.space import SearchSpace


@pytest.fixture
def record(tiny_space: SearchSpace, tmp_path: Path) -> FinishedRun:
    return make_record(tmp_path, tiny_space)


def limit_on(record: FinishedRun, device: str = "vpu") -> Limit:
    table = compute_table(load_device(device), record.space)
    return latency_limit(table, table.slowest_ms)


def networks(record: FinishedRun) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(p.candidates)) for p in record.space.positions)))


def score(record: FinishedRun, network: tuple[int, ...]) -> float:
    return sum(row[i] for row, i in zip(record.searched.scores, network, strict=True))


def test_budgets_reach_from_the_fastest_network_to_the_slowest(record: FinishedRun) -> None:
    limit = limit_on(record)
    budgets = spread_budgets(limit, 6, own_ms=1.234)
    assert len(budgets) == 7
    assert budgets == sorted(budgets)
    assert 1.234 in budgets
    budgets.remove(1.234)
    assert budgets[0] == pytest.approx(limit.least)
    assert budgets[-1] == pytest.approx(limit.most)
    ratios = np.array(budgets[1:]) / budgets[:-1]
    assert ratios == pytest.approx([ratios[0]] * 5)
    kept = replace(limit, limit=limit.budget / 1.2)  # of a calibrated device
    assert spread_budgets(kept, 2, None) == pytest.approx([1.2 * limit.least, 1.2 * limit.most])


def test_each_point_is_the_best_network_within_its_budget(record: FinishedRun) -> None:
    limit = limit_on(record)
    budgets = spread_budgets(limit, 12, None)
    points = front_points(record, solve_budgets(record, limit, (), budgets, 3), {}, None)
    every = networks(record)
    for point in points:
        assert point.latency_ms <= point.budget_ms * (1 + 1e-9)
        best = max(score(record, n) for n in every if limit.amount(n) <= point.budget_ms)
        assert point.solution.score == pytest.approx(best)
        assert point.on_front
    assert [p.solution.score for p in points] == sorted(p.solution.score for p in points)
    labels = block_labels(record.space)
    sequences = [
        tuple(row[i] for row, i in zip(labels, p.solution.indices, strict=True) if row[i]) for p in points
    ]
    assert len(sequences) == len(set(sequences)) < len(budgets)


def test_the_network_of_highest_accuracy_is_taken_and_the_front_marked_by_it(record: FinishedRun) -> None:
    limit = limit_on(record)
    solved = solve_budgets(record, limit, (), spread_budgets(limit, 8, None), 4)
    rng = np.random.default_rng(0)
    known = flat({s.indices: float(rng.uniform()) for each in solved for s in each.solutions})
    points = front_points(record, solved, known, None)
    chosen = {point.solution.indices for point in points}
    for each in solved:
        best = max(each.solutions, key=lambda s: known[s.indices].share)
        assert best.indices in chosen
    for point in points:
        assert point.accuracy is not None
        faster = [p.accuracy.share for p in points if p.latency_ms < point.latency_ms and p.accuracy]
        assert point.on_front == all(share < point.accuracy.share for share in faster)
    assert not all(point.on_front for point in points)


def test_the_searchs_own_budget_and_what_is_far_from_it_are_marked(record: FinishedRun) -> None:
    limit, own_ms = limit_on(record), record.limits[0].budget
    budgets = spread_budgets(limit, 8, own_ms)
    points = front_points(record, solve_budgets(record, limit, (), budgets, 1), {}, own_ms)
    (own,) = (point for point in points if point.own_budget)
    assert own.solution.indices == record.indices
    assert own.budget_ms <= own_ms
    front = front_document(record, limit, points, own_ms)
    low, high = front["trusted_ms"]
    assert high is not None
    assert (front["expected_ms"] / low - 1, front["expected_ms"] / high - 1) == pytest.approx((FAR, -FAR))
    for point in points:
        assert point.far == (not low <= point.budget_ms <= high)
    assert front["own_latency_ms"] == record.document["latency_ms"]
    unpressed = replace(record, searched=replace(record.searched, pressed=False))
    assert front_document(unpressed, limit, points, own_ms)["trusted_ms"] == [low, None]


def test_the_other_limits_hold_and_what_they_leave_nothing_of_is_left_out(record: FinishedRun) -> None:
    limit = limit_on(record)
    params = count_limit(record.space, "params", 0.0)
    params = replace(params, limit=(params.least + params.most) / 2)
    points = front_points(
        record, solve_budgets(record, limit, (params,), spread_budgets(limit, 8, None), 1), {}, None
    )
    assert points
    assert all(params.amount(point.solution.indices) <= params.limit for point in points)
    nothing = replace(params, limit=params.least - 1)
    with pytest.raises(InfeasibleBudgetError):
        solve_budgets(record, limit, (nothing,), spread_budgets(limit, 8, None), 1)


def test_csv_and_picture_hold_what_the_json_does(record: FinishedRun, tmp_path: Path) -> None:
    fronts = []
    for device in ("vpu", "cpu"):
        limit = limit_on(record, device)
        own_ms = record.limits[0].budget if device == "vpu" else None
        solved = solve_budgets(record, limit, (), spread_budgets(limit, 6, own_ms), 2)
        known = flat({s.indices: 0.5 + 0.02 * s.rank for each in solved for s in each.solutions})
        points_of = front_points(record, solved, known, own_ms)
        fronts.append(front_document(record, limit, points_of, own_ms))
    document = fronts_document(record.space, fronts, {"ranked": True, "unranked": ""})
    rows = list(csv.DictReader(io.StringIO(fronts_csv(document))))
    points = [point for front in document["devices"] for point in front["points"]]
    assert [tuple(row) for row in rows] == [tuple(points[0])] * len(points)
    for row, point in zip(rows, points, strict=True):
        assert float(row["latency_ms"]) == point["latency_ms"]
        assert row["choices"].split(" ") == point["choices"]
        assert row["far"] == str(point["far"])
        limit = limit_on(record, point["device"])
        assert limit.amount(Arch(tuple(point["choices"])).indices(record.space)) == point["latency_ms"]
    pictures = []
    for far in (False, True):
        document["devices"][0]["points"][0]["far"] = far
        draw_fronts(document, tmp_path / "front.png")
        with Image.open(tmp_path / "front.png") as image:
            pictures.append(np.asarray(image.convert("RGB")))
    assert (pictures[0] != pictures[1]).any()
    shown = describe_fronts(document)
    assert max(map(len, shown.splitlines())) <= 80
    assert "far from the searched budget" in shown


def test_points_have_intervals_and_budgets_are_of_what_the_search_bounded(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    record = make_record(tmp_path, tiny_space, confidence=0.8)
    (own,) = record.limits
    assert own.table is not None
    limit = latency_limit(own.table, own.table.slowest_ms, own.confidence)
    budgets = spread_budgets(limit, 6, own.budget)
    points = front_points(record, solve_budgets(record, limit, (), budgets, 1), {}, own.budget)
    front = front_document(record, limit, points, own.budget)
    (at_own,) = (point for point in points if point.own_budget)
    assert at_own.solution.indices == record.indices
    assert front["confidence"] == 0.8
    assert front["own_latency_ms"] == own.latency_ms(record.indices) < own.amount(record.indices)
    for entry, point in zip(front["points"], points, strict=True):
        assert entry["level"] == 0.8
        assert entry["low_ms"] <= entry["latency_ms"] == point.latency_ms <= entry["high_ms"]
        assert entry["high_ms"] <= entry["budget_ms"] * (1 + 1e-9)
    document = fronts_document(tiny_space, [front], {"ranked": False, "unranked": "as asked"})
    shown = describe_fronts(document)
    assert "budgets are for the upper ends of 0.8 intervals" in " ".join(shown.split())
    assert "80%, ms" in shown
