import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import qnas
from helpers.finished_runs import make_record

from qnas.runs.explain import explain
from qnas.spaces.space import SearchSpace


@pytest.fixture
def folders(tiny_space: SearchSpace, tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("a", "b")]
    for seed, folder in enumerate(found):
        make_record(folder, tiny_space, seed=seed, share=0.3 + 0.3 * seed)
    return found


def test_explain_says_and_counts_the_same(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    e = explain(make_record(folders[0], _space(folders[0]), share=0.3))
    assert qnas("explain", folders[0]) == 0
    (d,) = e.devices
    assert f"{d.price:.3g} nats a millisecond" in capsys.readouterr().out
    assert qnas("explain", folders[0], "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"run": str(folders[0]), **json.loads(json.dumps(e.facts()))}
    assert facts["devices"][0]["price"] == d.price


def _space(folder: Path) -> SearchSpace:
    from qnas.spaces.space import load_space

    return load_space(folder / "space.yaml")


def test_report_writes_the_page(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert qnas("report", folders[0]) == 0
    assert capsys.readouterr().out == f"file        {folders[0] / 'report.html'}\n"
    assert (folders[0] / "report.html").read_text().startswith("<!doctype html>")
    assert qnas("report", folders[0].parent) == 1
    assert "arch.json: no such file" in capsys.readouterr().err


def test_compare_shows_both(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert qnas("compare", *folders) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert qnas("compare", *folders, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in facts["runs"]] == [str(folder) for folder in folders]
    assert any(facts["differ"])
    assert qnas("compare", folders[0]) == 1
    assert "expected 2 to 26 to compare" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "coloured"), [(None, True), ("", True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(
    folders: list[Path], setting: str | None, coloured: bool
) -> None:
    """NO_COLOR counts where it is set to anything (no-color.org)."""
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment |= {} if setting is None else {"NO_COLOR": setting}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qnas.commands", "compare", *map(str, folders)]
    with subprocess.Popen(command, stdout=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                read = os.read(ours, 4096)
            except OSError:  # the terminal is gone with its last writer
                break
            shown += read
    os.close(ours)
    assert process.returncode == 0
    assert b"position" in shown
    assert (b"\x1b[" in shown) == coloured
