import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fitting.fit import Form, design, fit_networks, fit_relative, fit_robust, scaled, summed
from helpers.places import LATENCY_DATA, ROOT
from scipy import sparse

from qnas.latency.device import device_names, load_device
from qnas.latency.features import FEATURES
from qnas.latency.kernels import Kernel

DATA = LATENCY_DATA
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the measurements are not here")

KERNELS = [
    Kernel("conv", 28, 16, 24, 3),
    Kernel("conv", 14, 32, 48, 5),
    Kernel("add", 28, 24, 24),
    Kernel("add", 7, 96, 96),
    Kernel("hswish", 14, 48, 48),
]
FORM = Form(
    own={"conv": ("launch", "mmacs")},
    shared={
        "pass.launch": {("add", "launch"): 1.5, ("hswish", "launch"): 4},
        "pass.kelements": {("add", "kelements_in"): 1.5, ("hswish", "kelements_in"): 4},
    },
    floors={"pass.launch": 0.02, "conv.launch": 0.05},
)


def counts_of_networks(n: int) -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    return sparse.csr_matrix(rng.integers(0, 9, (n, len(KERNELS))).astype(float))


def test_a_fit_recovers_what_made_the_data() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.5, 0.0, 2.0, 1e-3])
    matrix = rng.uniform(1, 10, (200, 4)) * [1, 1, 1, 1000]
    for fit in (fit_relative, fit_robust):
        found = fit(matrix, matrix @ truth, np.zeros(4))
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


def test_a_row_that_counts_twice_is_a_row_that_is_there_twice() -> None:
    rng = np.random.default_rng(1)
    matrix, latency = rng.uniform(1, 10, (6, 2)), rng.uniform(1, 10, 6)
    twice = fit_relative(np.vstack([matrix, matrix[:1]]), np.append(latency, latency[0]), np.zeros(2))
    counts = np.array([2.0, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(fit_relative(matrix, latency, np.zeros(2), counts), twice, rtol=1e-5)


def test_networks_far_off_do_not_move_a_robust_fit() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.uniform(1, 10, (300, 2))
    latency = matrix @ [1.0, 2.0]
    latency[:20] *= 3  # throttled, say
    plain = fit_relative(matrix, latency, np.zeros(2))
    robust = fit_robust(matrix, latency, np.zeros(2))
    assert np.abs(matrix[20:] @ robust / latency[20:] - 1).max() < 0.01
    assert np.abs(matrix[20:] @ plain / latency[20:] - 1).max() > 0.02


def test_kinds_that_share_a_weight_cost_multiples_of_it() -> None:
    counts = counts_of_networks(200)
    # as the form says: launches 0.1 and 0.03 a pass, 0.2 ms a million multiply-adds, 0.001 a thousand
    ms = [
        0.1 + 0.2 * FEATURES["mmacs"](k)
        if k.kind == "conv"
        else {"add": 1.5, "hswish": 4}[k.kind] * (0.03 + 0.001 * FEATURES["kelements_in"](k))
        for k in KERNELS
    ]
    fit = fit_networks(design(FORM, KERNELS, counts), counts @ np.array(ms) + 0.7, np.ones(200, bool))
    assert fit.fixed_ms == pytest.approx(0.7, rel=0.02)
    assert fit.shared == pytest.approx({"pass.launch": 0.03, "pass.kelements": 0.001}, rel=0.02)
    assert fit.terms["conv"] == pytest.approx({"launch": 0.1, "mmacs": 0.2}, rel=0.02)
    assert fit.terms["hswish"] == pytest.approx({"launch": 0.12, "kelements_in": 0.004}, rel=0.02)
    assert fit.terms["add"] == pytest.approx({"launch": 0.045, "kelements_in": 0.0015}, rel=0.02)


def test_a_fit_sees_only_the_rows_it_is_given_and_keeps_all_floors() -> None:
    counts = counts_of_networks(100)
    latency = np.full(100, 1e-3)  # far below what the floors add up to
    rows = np.arange(100) < 50
    fit = fit_networks(design(FORM, KERNELS, counts), latency, rows)
    assert fit.terms["conv"]["launch"] == 0.05
    assert fit.terms["add"]["launch"] == pytest.approx(1.5 * 0.02)
    latency[~rows] = np.nan  # not measured
    assert fit_networks(design(FORM, KERNELS, counts), latency, rows) == fit


def test_a_form_must_give_each_kind_a_launch_and_know_its_features() -> None:
    with pytest.raises(AssertionError):
        Form(own={"conv": ("mmacs",)}, shared={}, floors={})
    with pytest.raises(AssertionError):
        Form(own={"conv": ("launch", "no such feature")}, shared={}, floors={})
    with pytest.raises(AssertionError, match=r"no terms for .'gap'"):
        design(FORM, [Kernel("gap", 7, 8, 8)], sparse.csr_matrix(np.ones((1, 1))))


def test_terms_add_up_and_keep_six_digits() -> None:
    assert scaled({"launch": 1 / 3, "mmacs": 0.0}, 2) == {"launch": 0.666667}
    assert summed({"launch": 0.1}, {"launch": 0.2, "mmacs": 1.0}) == {"launch": 0.3, "mmacs": 1.0}


@needs_data
@pytest.mark.slow
def test_the_shipped_devices_are_reproduced_byte_for_byte(tmp_path: Path) -> None:
    script = ROOT / "latency_tables" / "make_tables.py"
    command = [sys.executable, str(script), "--data", str(DATA), "--out", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in device_names():
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
