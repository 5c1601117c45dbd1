import os
import pty
import subprocess
import sys

import pytest

from qnas.common import progress
from qnas.common.progress import OnStderr, Pace, Progress, Report, reporting_to, silent

SCRIPT = """
from qnas.common.progress import Progress
with Progress(4, "warm-up") as bar:
    for i in range(4):
        bar.phase("warm-up" if i < 2 else "search")
        bar.step(f"loss {i}.0")
"""


def test_a_terminal_gets_a_bar_even_without_a_width() -> None:
    master, slave = pty.openpty()  # reports zero columns
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=slave, check=True)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    for word in ("warm-up: ", "search: ", "100%", "4/4", "loss 3.0"):
        assert word in shown


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress(4, "warm-up") as bar:
        bar.skip(2)
        bar.phase("search")
        bar.step("loss 2.0")
        bar.step()
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert lines[0].startswith("search:  50%, ")
    assert lines[-1].startswith("search: 100%, loss 2.0")
    assert len(lines) == 2  # the end is said once


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress(1, "search", quiet=True) as bar:
        bar.step("loss 1.0")
    assert capsys.readouterr().err == ""


def test_a_time_left_is_shown_once_the_pace_has_settled() -> None:
    pace, now, shown = Pace(0.0), 0.0, {}
    for done in range(1, 1001):
        now += 8.0 if done == 1 else 0.1  # the first step compiles
        shown[done] = pace.seconds_left(done, 1000, now)
    first = next(done for done, left in shown.items() if left is not None)
    assert first > 20
    assert shown[first] == pytest.approx(0.1 * (1000 - first), rel=1.0)
    assert all(left is not None for done, left in shown.items() if done >= first)
    assert shown[900] == pytest.approx(10.0, rel=0.05)
    assert shown[1000] == 0


def test_no_time_left_is_shown_at_the_very_start() -> None:
    pace = Pace(0.0)
    assert [pace.seconds_left(done, 1000, 0.1 * done) for done in range(1, 50)] == [None] * 49
    pace = Pace(0.0)
    assert [pace.seconds_left(done, 1000, 2.0 * done) for done in range(1, 20)] == [None] * 19


def test_steps_and_warnings_are_reported_to_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[Report] = []
    with reporting_to(reports.append)(3, "measure") as bar:
        bar.skip(1)
        bar.step("loss 1.0")
        bar.warn("it stalls")
        bar.step_by(1)
    assert [(r.done, r.total, r.warning) for r in reports] == [
        (2, 3, None),
        (2, 3, "it stalls"),
        (3, 3, None),
    ]
    assert {r.figures for r in reports} == {"loss 1.0"}
    assert capsys.readouterr() == ("", "")


def test_warnings_are_shown_when_quiet_and_not_when_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for display, said in ((OnStderr(quiet=True), "qnas: warning: it stalls\n"), (silent, "")):
        with display(1, "search") as bar:
            bar.step()
            bar.warn("it stalls")
        assert capsys.readouterr().err == said
