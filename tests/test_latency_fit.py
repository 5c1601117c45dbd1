import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qnas.errors import TableError
from qnas.latency.device import load_device
from qnas.latency.features import FEATURES
from qnas.latency.fit import (
    EDGE_FEATURES,
    OPERATOR_FEATURES,
    PASSES,
    figures,
    fit_networks,
    fit_relative,
    read_networks,
    read_operators,
)

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "latency_data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the measurements are not here")


def test_fits_use_features_that_exist() -> None:
    for features in (*EDGE_FEATURES.values(), *OPERATOR_FEATURES.values()):
        assert set(features) <= set(FEATURES)
        assert "launch" in features


def test_a_fit_recovers_what_made_the_data() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.5, 0.0, 2.0, 1e-3])
    matrix = rng.uniform(1, 10, (200, 4)) * [1, 1, 1, 1000]
    found = fit_relative(matrix, matrix @ truth, np.zeros(4))
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-4)


def test_weights_keep_their_floor() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.uniform(1, 10, (50, 2))
    found = fit_relative(matrix, matrix @ [1.0, 0.0], np.array([0.0, 0.25]))
    assert found[1] == 0.25
    assert (found >= 0).all()


def test_a_fit_minimises_the_relative_error() -> None:
    # two networks of one kernel: the weight that makes the relative errors least in squares
    matrix, latency = np.array([[1.0], [1.0]]), np.array([1.0, 10.0])
    weights = np.linspace(0, 2, 20001)
    best = weights[np.argmin([np.sum((w / latency - 1) ** 2) for w in weights])]
    assert fit_relative(matrix, latency, np.zeros(1))[0] == pytest.approx(best, abs=2e-4)


def test_figures_are_those_of_their_definitions() -> None:
    found = figures(np.array([1.04, 1.08, 0.8, 4.0]), np.array([1.0, 1.0, 1.0, 4.0]))
    assert (found.n, found.within_5_pct, found.within_10_pct) == (4, 50.0, 75.0)
    assert found.bias_pct == -2.0
    assert found.rmspe_pct == pytest.approx(100 * np.sqrt((0.04**2 + 0.08**2 + 0.2**2) / 4), abs=0.01)


def test_absent_measurements_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such file"):
        read_networks(tmp_path / "edge_models.npz")
    with pytest.raises(TableError, match="no such file"):
        read_operators(tmp_path / "a100_ops.csv")


@needs_data
def test_a_fit_to_a_tenth_of_the_networks_predicts_the_rest() -> None:
    networks = read_networks(DATA / "edge_models.npz", every=10)
    for device in ("cortex-a76", "myriad-vpu"):
        fit = fit_networks(networks, device, floors={"launch": 0.001, "kelements_in": 0.0004})
        assert fit.accuracy["unseen networks"]["all"].within_10_pct > 80
        assert fit.terms["hswish"]["launch"] == pytest.approx(PASSES["hswish"] * fit.terms["add"]["launch"])
        assert all(terms["launch"] > 0 for terms in fit.terms.values())


@needs_data
@pytest.mark.slow
def test_the_shipped_devices_are_reproduced_byte_for_byte(tmp_path: Path) -> None:
    script = ROOT / "latency_tables" / "make_tables.py"
    command = [sys.executable, str(script), "--data", str(DATA), "--out", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in ("cortex-a76", "myriad-vpu", "a100"):
        again = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert again["accuracy"] == json.loads(load_device(name).to_json())["accuracy"]
        for file in (tmp_path / name).iterdir():
            assert file.read_text() == (script.parent / name / file.name).read_text()
    assert "unseen family" in printed
    # from the device files alone: the same tables
    for file in tmp_path.glob("*/*.csv"):
        file.unlink()
    subprocess.run([sys.executable, str(script), "--tables-only", "--out", str(tmp_path)], check=True)
    for file in tmp_path.glob("*/*.csv"):
        assert file.read_text() == (script.parent / file.parent.name / file.name).read_text()
