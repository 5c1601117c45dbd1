import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qnas.common.errors import CheckpointError, Interrupted
from qnas.runs import run_folder
from qnas.runs.folders import read_config
from qnas.runs.metrics import Metrics
from qnas.runs.names import (
    ARCH_FILE,
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    SPACE_FILE,
    SUBNET_FOLDER,
    SUPERNET_FILE,
)

REQUEST = {"search": {"seed": 0}, "data": "digits", "space_digest": "a", "versions": {"torch": "2"}}
COPIES = {SPACE_FILE: "name: tiny\n"}


@contextmanager
def opened(
    folder: Path, request: object = None, *, resume: bool = False, force: bool = False
) -> Iterator[None]:
    wanted = REQUEST | (request if isinstance(request, dict) else {})
    with run_folder.opened(folder, wanted, COPIES, result=ARCH_FILE, resume=resume, force=force):
        yield


def test_a_run_keeps_what_it_was_asked(tmp_path: Path) -> None:
    with opened(tmp_path / "run"):
        assert read_config(tmp_path / "run") == REQUEST
        assert (tmp_path / "run" / SPACE_FILE).read_text() == COPIES[SPACE_FILE]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [CONFIG_FILE, SPACE_FILE]


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with opened(folder):
        for resume, force in ((True, False), (False, True), (False, False)):
            with (
                pytest.raises(CheckpointError, match=f"process {os.getpid()} is working in it"),
                opened(folder, resume=resume, force=force),
            ):
                pass
        assert read_config(folder) == REQUEST
    with opened(folder, resume=True):
        pass
    # nor is the network replaced that is being trained from it
    with (
        opened(folder / SUBNET_FOLDER),
        pytest.raises(CheckpointError, match=r"subnet: process \d+ is working"),
        opened(folder, force=True),
    ):
        pass
    assert (folder / SUBNET_FOLDER / CONFIG_FILE).is_file()


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK_FILE).write_text("123456")
    (folder / f".{CONFIG_FILE}.123456.partial").write_text("{")
    with opened(folder):
        pass
    (folder / ".checkpoint.pt.123456.partial").write_text("half")
    (folder / LOCK_FILE).write_text("123456")
    with opened(folder, resume=True):
        pass
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, SPACE_FILE]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for force in (False, True):
        with (
            pytest.raises(CheckpointError, match="is not empty and holds no run"),
            opened(tmp_path / "mine", force=force),
        ):
            pass
    with pytest.raises(CheckpointError, match="nothing to resume"), opened(tmp_path / "mine", resume=True):
        pass
    with pytest.raises(CheckpointError, match="nothing to resume"), opened(tmp_path / "none", resume=True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letter.txt"]


def test_a_run_that_was_asked_something_else_is_not_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with opened(folder):
        pass
    (folder / SPACE_FILE).write_text("name: tiny\nnorm: batchnorm\n")  # as if it had been then
    words = "changed since it started: seed was 0, is 1; the space changed .*: norm batchnorm -> None"
    with (
        pytest.raises(CheckpointError, match=words),
        opened(folder, {"search": {"seed": 1}, "space_digest": "b"}, resume=True),
    ):
        pass
    assert read_config(folder) == REQUEST


def test_a_complete_run_is_not_resumed_and_loses_a_checkpoint_left_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with opened(folder):
        (folder / ARCH_FILE).write_text("{}")
        (folder / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="this search is complete"), opened(folder, resume=True):
        pass
    assert not (folder / "checkpoint.pt").exists()


def test_a_forced_run_says_complete_at_no_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with opened(folder):
        for name in (ARCH_FILE, SUPERNET_FILE, "checkpoint.pt"):
            (folder / name).write_bytes(b"")
    unlink = Path.unlink

    def look(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=missing_ok)
        assert (folder / SUPERNET_FILE).exists() or not (folder / ARCH_FILE).exists()

    monkeypatch.setattr(Path, "unlink", look)
    with opened(folder, force=True):
        assert not (folder / SUPERNET_FILE).exists()
        assert not (folder / "checkpoint.pt").exists()


def test_ctrl_c_anywhere_in_a_run_says_how_to_go_on(tmp_path: Path) -> None:
    with (
        pytest.raises(Interrupted, match=r"the state is saved in .*run: `resume=True` continues from it"),
        opened(tmp_path / "run"),
    ):
        raise KeyboardInterrupt
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_metrics_are_cut_back_and_never_filled_up(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    metrics = Metrics(path)
    metrics.write({"step": 1, "loss": 1.0})
    size = metrics.sync()
    metrics.write({"step": 2, "loss": 1.0})
    Metrics(path, keep_bytes=size).write({"step": 3, "loss": 0.5})
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 3, "loss": 0.5}\n'
    with pytest.raises(CheckpointError, match="not as it was when the checkpoint was written"):
        Metrics(path, keep_bytes=size + 3)  # as if a line before had been edited
    for content in (path.read_bytes()[: size - 1], None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match="shorter than when the checkpoint was written"):
            Metrics(path, keep_bytes=size)
