"""The commands from whole networks to a device, on artificial times from a shipped device's model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import joined
from helpers.measured_networks import fill_in

from qnas.commands.own_device import calibrate, fit_latency, measure, sample
from qnas.common.errors import CheckpointError, TableError, UsageError
from qnas.deploy.sampling import CSV_FILE
from qnas.latency.device import load_device
from qnas.latency.fitting.measurements import Measured, read_measured, write_measured
from qnas.spaces.space import load_space

SPACE = "quadranet-small"


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sample's folder with times: those of the VPU's model, and a percent of noise."""
    monkeypatch.chdir(tmp_path)
    sample(SPACE, 40, "cpu", "arch", Path("board"), seed=0, force=False, quiet=True)
    fill_in(Path("board"), "vpu")
    return Path("board")


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_sample_with_times_becomes_a_device_and_a_calibrated_one(
    board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    fit_latency(board, "vpu-too", None, None, force=False, as_json=True)
    facts = printed(capsys)
    assert (facts["device"], facts["networks"], facts["within_10"]) == ("vpu-too", 40, 1.0)
    calibrate(board, "vpu-too.json", "corrected", 0.9, None, None, force=False, as_json=True)
    facts = printed(capsys)
    assert facts["scale"] == pytest.approx(1, abs=0.02)
    assert 0 < facts["margin"] < 0.05
    device = load_device("corrected.json")
    assert device.calibration is not None
    assert device.margin == facts["margin"]
    # a calibrated device is calibrated anew from its model, not on top of itself
    calibrate(board, "corrected.json", "again", 0.9, None, None, force=False, as_json=True)
    assert load_device("again.json").calibration == device.calibration


def test_text_says_accuracy_margin_and_what_to_do_next(
    board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_latency(board / CSV_FILE, "mine", None, None, force=False, as_json=False)
    text = capsys.readouterr().out
    assert "100.0% within 10%" in text
    assert "next        qnas search --device mine.json --space quadranet-small" in text
    calibrate(board, "vpu", "mine-2", 0.9, None, None, force=False, as_json=False)
    text = capsys.readouterr().out
    assert "90% of such networks stay within it (n = 40)" in text
    # what is to be copied is not wrapped
    assert max(len(line) for line in text.splitlines() if not line.startswith("next")) <= 80


def test_the_next_search_finds_a_space_of_ones_own(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = board / "space.yaml"
    copy.write_text(
        copy.read_text(encoding="utf-8").replace(f"name: {SPACE}", "name: mine"), encoding="utf-8"
    )
    fit_latency(board, "mine", None, None, force=False)
    assert "--space board/space.yaml --budget" in joined(capsys.readouterr().out)
    calibrate(board, "vpu", "mine-2", 0.9, None, None, force=False)
    assert "--space board/space.yaml --budget" in joined(capsys.readouterr().out)
    fit_latency(board, "mine", SPACE, None, force=True)
    assert f"--space {SPACE} --budget" in joined(capsys.readouterr().out)


def test_what_is_there_is_not_replaced(board: Path) -> None:
    Path("mine.json").touch()
    with pytest.raises(CheckpointError, match=r"mine\.json: exists already: give --force"):
        fit_latency(board, "mine", None, None, force=False)
    with pytest.raises(CheckpointError, match=r"mine\.json: exists already: give --force"):
        calibrate(board, "cpu", "mine", 0.9, None, None, force=False)
    assert Path("mine.json").stat().st_size == 0


@pytest.mark.parametrize("name", ["cpu", "cortex-a76"])
def test_a_name_of_a_shipped_device_is_refused(name: str, board: Path) -> None:
    with pytest.raises(UsageError, match="a device that ships has this name"):
        fit_latency(board, name, None, None, force=False)


def test_a_name_that_is_none_writes_nothing(board: Path) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(UsageError, match="--device-name 'a b': expected letters"):
        fit_latency(board, "a b", None, None, force=False)
    with pytest.raises(UsageError, match="--device-name 'a b': expected letters"):
        calibrate(board, "cpu", "a b", 0.9, None, None, force=False)
    assert sorted(Path().iterdir()) == before


def test_what_is_asked_wrongly_is_refused(board: Path) -> None:
    with pytest.raises(UsageError, match=r"--level 90: expected a share"):
        calibrate(board, "cpu", "mine", 90.0, None, None, force=False)
    with pytest.raises(UsageError, match="--format 'tflight': did you mean tflite"):
        sample(SPACE, 40, "cpu", "tflight", board)
    for command in (measure, lambda csv: fit_latency(csv, "mine")):
        with pytest.raises(
            UsageError, match=r"^nope: no such file, expected the CSV that qnas sample writes"
        ):
            command(Path("nope"))
    alone = Path("alone.csv")
    alone.write_text((board / CSV_FILE).read_text(encoding="utf-8"), encoding="utf-8")
    Path("board", "space.yaml").unlink()
    with pytest.raises(
        UsageError, match=r"no space\.yaml beside it: name the space of the networks with `space`"
    ):
        fit_latency(board, "mine", None, None, force=False)
    fit_latency(alone, "mine", SPACE, None, force=False)
    write_measured(alone, [Measured(r.name, r.arch) for r in read_measured(alone, load_space(SPACE))])
    with pytest.raises(TableError, match="latency_ms: empty for"):
        calibrate(alone, "cpu", "other", 0.9, SPACE, None, force=False)


def test_a_device_says_of_which_files_its_latencies_are(
    board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_latency(board, "mine", None, None, precision="int8", as_json=True, force=False)
    capsys.readouterr()
    assert load_device("mine.json").file_precision == "int8"
    space, csv = load_space(SPACE), board / CSV_FILE
    rows = [replace(row, format="tflite", precision="int8") for row in read_measured(csv, space)]
    write_measured(csv, rows)
    fit_latency(board, "quick", None, None, force=False)
    device = load_device("quick.json")
    assert (device.file_format, device.file_precision) == ("tflite", "int8")
    assert "in int8" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"`precision=fp16`: .*latencies\.csv has times of files in int8"):
        fit_latency(board, "other", None, None, precision="fp16", force=False)
    with pytest.raises(UsageError, match="`precision='int7'`: did you mean int8"):
        fit_latency(board, "other", None, None, precision="int7", force=False)
    write_measured(csv, [*rows[1:], replace(rows[0], precision="fp32")])
    with pytest.raises(TableError, match="precision: 'fp32' and 'int8': expected one for all networks"):
        fit_latency(board, "other", None, None, force=False)
    csv.write_text(csv.read_text(encoding="utf-8").replace(",fp32\n", ",fp23\n"), encoding="utf-8")
    with pytest.raises(TableError, match="precision: 'fp23': did you mean fp32"):
        fit_latency(board, "other", None, None, force=False)
