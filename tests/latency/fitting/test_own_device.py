import dataclasses
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qnas.common.errors import TableError
from qnas.deploy.sampling import choose_networks
from qnas.latency.device import Device, load_device
from qnas.latency.device_table import compute_table, load_table
from qnas.latency.features import FEATURES
from qnas.latency.fitting.own_device import (
    _OTHER_KINDS,
    _TERMS,
    CROSS_VALIDATED,
    LEAST_NETWORKS,
    OwnFit,
    fit_own,
    own_device,
)
from qnas.spaces.arch import Arch, arch_from_indices, sample_arch
from qnas.spaces.space import SearchSpace, load_space

DAY = date(2026, 1, 1)
N = 60

# A machine with rates of its own for every kind of kernel; dearer in ways that no rate of the fit has.
TRUTH = {
    "conv1x1": {"launch": 0.004, "mmacs": 0.02, "kelements_in": 0.0006, "kweights": 0.0004},
    "patch": {"launch": 0.006, "mmacs": 0.03, "kelements_out": 0.001},
    "linear": {"launch": 0.003, "kweights": 0.0005},
    "dwconv": {"launch": 0.005, "mmacs": 0.08, "kelements_in": 0.0008, "kelements_out_k7": 0.0005},
    "layernorm": {"launch": 0.003, "kelements_in": 0.001, "kpixels": 0.004},
    "gelu": {"launch": 0.002, "kelements_in": 0.0015},
    "mul": {"launch": 0.002, "kelements_in": 0.0005},
    "add": {"launch": 0.001, "kelements_in": 0.0005},
    "gap": {"launch": 0.002, "kelements_in": 0.0005},
}


def true_device() -> Device:
    content = {
        "schema": "qnas.device/1",
        "name": "truth",
        "title": "made up",
        "runtime": "none",
        "precision": "float32",
        "batch": 1,
        "unit": "ms",
        "kind": "fitted",
        "source": "made up",
        "date": "2026-01-01",
        "fixed_ms": 0.02,
        "model": {kind: {"kind": "fitted", "terms": terms} for kind, terms in TRUTH.items()},
    }
    return Device.model_validate(content)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("quadranet-small")


@pytest.fixture(scope="module")
def archs(space: SearchSpace) -> list[Arch]:
    """A sample as the command makes it, by another device than the true one."""
    chosen = choose_networks(space, load_table(load_device("cpu"), space), N, 0)
    return [arch_from_indices(space, indices) for indices in chosen]


def latencies(device: Device, space: SearchSpace, archs: list[Arch]) -> NDArray[np.float64]:
    table = compute_table(device, space)
    return np.array([table.latency_ms(arch.indices(space)) for arch in archs])


def fitted(fit: OwnFit, space: SearchSpace) -> Device:
    return own_device(fit, name="mine", space=space, networks=N, runtime="a runtime", day=DAY)


def fit_true(space: SearchSpace, archs: list[Arch], noise: float = 0.0) -> OwnFit:
    exact = latencies(true_device(), space, archs)
    times = exact * np.random.default_rng(0).normal(1.0, noise, len(exact))
    return fit_own(space, archs, times.tolist(), "t.csv")


def random_archs(space: SearchSpace, n: int = 200) -> list[Arch]:
    rng = np.random.default_rng(1)
    return [sample_arch(space, rng) for _ in range(n)]


def test_terms_are_features_that_exist() -> None:
    for terms in _TERMS.values():
        assert set(terms) <= set(FEATURES)
        assert terms[0] == "launch"


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.002), (0.02, 0.02)])
def test_costs_that_made_the_times_are_recovered(
    noise: float, tolerance: float, space: SearchSpace, archs: list[Arch]
) -> None:
    unseen = random_archs(space)
    device = fitted(fit_true(space, archs, noise), space)
    error = latencies(device, space, unseen) / latencies(true_device(), space, unseen) - 1
    assert np.abs(error).max() < tolerance


@pytest.mark.parametrize("name", ["quadranet-gpu", "quadranet-mobile"])
def test_costs_hold_in_another_space_of_the_same_kernels(
    name: str, space: SearchSpace, archs: list[Arch]
) -> None:
    larger = load_space(name)  # 224 px instead of 32
    unseen = random_archs(larger)
    device = fitted(fit_true(space, archs), space)
    error = latencies(device, larger, unseen) / latencies(true_device(), larger, unseen) - 1
    assert np.abs(error).max() < 0.03


def test_the_accuracy_told_is_that_on_networks_never_seen(space: SearchSpace, archs: list[Arch]) -> None:
    noise = 0.05
    fit = fit_true(space, archs, noise)
    unseen = random_archs(space)
    exact = latencies(true_device(), space, unseen)
    noisy = exact * np.random.default_rng(2).normal(1.0, noise, len(exact))
    error = latencies(fitted(fit, space), space, unseen) / noisy - 1
    assert fit.accuracy.n == N
    assert fit.accuracy.rmspe_pct == pytest.approx(100 * np.sqrt(np.mean(error**2)), rel=0.25)
    times = latencies(true_device(), space, archs) * np.random.default_rng(0).normal(1.0, noise, N)
    residual = latencies(fitted(fit, space), space, archs) / times - 1
    assert fit.accuracy.rmspe_pct > 105 * np.sqrt(np.mean(residual**2))  # in percent, and more by 5%


@pytest.mark.parametrize("share", [0.8, 0.85, 0.9, 0.95])
def test_no_kernel_is_free_and_no_weight_below_zero(
    share: float, space: SearchSpace, archs: list[Arch]
) -> None:
    exact = latencies(true_device(), space, archs)
    # less than the parts that all networks have: the best weights of some launches are below zero
    fit = fit_own(space, archs, (exact - share * exact.min()).tolist(), "t.csv")
    assert fit.fixed_ms > 0
    for model in fit.model.values():
        assert model.terms is not None
        assert model.terms["launch"] > 0
        assert min(model.terms.values()) >= 0


def test_what_all_networks_have_alike_costs_about_the_machine_s_rates(
    space: SearchSpace, archs: list[Arch]
) -> None:
    fit = fit_true(space, archs, 0.02)
    rates = fit.model["relu"].terms  # in no network: the rates themselves
    for kind in ("gap", "linear", "patch"):
        terms = fit.model[kind].terms
        assert rates is not None
        assert terms is not None
        for feature, rate in rates.items():
            assert rate / 2 < terms[feature] < 2 * rate


def test_what_no_network_has_is_an_estimate(space: SearchSpace, archs: list[Arch]) -> None:
    fit = fit_true(space, archs)
    assert set(fit.model) == {*_TERMS, *_OTHER_KINDS}
    for kind, model in fit.model.items():
        assert model.kind == ("fitted" if kind in TRUTH else "estimated")
        assert ("the same in all networks" in model.note) == (kind in ("gap", "linear", "patch"))
    # as another norm makes it, of kernels that are in no network with layer normalisation
    other = compute_table(fitted(fit, space), load_space("quadranet-mobile-bn"))
    assert 0 < other.coverage((0,) * len(other.cells)) < 1


def test_the_file_predicts_what_was_fitted(space: SearchSpace, archs: list[Arch], tmp_path: Path) -> None:
    fit = fit_true(space, archs, 0.01)
    device = fitted(fit, space)
    path = tmp_path / "mine.json"
    path.write_text(device.to_json(), encoding="utf-8")
    loaded = load_device(path)
    assert loaded.to_json() == device.to_json()
    assert load_table(loaded, space) == compute_table(device, space)
    assert loaded.accuracy[CROSS_VALIDATED]["all"] == fit.accuracy
    assert (loaded.name, loaded.kind, loaded.runtime, loaded.date) == (
        "mine",
        "fitted",
        "a runtime",
        "2026-01-01",
    )
    assert fitted(fit_true(space, archs, 0.01), space).to_json() == device.to_json()


def test_too_few_networks_are_refused_with_the_number_needed(space: SearchSpace, archs: list[Arch]) -> None:
    times = latencies(true_device(), space, archs)
    assert fit_own(space, archs[:LEAST_NETWORKS], times[:LEAST_NETWORKS].tolist(), "t.csv").terms < 16
    with pytest.raises(TableError, match=r"t\.csv: 19 networks are too few .* at least 20, .*`networks=40`"):
        fit_own(space, archs[:19], times[:19].tolist(), "t.csv")


def test_networks_need_be_more_than_the_terms_of_the_space(
    space: SearchSpace, archs: list[Arch], monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = fit_true(space, archs).terms
    monkeypatch.setattr("qnas.latency.fitting.own_device.LEAST_NETWORKS", 1)
    with pytest.raises(TableError, match=f"{terms} networks are too few for the {terms} terms"):
        fit_own(space, archs[:terms], latencies(true_device(), space, archs[:terms]).tolist(), "t.csv")


def test_times_without_spread_are_refused(space: SearchSpace, archs: list[Arch]) -> None:
    times = np.random.default_rng(0).uniform(1.0, 1.1, N)
    with pytest.raises(TableError, match=r"the slowest network takes only 1\.\d\d times as long"):
        fit_own(space, archs, times.tolist(), "t.csv")


def test_times_that_do_not_follow_the_networks_are_refused(space: SearchSpace, archs: list[Arch]) -> None:
    times = np.random.default_rng(0).permutation(latencies(true_device(), space, archs))
    with pytest.raises(TableError, match="times do not follow the networks"):
        fit_own(space, archs, times.tolist(), "t.csv")


def test_networks_that_never_vary_a_kernel_are_refused(space: SearchSpace) -> None:
    # identities but for the order of two candidates: the same kernels in all
    rows = {tuple(np.roll((1,) + (6,) * 2, i)) + (6,) * 7 for i in range(3)}
    alike = [arch_from_indices(space, tuple(int(i) for i in row)) for row in rows] * 10
    with pytest.raises(TableError, match=r"kernels of kind add, conv1x1, dwconv, .* are the same in all"):
        fit_own(space, alike, np.linspace(1, 2, 30).tolist(), "t.csv")


def test_a_device_without_a_word_on_its_runtime_says_so(space: SearchSpace, archs: list[Arch]) -> None:
    fit = dataclasses.replace(fit_true(space, archs), fixed_ms=0.5)
    device = own_device(fit, name="x", space=space, networks=N, runtime="", day=DAY)
    assert (device.runtime, device.fixed_ms) == ("not said", 0.5)
