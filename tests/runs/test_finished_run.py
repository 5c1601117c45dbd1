import json
from pathlib import Path

import pytest
from helpers.finished_runs import make_record

from qnas.common.errors import ArchError, CheckpointError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.runs.finished_run import read_finished_run
from qnas.spaces.arch import make_arch
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
    make_record(tmp_path, tiny_space)
    path = tmp_path / "arch.json"
    document = json.loads(path.read_text())
    document["limits"][0]["budget"] *= 1.25
    path.write_text(json.dumps(document))
    (limit,) = read_finished_run(tmp_path).limits
    assert limit.table is not None
    assert limit.table.margin == pytest.approx(0.25)
    assert limit.limit == document["limits"][0]["limit"]


def test_an_arch_that_is_about_to_be_written_stands_in_for_the_file(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    record = make_record(tmp_path, tiny_space)
    choices = ["identity"] * 4
    (tmp_path / "arch.json").unlink()
    assert read_finished_run(tmp_path, {**record.document, "choices": choices}).arch == make_arch(
        tiny_space, tuple(choices)
    )
    with pytest.raises(ArchError, match=r"arch\.json: no such file"):
        read_finished_run(tmp_path)


def test_what_is_no_finished_search_is_refused(tiny_space: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a finished search"):
        read_finished_run(tmp_path)
    record = make_record(tmp_path, tiny_space)
    with pytest.raises(ArchError, match="its space is not that of"):
        read_finished_run(tmp_path, {**record.document, "space_digest": "0" * 16})
