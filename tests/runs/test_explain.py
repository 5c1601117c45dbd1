import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.finished_runs import make_record

from qnas.runs.budget_curve import CurvePoint, price_at
from qnas.runs.explain import Explanation, OnDevice, explain, round_step
from qnas.runs.finished_run import FinishedRun
from qnas.runs.run_text import describe_explanation
from qnas.solver.limits import Limit
from qnas.spaces.block_order import block_labels
from qnas.spaces.space import SearchSpace, load_space

SEEDS = range(6)


def every_network(record: FinishedRun, at: int = 0) -> list[tuple[float, float]]:
    """Latency and loss of every network of the space that is within all limits but one."""
    limit, scores = record.limits[at], record.searched.scores
    others = (*record.limits[:at], *record.limits[at + 1 :])
    found = []
    for network in itertools.product(*(range(len(p.candidates)) for p in record.space.positions)):
        if all(other.amount(network) <= other.limit for other in others):
            loss = -sum(row[i] for row, i in zip(scores, network, strict=True))
            found.append((limit.amount(network), loss))
    return found


def least_loss(record: FinishedRun, latency_ms: float, at: int = 0) -> float:
    return min(loss for ms, loss in every_network(record, at) if ms <= latency_ms)


def on_devices(record: FinishedRun) -> Iterator[tuple[int, Limit, OnDevice]]:
    """Yield what is explained of each device, with its limit's number."""
    found = explain(record).devices
    limits = [limit for limit in record.limits if limit.table is not None]
    assert [d.device for d in found] == [limit.name for limit in limits]
    yield from zip(itertools.count(), limits, found, strict=False)


@pytest.fixture(params=SEEDS)
def record(request: pytest.FixtureRequest, tiny_space: SearchSpace, tmp_path: Path) -> FinishedRun:
    share = np.random.default_rng(request.param).uniform(0.1, 0.9)
    most = 4600 if request.param % 3 == 2 else None
    devices = ("vpu", "cpu") if request.param % 2 else ("vpu",)
    return make_record(
        tmp_path, tiny_space, seed=request.param, share=float(share), max_params=most, devices=devices
    )


def test_the_curve_is_the_least_loss_of_every_budget(record: FinishedRun) -> None:
    for at, limit, d in on_devices(record):
        own, curve = least_loss(record, limit.limit, at), d.curve
        assert [p.latency_ms for p in curve] == sorted(p.latency_ms for p in curve)
        assert curve[0].latency_ms == pytest.approx(min(ms for ms, _ in every_network(record, at)))
        for point in curve:
            assert point.latency_ms == limit.amount(point.indices)
            assert point.latency_ms <= point.budget_ms
            for budget_ms in (point.latency_ms, point.budget_ms):
                assert point.loss == pytest.approx(least_loss(record, budget_ms, at) - own, abs=1e-9)


def test_near_the_budget_no_network_of_the_curve_is_missed(record: FinishedRun) -> None:
    for at, limit, d in on_devices(record):
        low, high = (limit.limit + sign * d.step_ms for sign in (-1, 1))
        staircase, best = [], np.inf
        for ms, loss in sorted(every_network(record, at)):
            if loss < best - 1e-12:
                best = loss
                staircase.append(ms)
        near = [ms for ms in staircase if low <= ms <= high]
        found = [point.latency_ms for point in d.curve]
        for ms in near:
            assert min(abs(ms - other) for other in found) < 1e-9


def test_more_and_less_latency_lead_to_the_best_networks_there(record: FinishedRun) -> None:
    for at, limit, d in on_devices(record):
        own = least_loss(record, limit.limit, at)
        fastest = min(ms for ms, _ in every_network(record, at))
        for exchange, sign in ((d.more, 1), (d.less, -1)):
            most_ms = limit.limit + sign * d.step_ms
            if most_ms < fastest:
                assert exchange is None
                assert not d.can_be_less
            else:
                loss = exchange.loss if exchange is not None else 0.0
                assert loss == pytest.approx(least_loss(record, most_ms, at) - own, abs=1e-9)
                assert exchange is None or exchange.latency_ms <= most_ms
        better = [ms for ms, loss in every_network(record, at) if loss < own - 1e-12]
        assert (d.next_better is None) == (not better)
        if d.next_better is not None:
            assert d.next_better.latency_ms == pytest.approx(min(better))
        for exchange in (d.more, d.less, d.next_better):
            if exchange is not None:
                added = sum(change.loss for change in exchange.changes)
                assert exchange.loss == pytest.approx(added, abs=1e-9)
                assert all(change.before != change.after for change in exchange.changes)


def test_blocks_add_up_to_the_network(record: FinishedRun) -> None:
    for entry, (_, _, d) in zip(record.document["limits"], on_devices(record), strict=False):
        assert sum(block.latency_ms for block in d.blocks) == pytest.approx(entry["amount"])
        assert sum(block.share for block in d.blocks) == pytest.approx(1)
        assert [block.choice for block in d.blocks if block.choice] == list(record.arch.choices)
        assert [block.name for block in d.blocks][:3] == ["stem", "1.1", "1.2"]


def test_flips_are_those_of_the_curve(record: FinishedRun) -> None:
    for _, _, d in on_devices(record):
        for at, flips in enumerate(d.flips):
            names = record.space.positions[at].names
            for point in d.curve:
                held = [f.choice for f in flips if f.from_ms <= point.latency_ms * (1 + 1e-12)][-1]
                assert held == names[point.indices[at]]
            assert all(a.choice != b.choice for a, b in itertools.pairwise(flips))


def test_the_reason_of_an_identity_holds(record: FinishedRun) -> None:
    e = explain(record)
    devices = [limit for limit in record.limits if limit.table is not None]
    for at, story in enumerate(e.positions):
        if story.choice != "identity":
            assert (story.best_block, story.reason) == (None, "")
            continue
        nats = [-score for score in record.searched.scores[at]]
        names = record.space.positions[at].names
        worth = [
            sum(d.price * limit.cells[at][j] for d, limit in zip(e.devices, devices, strict=True))
            for j in range(len(names))
        ]
        values = [-n - ms for n, ms in zip(nats, worth, strict=True)]
        assert story.best_block is not None
        best = names.index(story.best_block)
        assert values[best] == max(values[j] for j in range(len(names)) if names[j] != "identity")
        assert story.best_latencies_ms == tuple(limit.cells[at][best] for limit in devices)
        lacks = [
            limit
            for limit in record.limits
            if limit.cells[at][best] > limit.limit - limit.amount(record.indices)
        ]
        if "no block lowers" in story.reason:
            assert nats[best] >= 0
        elif "too expensive" in story.reason:
            assert values[best] < 0 < -nats[best]
        elif "are left" in story.reason:
            assert values[best] >= 0
            assert lacks
            for limit in lacks:
                assert (limit.name if limit.table is not None else limit.unit) in story.reason
            # by brute force: nothing within the limits is better
            own = -sum(row[i] for row, i in zip(record.searched.scores, record.indices, strict=True))
            assert own == pytest.approx(least_loss(record, record.limits[0].limit))
        else:
            assert values[best] >= 0
            assert not lacks


def point(latency_ms: float, loss: float) -> CurvePoint:
    return CurvePoint(latency_ms, latency_ms, loss, False, ())


def test_the_price_is_the_slope_of_the_lower_hull() -> None:
    # (2, 3.9) lies above the line from (1, 4) to (3, 2)
    curve = [point(1, 4), point(2, 3.9), point(3, 2), point(5, 1)]
    for latency_ms, price in ((1, 1.0), (2.5, 1.0), (3, 0.5), (4.9, 0.5), (5, 0.0), (9, 0.0)):
        assert price_at(curve, latency_ms) == pytest.approx(price)


@pytest.mark.parametrize("latency_ms", [0.0123, 0.5, 1.0, 1.99, 2.0, 4.9, 73.0])
def test_a_step_is_one_two_or_five_and_the_largest_such(latency_ms: float) -> None:
    step = round_step(latency_ms)
    steps = [n * 10.0**e for e in range(-4, 4) for n in (1, 2, 5)]
    assert step == pytest.approx(max(s for s in steps if s <= latency_ms * (1 + 1e-9)))


def explained(space: SearchSpace, folder: Path, **options: Any) -> Explanation:
    return explain(make_record(folder, space, **options))


def test_it_is_said_in_words_within_80_columns(tmp_path: Path) -> None:
    two = ("vpu", "adreno-630")
    asked: list[dict[str, Any]] = [
        {"share": 0.2},
        {"share": 0.2, "rank": 9, "devices": two},
        {"effects": False},
        {"share": 0.45, "devices": ("cpu",), "name": "quadranet-small"},  # latencies of many digits
    ]
    for number, options in enumerate(asked):
        space = load_space(options.pop("name", "quadranet-mobile"))
        e = explained(space, tmp_path / str(number), **options)
        shown = describe_explanation(e)
        assert max(map(len, shown.splitlines())) <= 80
        for story in e.positions:
            assert f"{story.name} " in shown
        said = " ".join(shown.split())
        for d in e.devices:
            assert f"{d.device} at {space.input.resolution_px} px, within " in said
            assert f"{d.price:.3g} nats a millisecond" in said
        assert ("90% of the variance between networks" in said) == e.measured
        differs = any(story.solved != story.choice for story in e.positions)
        assert ("held-out images chose another network" in said) == differs
        assert differs == (options.get("rank", 1) != 1)


def test_a_network_that_images_chose_is_compared_with_the_one_of_least_loss(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    first = make_record(tmp_path / "a", tiny_space, seed=3)
    second = make_record(tmp_path / "b", tiny_space, seed=3, rank=2)
    e = explain(second)
    assert tuple(story.solved for story in e.positions) == first.arch.choices
    assert tuple(story.choice for story in e.positions) == second.arch.choices
    labels = block_labels(tiny_space)
    assert [row[i] for row, i in zip(labels, first.indices, strict=True)] != [
        row[i] for row, i in zip(labels, second.indices, strict=True)
    ]


def test_a_budget_that_does_not_bind_has_no_price(tiny_space: SearchSpace, tmp_path: Path) -> None:
    e = explained(tiny_space, tmp_path, share=2.0)
    (d,) = e.devices
    assert (d.price, d.more, d.next_better) == (0.0, None, None)
    assert "no slower network has a lower loss" in describe_explanation(e)


def test_the_margin_of_a_device_is_kept_at_other_budgets(tiny_space: SearchSpace, tmp_path: Path) -> None:
    record = make_record(tmp_path, tiny_space)
    first = record.limits[0]
    (kept,) = explain(replace(record, limits=(replace(first, budget=1.25 * first.budget),))).devices
    (plain,) = explain(record).devices
    assert kept.price == plain.price
    assert [p.latency_ms for p in kept.curve] == [p.latency_ms for p in plain.curve]
    assert [p.budget_ms for p in kept.curve] == pytest.approx([1.25 * p.budget_ms for p in plain.curve])


def test_the_latency_has_its_interval_and_what_is_of_upper_ends_says_so(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    plain = explain(make_record(tmp_path / "plain", tiny_space)).devices[0]
    assert plain.interval is not None
    assert plain.interval.level == 0.9
    assert plain.confidence is None
    sure = make_record(tmp_path / "sure", tiny_space, confidence=0.8)
    explanation = explain(sure)
    (d,) = explanation.devices
    assert (d.confidence, d.interval and d.interval.level) == (0.8, 0.8)
    assert d.latency_ms == sure.limits[0].latency_ms(sure.indices)
    assert d.latency_ms == pytest.approx(sum(block.latency_ms for block in d.blocks))
    assert d.interval is not None
    words = " ".join(describe_explanation(explanation).split())
    assert (
        f" ms, interval {d.interval.describe()} what follows, and other budgets, are of the upper ends"
        in (words)
    )
    assert "upper ends" not in describe_explanation(explain(make_record(tmp_path / "again", tiny_space)))
