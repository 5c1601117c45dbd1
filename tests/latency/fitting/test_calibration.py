import json
import math
from datetime import date
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from qnas.common.errors import CheckpointError, TableError
from qnas.latency.device import load_device
from qnas.latency.device_table import load_table
from qnas.latency.fitting.calibration import (
    CALIBRATED,
    LEAST_FITTED,
    Calibrated,
    calibrate,
    check_margin,
    conformal_margin,
    margin_networks,
    write_calibrated,
)
from qnas.latency.table import RUNTIME, table_text
from qnas.spaces.space import SearchSpace

DAY = date(2026, 1, 1)
LEVELS = ("0.5", "0.8", "0.9", "0.95", "0.99", "0.7", "0.6")


def calibrated(
    predicted: list[float], measured: list[float], level: float = 0.9, fixed_ms: float = 0.0
) -> Calibrated:
    return calibrate(
        predicted, measured, level, fixed_ms=fixed_ms, source="some networks", where="t.csv", day=DAY
    )


def test_scale_and_offset_that_made_the_times_are_recovered() -> None:
    predicted = np.linspace(1, 10, 20)
    found = calibrated(predicted.tolist(), (1.3 * predicted + 0.25).tolist()).calibration
    assert found.scale == pytest.approx(1.3, rel=1e-5)
    assert found.offset_ms == pytest.approx(0.25, rel=1e-4)
    assert found.margin == pytest.approx(0, abs=1e-5)
    assert (found.n, found.level, found.date, found.source) == (20, 0.9, "2026-01-01", "some networks")


@pytest.mark.parametrize("level", LEVELS)
def test_the_number_of_networks_for_a_level_is_the_least(level: str) -> None:
    # exact arithmetic: the k-th of n, k = ceil((n + 1) level), must be one of the n
    exact = next(n for n in range(1, 1000) if math.ceil((n + 1) * Fraction(level)) <= n)
    assert margin_networks(float(level)) == exact


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [99, 100, 119, 123])
def test_the_margin_is_the_quantile_of_its_definition(level: str, n: int) -> None:
    errors = np.random.default_rng(0).permutation(np.arange(1, n + 1) / 1000)
    assert conformal_margin(errors, float(level)) == math.ceil((n + 1) * Fraction(level)) / 1000


def test_a_margin_is_never_below_zero() -> None:
    assert conformal_margin(np.full(9, -0.1), 0.9) == 0.0


def test_the_margin_covers_the_promised_share_of_new_networks() -> None:
    rng = np.random.default_rng(0)
    trials, n, level = 4000, 19, 0.9  # 9 networks for the margin: their largest error
    held = 0
    for _ in range(trials):
        predicted = rng.uniform(1, 10, n + 1)
        # heavy tails, and an error that grows with the network: no model of the fit's
        measured = 0.2 + 1.4 * predicted**1.05 * np.exp(0.05 * rng.standard_t(4, n + 1))
        found = calibrated(predicted[:n].tolist(), measured[:n].tolist(), level).calibration
        held += measured[n] <= (1 + found.margin) * (found.scale * predicted[n] + found.offset_ms)
    share, error = held / trials, math.sqrt(level * (1 - level) / trials)
    # with errors of a continuous distribution the share is k / (n + 1) exactly, 9 of 10 here
    assert abs(share - level) <= 3 * error


def test_too_few_networks_for_a_level_are_refused_with_the_number_needed() -> None:
    needed = 9 + LEAST_FITTED
    times = np.linspace(1, 5, needed).tolist()
    assert calibrated(times, times, 0.9).calibration.n == needed
    with pytest.raises(TableError, match=rf"t\.csv: {needed - 1} networks are too few .* least {needed} "):
        calibrated(times[1:], times[1:], 0.9)
    with pytest.raises(TableError, match=f"for a level of 0.99: measure at least {99 + LEAST_FITTED} "):
        calibrated(times, times, 0.99)


def test_times_that_do_not_grow_with_predictions_are_refused() -> None:
    times = np.linspace(1, 5, 20)
    with pytest.raises(TableError, match="do not grow with the predicted"):
        calibrated(times.tolist(), times[::-1].tolist())


@pytest.mark.parametrize("fixed_ms", [0.0, 0.3])
def test_no_network_is_predicted_below_zero(fixed_ms: float) -> None:
    kernels = np.linspace(1, 5, 20)
    predicted = (fixed_ms + kernels).tolist()
    found = calibrated(predicted, np.maximum(2 * kernels - 1.9, 0.05).tolist(), fixed_ms=fixed_ms).calibration
    assert found.scale * fixed_ms + found.offset_ms >= 0
    assert found.offset_ms == pytest.approx(-found.scale * fixed_ms, abs=1e-9)


def test_a_calibrated_copy_of_a_shipped_device_predicts_the_corrected_latencies(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    cpu = load_device("cpu")
    raw = load_table(cpu, tiny_space)
    rng = np.random.default_rng(0)
    archs = [tuple(int(rng.integers(len(row))) for row in raw.ms) for _ in range(20)]
    predicted = [raw.latency_ms(arch) for arch in archs]
    measured = (np.array(predicted) * 1.5 * rng.normal(1, 0.05, 20)).tolist()
    done = calibrated(predicted, measured, fixed_ms=dict(raw.fixed)[RUNTIME].latency_ms)
    write_calibrated(cpu, done, tmp_path / "mine.json", name="mine")
    mine = load_device(tmp_path / "mine.json")
    assert (mine.name, mine.aliases, mine.calibration) == ("mine", (), done.calibration)
    assert mine.accuracy == {**cpu.accuracy, CALIBRATED: {"all": done.after}}
    table = load_table(mine, tiny_space)
    assert table.margin == done.calibration.margin > 0
    for arch, before in zip(archs, predicted, strict=True):
        expected = done.calibration.scale * before + done.calibration.offset_ms
        assert table.latency_ms(arch) == pytest.approx(expected, abs=2e-5)  # cells are rounded to 1 ns
    assert not (tmp_path / "mine").exists()


def test_measured_tables_go_with_the_copy(tiny_space: SearchSpace, tmp_path: Path) -> None:
    board = tmp_path / "board.json"
    content = {
        "schema": "qnas.device/1",
        "name": "board",
        "title": "a board",
        "runtime": "mine",
        "precision": "float32",
        "batch": 1,
        "unit": "ms",
        "kind": "measured",
        "source": "measured by hand",
        "date": "2026-01-01",
    }
    board.write_text(json.dumps(content), encoding="utf-8")
    raw = load_table(load_device("cpu"), tiny_space)
    (tmp_path / "board").mkdir()
    text = table_text(raw, tiny_space)
    (tmp_path / "board" / "tiny.csv").write_text(text, encoding="utf-8")
    times = np.linspace(1, 5, 20)
    done = calibrated(times.tolist(), (2 * times).tolist())
    write_calibrated(load_device(board), done, tmp_path / "new.json", name="new")
    assert (tmp_path / "new" / "tiny.csv").read_text(encoding="utf-8") == text
    arch = (0,) * len(raw.cells)
    new = load_table(load_device(tmp_path / "new.json"), tiny_space)
    assert new.latency_ms(arch) == pytest.approx(2 * raw.latency_ms(arch), rel=1e-4)
    with pytest.raises(CheckpointError, match=r"new/tiny\.csv: exists already"):
        write_calibrated(load_device(board), done, tmp_path / "new.json", name="new")
    write_calibrated(load_device(board), done, tmp_path / "new.json", name="new", force=True)


def test_times_that_have_nothing_to_do_with_the_predictions_are_refused() -> None:
    predicted = np.linspace(1, 10, 40)
    right = calibrated(predicted.tolist(), (1.2 * predicted).tolist()).calibration
    check_margin(right, "t.csv")
    wild = right.model_copy(update={"margin": 6.26})
    with pytest.raises(TableError, match=r"t\.csv: measured latencies are up to 626% above"):
        check_margin(wild, "t.csv")
