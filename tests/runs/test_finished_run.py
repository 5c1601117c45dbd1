from pathlib import Path

import pytest
from helpers.finished_runs import make_record

from qnas.common.errors import ArchError, CheckpointError
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.runs.finished_run import read_finished_run
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
