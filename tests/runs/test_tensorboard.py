import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qnas.common.errors import CheckpointError, UsageError
from qnas.common.files import write_json
from qnas.runs.names import CONFIG_FILE, METRICS_FILE, SUBNET_FOLDER, TENSORBOARD_FOLDER
from qnas.runs.tensorboard import write_events

ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.5},
    {"step": 2, "loss": 2.25, "multiplier": 0.5, "of_limit_vpu": 1.5, "probabilities": [[0.5, 0.5]]}
    | dict.fromkeys(("arch_loss", "expected_ms", "limit_ms", "temperature", "entropy"), 1.0)
    | {"identity_share": 0.0},
    {"step": 3, "loss": 2.0, "warnings": ["it stands still"]},
]
TRAINED: list[dict[str, Any]] = [
    {"step": 1, "loss": 1.5},
    {"step": 2, "loss": 1.0, "epoch": 1, "test_accuracy": 0.75}
    | dict.fromkeys(("train_loss", "learning_rate", "test_loss"), 0.5),
]


def put(folder: Path, command: str, rows: list[dict[str, Any]], end: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    training = {"train": {}, "from_supernet": False}
    request = training if command == "train-subnet" else {"search": {}}
    write_json(folder / CONFIG_FILE, {"command": command, **request})


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_every_figure_of_the_metrics_is_an_event(tmp_path: Path) -> None:
    put(tmp_path, "search", ROWS, end='{"step": 4, "lo')  # as of a run that is at work
    put(tmp_path / SUBNET_FOLDER, "train-subnet", TRAINED)
    for _ in range(2):  # written anew, not beside
        out = write_events(tmp_path)
        assert sorted(log.name for log in out.iterdir()) == ["search", "train-subnet"]
        for name, rows in (("search", ROWS), ("train-subnet", TRAINED)):
            events = read(out / name)
            expected = {
                key: [(row["step"], row[key]) for row in rows if key in row]
                for row in rows
                for key, value in row.items()
                if isinstance(value, float)
            }
            assert set(events.Tags()["scalars"]) == set(expected)
            for key, values in expected.items():
                assert [(event.step, event.value) for event in events.Scalars(key)] == values
    (warning,) = read(out / "search").Tensors("warnings/text_summary")
    assert (warning.step, warning.tensor_proto.string_val[0]) == (3, b"it stands still")


def test_a_network_trained_in_a_folder_of_its_own_is_a_training(tmp_path: Path) -> None:
    put(tmp_path, "train-subnet", TRAINED)
    assert [log.name for log in write_events(tmp_path).iterdir()] == ["train-subnet"]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no metrics\.jsonl here"):
        write_events(tmp_path)
    put(tmp_path, "search", ROWS)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(UsageError, match=r"pip install 'quadranet-nas\[tensorboard\]'"):
        write_events(tmp_path)
    assert not (tmp_path / TENSORBOARD_FOLDER).exists()
