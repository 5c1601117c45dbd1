"""Searches over several widths from Python and the command line, and what they refuse."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import joined, succeed
from helpers.command_line import qnas as command
from helpers.tiny import FEW, TINY_SPACE

import qnas
from qnas.common.errors import Interrupted, SpaceError, UsageError
from qnas.common.progress import Report
from qnas.runs.names import ARCH_FILE, FAMILY_FILE, METRICS_FILE, SUPERNET_FILE
from qnas.runs.report.commands import search_command

WIDE = TINY_SPACE.replace("channels: 16\n", "channels: [16, 24]\n")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "own.yaml"
    found.write_text(TINY_SPACE)
    return found


def search(space: Any, out: Path, **changes: Any) -> qnas.SearchResult:
    asked: dict[str, Any] = {"data": "digits", "out": out, **FEW, **changes}
    return qnas.run_search(space, {"cpu": "400us"}, **asked)


def test_multipliers_make_widths_a_choice_and_are_recorded(file: Path, tmp_path: Path) -> None:
    result = search(file, tmp_path / "run", width_multipliers=[1, 2], resolutions=[16, 32])
    assert result.run.family is not None
    assert result.run.family.family.widths == ((8,), (16, 32))
    assert len(result.run.family.document["spaces"]) == 4
    assert result.config["width_multipliers"] == [1.0, 2.0]
    assert "--width-multipliers 1,2" in search_command(result.config)
    assert result.latencies_ms["cortex-a76"] == qnas.predict(result, "cpu").latency_ms
    trained = qnas.train_subnet(result, data="digits", epochs=1, resolution_px=8)
    assert trained.accuracy > 0


def test_a_file_with_lists_of_widths_is_searched_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "wide.yaml"
    file.write_text(WIDE)
    result = search(file, tmp_path / "run")
    assert result.run.family is not None
    assert result.run.family.family.widths == ((8,), (16, 24))
    assert "width_multipliers" not in result.config


@pytest.mark.parametrize("made", [False, True])
def test_an_interrupted_search_goes_on_at_the_same_widths(file: Path, tmp_path: Path, made: bool) -> None:
    def stop(report: Report) -> None:
        if report.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    space = qnas.load_space(file) if made else file
    asked = {"width_multipliers": [0.5, 2]}  # none keeps the widths: applied again, they would change
    with pytest.raises(Interrupted):
        search(space, tmp_path / "stopped", progress=stop, **asked)
    resumed = qnas.run_search(out=tmp_path / "stopped", resume=True)
    whole = search(space, tmp_path / "whole", **asked)
    assert resumed.arch == whole.arch
    for name in (ARCH_FILE, FAMILY_FILE, METRICS_FILE, SUPERNET_FILE):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_finalists_are_of_several_widths(file: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"finalists": 2, "finalist_epochs": 1, "finalist_rounds": 1}
    result = search(file, tmp_path / "run", width_multipliers=[1, 2], **asked)
    spaces = [entry["space"] for entry in result.run.found["finalists"]["networks"]]
    assert len(set(spaces)) == 2
    assert result.space.name in spaces


def test_what_cannot_be_searched_is_refused(file: Path, tmp_path: Path) -> None:
    for changes, error, problem in (
        ({"width_multipliers": [0]}, SpaceError, "width multipliers: expected positive numbers, got 0"),
        ({"width_multipliers": []}, SpaceError, "width multipliers: expected one or more"),
        (
            {"width_multipliers": [1, 2], "weights": "independent"},
            UsageError,
            "tiny has several widths, whose weights are slices of the largest",
        ),
    ):
        with pytest.raises(error, match=problem):
            search(file, tmp_path / "none", **changes)


def test_the_command_takes_multipliers_and_describes_widths(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tmp_path / "wide.yaml"
    wide.write_text(WIDE)
    succeed("describe", wide)
    assert "2 layouts; channels of stage 2: 16, 24" in joined(capsys.readouterr().out)
    asked = ("search", "--device", "cpu", "--budget", "1us", "--space", file, "--width-multipliers")
    assert command(*asked, "1,2") == 1
    assert "the least of 2 layouts of tiny" in joined(capsys.readouterr().err)
    assert command(*asked, "1;2") == 2
    assert "expected numbers: 0.75,1" in joined(capsys.readouterr().err)
