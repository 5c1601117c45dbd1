"""Searches over several input resolutions from Python and the command line, and what they refuse."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import joined, succeed
from helpers.command_line import qnas as command
from helpers.tiny import FEW, TINY_SPACE

import qnas
from qnas.common.errors import InfeasibleBudgetError, Interrupted, SpaceError, UsageError
from qnas.common.progress import Report
from qnas.latency.device_table import compute_table
from qnas.latency.table import write_table
from qnas.runs.names import ARCH_FILE, FAMILY_FILE, METRICS_FILE, SUPERNET_FILE
from qnas.runs.report.commands import search_command

SPACE = qnas.make_space(
    "mine",
    input={"channels": 3, "resolution_px": 32},
    norm="batchnorm",
    activation="relu6",
    stem={"channels": 8, "kernel": 2, "stride": 2},
    candidates=[{"block": "mbconv", "kernel": [3, 5], "expansion": 2}, {"block": "identity"}],
    stages=[
        {"channels": 8, "positions": 2, "stride": 1},
        {"channels": 16, "positions": 2, "stride": 2},
    ],
    head={"classes": 1000},
)


def search(out: Path, **changes: Any) -> qnas.SearchResult:
    asked = {"resolutions": [16, 24, 32], "data": "digits", "out": out, **FEW, **changes}
    return qnas.run_search(SPACE, {"cpu": "200us"}, **asked)


def test_the_result_is_a_run_at_one_of_the_resolutions_and_goes_on_as_any(tmp_path: Path) -> None:
    result = search(tmp_path / "run")
    px = result.space.input.resolution_px
    assert px in (16, 24, 32)
    assert result.space.name == f"mine-{px}px"
    assert result.space.head.classes == 10
    assert result.latencies_ms["cortex-a76"] <= 0.2
    assert result.latencies_ms["cortex-a76"] == qnas.predict(result, "cpu").latency_ms
    assert result.run.family is not None
    assert [entry["resolution_px"] for entry in result.run.family.document["spaces"]] == [16, 24, 32]
    assert qnas.load_run(tmp_path / "run").arch == result.arch
    assert "--resolutions 16,24,32" in search_command(result.config)
    found = qnas.derive(result, {"cpu": "1ms"})
    assert found.heldout_accuracy is not None


def test_an_interrupted_search_over_resolutions_goes_on_without_naming_them(tmp_path: Path) -> None:
    def stop(report: Report) -> None:
        if report.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        search(tmp_path / "stopped", progress=stop)
    resumed = qnas.run_search(out=tmp_path / "stopped", resume=True)
    whole = search(tmp_path / "whole")
    assert resumed.arch == whole.arch
    for name in (ARCH_FILE, FAMILY_FILE, METRICS_FILE, SUPERNET_FILE):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_one_resolution_is_a_search_in_the_space_at_it(tmp_path: Path) -> None:
    result = search(tmp_path / "one", resolutions=[24])
    assert result.space == SPACE.with_resolution(24).with_classes(10)
    assert result.run.family is None
    assert not (tmp_path / "one" / FAMILY_FILE).exists()


def test_a_shipped_space_at_a_resolution_is_searched_by_the_name_of_both(tmp_path: Path) -> None:
    result = qnas.run_search("quadranet-small-24px", {"cpu": "3ms"}, data="digits", out=tmp_path, **FEW)
    assert result.config["space"] == result.space.name == "quadranet-small-24px"
    assert result.space.input.resolution_px == 24


def test_what_cannot_be_searched_is_refused_before_the_data_are_opened(tmp_path: Path) -> None:
    for changes, error, problem in (
        ({"resolutions": [16, 16]}, SpaceError, "input.resolution_px: 16 is there twice"),
        ({"resolutions": [2, 16]}, SpaceError, "resolution 2 px is too small for space mine: at least 4 px"),
        ({"resolution_px": 5}, UsageError, "of 3 resolutions, images of the largest have this size"),
    ):
        with pytest.raises(error, match=problem):
            search(tmp_path / "none", **{"data": "imagefolder:none", **changes})
    with pytest.raises(InfeasibleBudgetError, match="the least of 3 layouts of mine"):
        qnas.run_search(SPACE, {"cpu": "1us"}, resolutions=[16, 24, 32], data="imagefolder:none")
    assert not (tmp_path / "none").exists()


def test_a_measured_table_is_needed_for_each_layout(tmp_path: Path) -> None:
    family, own, like = qnas.make_family(SPACE, [16, 32]), tmp_path / "own.json", qnas.load_device("cpu")
    (tmp_path / "own").mkdir()
    content: dict[str, str | int] = {"schema": "qnas.device/1", "name": "own", "title": "t", "runtime": "r"}
    content |= {"precision": "float32", "batch": 1, "unit": "ms", "kind": "measured", "source": "s"}
    content |= {"date": "2026-01-01"}
    own.write_text(json.dumps(content))
    first, second = (family.at(layout) for layout in family.layouts())

    def write(space: qnas.SearchSpace) -> None:
        write_table(compute_table(like, space), space, tmp_path / "own" / f"{space.name}.csv")

    def refused() -> str:
        with pytest.raises(qnas.QnasError) as error:
            qnas.run_search(family, {str(own): "1ms"}, data="imagefolder:none")
        return str(error.value)

    write(second)
    assert refused().startswith("device own has no latency table for space mine-16px")
    write(first)
    assert "no latency table" not in refused()  # but no data


def test_the_command_takes_resolutions_or_a_file_with_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(TINY_SPACE.replace("resolution_px: 32", "resolution_px: [16, 32]"))
    succeed("describe", file)
    told = capsys.readouterr().out
    assert "tiny-16px" in told
    assert "tiny-32px" in told
    assert command("search", "--device", "cpu", "--budget", "1us", "--space", file) == 1
    assert "the least of 2 layouts of tiny" in joined(capsys.readouterr().err)
    assert command("search", "--device", "cpu", "--budget", "1ms", "--resolutions", "16;32") == 2
    assert "expected whole numbers" in joined(capsys.readouterr().err)
    assert command("table", file, "--device", "cpu") == 1
    assert "2 values, which make a family of spaces" in joined(capsys.readouterr().err)
