import json
from pathlib import Path

import pytest
from helpers.finished_runs import make_record

from qnas.common.errors import ArchError, CheckpointError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.runs.explain import explain
from qnas.runs.finished_run import read_finished_run
from qnas.runs.report.page import write_report
from qnas.spaces.space import SearchSpace


def test_limits_are_read_back_as_they_were(tiny_space: SearchSpace, tmp_path: Path) -> None:
    record = make_record(tmp_path, tiny_space, devices=("vpu", "cpu"), max_params=4500)
    assert [limit.name for limit in record.limits] == ["myriad-vpu", "cortex-a76", "params"]
    for limit, entry in zip(record.limits, record.document["limits"], strict=True):
        assert (limit.budget, limit.limit) == (entry["budget"], entry["limit"])
        assert limit.amount(record.indices) == entry["amount"] <= limit.limit
    for limit, device in zip(record.limits, ("vpu", "cpu"), strict=False):
        assert limit.cells == compute_table(load_device(device), tiny_space).ms


def test_the_margin_of_a_calibrated_device_is_kept(tiny_space: SearchSpace, tmp_path: Path) -> None:
    margin = 0.0371  # as of a calibration: not exactly budget / limit - 1
    record = make_record(tmp_path, tiny_space, devices=("vpu", "cpu"), margin=margin)
    for limit, entry in zip(record.limits, record.document["limits"], strict=True):
        assert limit.table is not None
        assert limit.table.margin == margin
        assert limit.table.digest == entry["table_digest"]
        assert limit.limit == entry["limit"] == entry["budget"] / (1 + margin)


@pytest.mark.parametrize("scale", [1.0, 1 / 3])  # of a table that its file rounds
def test_a_confidence_is_kept_and_recomputed(tiny_space: SearchSpace, tmp_path: Path, scale: float) -> None:
    record = make_record(tmp_path, tiny_space, devices=("vpu", "cpu"), confidence=0.8, scale=scale)
    for limit, entry in zip(record.limits, record.document["limits"], strict=True):
        interval = entry["interval"]
        assert limit.confidence == entry["confidence"] == interval["level"] == 0.8
        assert interval["low_ms"] < entry["latency_ms"] < interval["high_ms"] <= entry["limit"]
        assert (
            entry["amount"]
            == pytest.approx(interval["high_ms"])
            == pytest.approx(entry["fixed"] + sum(entry["positions"]))
        )
        assert limit.latency_ms(record.indices) == pytest.approx(entry["latency_ms"], abs=1e-4)
        assert entry["limit"] == entry["budget"]
    assert record.document["latency_ms"] == record.document["limits"][0]["latency_ms"]
    assert [d.latency_ms for d in explain(record).devices] == pytest.approx(
        [entry["latency_ms"] for entry in record.document["limits"]], abs=1e-4
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "whose upper end stays within the budget" in page
    assert "upper end of 0.8 intervals" in page


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latency_ms", 0.1),
        ("amount", 0.1),
        ("interval.high_ms", 0.1),
        ("interval.high", 0.0),
        ("confidence", 0.7),
    ],
)
def test_an_edited_interval_is_refused(
    tiny_space: SearchSpace, tmp_path: Path, key: str, value: float
) -> None:
    make_record(tmp_path, tiny_space, confidence=0.8)
    path = tmp_path / "arch.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    *parts, last = key.split(".")
    entry = document["limits"][0]
    for part in parts:
        entry = entry[part]
    entry[last] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises((ArchError, CheckpointError), match=r"arch\.json|config\.json"):
        read_finished_run(tmp_path)


def test_an_arch_of_an_earlier_version_has_no_interval(tiny_space: SearchSpace, tmp_path: Path) -> None:
    record = make_record(tmp_path, tiny_space)
    document = json.loads((tmp_path / "arch.json").read_text(encoding="utf-8"))
    assert document["limits"][0].pop("interval")["level"] == 0.9
    (tmp_path / "arch.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_finished_run(tmp_path).arch == record.arch
    assert "interval unknown" in write_report(tmp_path).read_text(encoding="utf-8")


def test_an_arch_that_is_about_to_be_written_stands_in_for_the_file(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    record = make_record(tmp_path, tiny_space)
    (tmp_path / "arch.json").unlink()
    assert read_finished_run(tmp_path, record.document).arch == record.arch
    with pytest.raises(ArchError, match=r"arch\.json: no such file"):
        read_finished_run(tmp_path)


def test_what_is_no_finished_search_is_refused(tiny_space: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a finished search"):
        read_finished_run(tmp_path)
    record = make_record(tmp_path, tiny_space)
    with pytest.raises(ArchError, match="its space is not that of"):
        read_finished_run(tmp_path, {**record.document, "space_digest": "0" * 16})
