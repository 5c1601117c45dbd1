"""A search is certified for as many classes as its data have, whatever the space says."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import FEW, TINY_SPACE

import qnas
from qnas.api import searching
from qnas.common.errors import DataError, InfeasibleBudgetError, Interrupted, TableError
from qnas.common.progress import Report
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table, load_table
from qnas.latency.own_latency import device_from_blocks
from qnas.latency.table import write_table
from qnas.runs.found_arch import find_arch
from qnas.runs.names import ARCH_FILE, METRICS_FILE
from qnas.spaces.space import SearchSpace, parse_space

MANY = 1000
SPACE = parse_space(TINY_SPACE.replace("classes: 10", f"classes: {MANY}"), "tiny.yaml")
OF_DIGITS = SPACE.with_classes(10)
VPU = load_device("vpu")


def search(out: Path, budgets: Any = None, space: Any = SPACE, **changes: Any) -> qnas.SearchResult:
    return qnas.run_search(space, budgets or {"vpu": "1ms"}, out=out, **{**FEW, **changes})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> qnas.SearchResult:
    return search(tmp_path_factory.mktemp("runs") / "run")


def test_the_certified_latency_is_of_the_classes_of_the_data(result: qnas.SearchResult) -> None:
    assert result.space == OF_DIGITS
    assert result.document["classes"] == 10
    indices = result.arch.indices(SPACE)
    assert result.latency_ms == compute_table(VPU, OF_DIGITS).latency_ms(indices)
    assert result.latency_ms < compute_table(VPU, SPACE).latency_ms(indices)
    again = qnas.derive(result, {"cpu": "100ms"}, rerank=False)
    assert again.latency_ms == compute_table(load_device("cpu"), OF_DIGITS).latency_ms(
        again.arch.indices(SPACE)
    )


def test_an_arch_json_alone_finds_its_space_by_its_classes(result: qnas.SearchResult, tmp_path: Path) -> None:
    alone, space = tmp_path / "alone.json", tmp_path / "tiny.yaml"
    shutil.copy(result.folder / ARCH_FILE, alone)
    space.write_text(SPACE.to_yaml(), encoding="utf-8")
    assert find_arch(alone, str(space)).space == OF_DIGITS


def test_a_budget_that_only_fewer_classes_meet_is_met(tmp_path: Path) -> None:
    few, many = (compute_table(VPU, space).fastest_ms for space in (OF_DIGITS, SPACE))
    between = {"vpu": f"{(few + many) / 2:.6f}ms"}
    assert search(tmp_path / "run", between).latency_ms == few
    # no number of classes meets this one, so the data are not opened
    least = compute_table(VPU, SPACE.with_classes(2)).fastest_ms
    with pytest.raises(InfeasibleBudgetError):
        search(tmp_path / "none", {"vpu": f"{least * 0.999:.6f}ms"}, data="imagefolder:nowhere")
    with pytest.raises(DataError, match="nowhere"):
        search(tmp_path / "none", between, data="imagefolder:nowhere")


def own_device(folder: Path, space: SearchSpace) -> Path:
    """Write a device with a table of a space, and no model."""
    text = VPU.model_copy(update={"name": "board", "aliases": (), "model": {}, "accuracy": {}}).to_json()
    path = folder / "board.json"
    path.write_text(text, encoding="utf-8")
    write_table(compute_table(VPU, space), space, folder / "board" / f"{space.name}.csv")
    return path


def test_a_table_that_was_measured_with_more_classes_is_an_upper_bound(tmp_path: Path) -> None:
    device = load_device(own_device(tmp_path, SPACE))
    table = load_table(device, OF_DIGITS)
    assert table.space_digest == OF_DIGITS.digest
    assert table.ms == load_table(device, SPACE).ms
    assert table.fixed_ms == load_table(device, SPACE).fixed_ms
    assert "with 1000 classes" in dict(table.fixed)["head"].source
    found = search(tmp_path / "run", {str(tmp_path / "board.json"): "1ms"})
    assert found.space == OF_DIGITS


def test_a_table_that_was_measured_with_fewer_classes_keeps_the_space(tmp_path: Path) -> None:
    few = SPACE.with_classes(5)
    device = own_device(tmp_path, few)
    with pytest.raises(TableError, match="head: c_out 5, expected 10"):
        load_table(load_device(device), OF_DIGITS)
    assert search(tmp_path / "run", {str(device): "1ms"}, few).space == few


def test_latencies_from_python_bound_those_of_fewer_classes() -> None:
    rows = [{"position": row, "candidate": "", "latency_ms": 0.5} for row in ("stem", "2.transition", "head")]
    rows += [
        {"position": position.name, "candidate": name, "latency_ms": 1.0}
        for position in SPACE.positions
        for name in position.names
        if name != "identity"
    ]
    device = device_from_blocks("board", rows, SPACE)
    assert load_table(device, OF_DIGITS).fixed_ms == load_table(device, SPACE).fixed_ms == 1.5
    with pytest.raises(TableError, match="make another device"):
        load_table(device, SPACE.with_classes(MANY + 1))


def test_a_run_of_an_older_version_goes_on_with_its_own_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(report: Report) -> None:
        if report.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as older:
        older.setattr(searching, "_limits_with", lambda *_: None)  # these certified for the space as given
        with pytest.raises(Interrupted):
            search(tmp_path / "older", progress=stop)
    with pytest.raises(Interrupted):
        search(tmp_path / "newer", progress=stop)
    assert qnas.run_search(SPACE, out=tmp_path / "older", resume=True).space == SPACE
    newer = qnas.run_search(SPACE, out=tmp_path / "newer", resume=True)
    assert newer.space == OF_DIGITS
    whole = search(tmp_path / "whole")
    assert (newer.folder / METRICS_FILE).read_bytes() == (whole.folder / METRICS_FILE).read_bytes()
