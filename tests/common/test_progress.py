import os
import pty
import subprocess
import sys

import pytest

from qnas.common import progress
from qnas.common.progress import Progress

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
    assert lines[-1].startswith("search: 100%, 0 s left, loss 2.0")
    assert len(lines) == 2  # the end is said once


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress(1, "search", quiet=True) as bar:
        bar.step("loss 1.0")
    assert capsys.readouterr().err == ""
