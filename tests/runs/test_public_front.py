"""Public networks beside a run: within its limits, and never on the scale of its accuracy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.finished_runs import make_record
from PIL import Image

from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.rivals import find_rivals
from qnas.runs.documents import ParetoDocument
from qnas.runs.finished_run import FinishedRun
from qnas.runs.pareto import front_document, front_points, fronts_document, solve_budgets, spread_budgets
from qnas.runs.plots import draw_fronts
from qnas.runs.public_front import SHOWN, public_front, rivals_of, table_of
from qnas.solver.limits import latency_limit
from qnas.spaces.space import SearchSpace


@pytest.fixture
def record(tiny_space: SearchSpace, tmp_path: Path) -> FinishedRun:
    return make_record(tmp_path, tiny_space)


def test_the_front_in_a_range_is_that_of_the_rivals() -> None:
    device = load_device("vpu")
    points = public_front(device, 15.0, 60.0)
    ms, top1 = ([point[key] for point in points] for key in ("latency_ms", "imagenet_top1"))
    assert 15 <= ms[0] < ms[-1] <= 60
    assert (np.diff(ms) > 0).all()
    assert (np.diff(top1) > 0).all()
    whole = [rival.network.name for rival in reversed(find_rivals([(device, 60.0)]).front)]
    assert [point["name"] for point in points] == whole[-len(points) :]


def test_a_device_that_prices_no_kernels_has_none() -> None:
    vpu = load_device("vpu")
    assert public_front(None, 1.0, 100.0) == []
    assert public_front(vpu.model_copy(update={"model": {}}), 1.0, 100.0) == []
    assert public_front(vpu, 0.1, 0.2) == []


def test_they_are_drawn_below_on_an_axis_of_their_own(record: FinishedRun, tmp_path: Path) -> None:
    device = load_device("vpu")
    limit = latency_limit(compute_table(device, record.space), 1e3)
    solved = solve_budgets(record, limit, (), spread_budgets(limit, 3, None), 1)
    front = front_document(record, limit, front_points(record, solved, {}, None), None, device)
    assert front["public"] == public_front(device, limit.least, limit.most)
    details = {"latency_source": "device", "k_best": 1, "ranked": False, "unranked": "as asked"}
    sizes, pictures = [], []
    for public in ([], public_front(device, 5.0, 50.0), public_front(device, 5.0, 30.0)):
        document = fronts_document(record.space, [{**front, "public": public}], details)
        ParetoDocument.model_validate(document)
        draw_fronts(document, tmp_path / "front.png")
        with Image.open(tmp_path / "front.png") as image:
            sizes.append(image.size)
            pictures.append(np.asarray(image.convert("RGB")))
    assert sizes[0][1] < sizes[1][1] == sizes[2][1]
    assert (pictures[1] != pictures[2]).any()


def test_the_page_has_those_within_all_limits_of_the_run(record: FinishedRun) -> None:
    rivals, why = rivals_of(record)  # the tiny space is faster than any public network
    assert rivals is None
    assert why.startswith("no public network is within")
    limits = tuple(replace(limit, budget=40.0) if limit.table else limit for limit in record.limits)
    rivals, why = rivals_of(replace(record, limits=limits))
    assert rivals is not None
    assert not why
    rows = list(table_of(rivals))
    assert len(rows) == SHOWN < len(rivals.networks)
    for row, rival in zip(rows, rivals.networks, strict=False):
        assert row[0].removesuffix(" *") == rival.network.name
        assert row[0].endswith(" *") == rival.on_front
        assert all(on.latency_ms <= 40 for on in rival.latencies)


def test_latencies_of_another_source_are_not_compared(record: FinishedRun) -> None:
    rivals, why = rivals_of(replace(record, config={**record.config, "latency": "nn-meter"}))
    assert rivals is None
    assert "not those of its device's own model" in why
