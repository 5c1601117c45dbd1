"""Budgets in images per second and limits on energy, from the request to the files of a run and back."""

import json
from pathlib import Path

import pytest
from helpers.command_line import qnas as run_qnas
from helpers.energies import metered
from helpers.tiny import SOME, TINY_SPACE

import qnas
from qnas.api.limits import AskedLimits
from qnas.common.errors import InfeasibleBudgetError, QnasError, UsageError
from qnas.common.files import write_text
from qnas.latency.device_table import load_table
from qnas.latency.energy import energy_table
from qnas.runs.finished_run import read_finished_run
from qnas.spaces.space import SearchSpace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    write_text(folder / "tiny.yaml", TINY_SPACE)
    kinds = {"conv1x1": {"energy_mj": {"launch": 0.001, "mmacs": 0.05}}}
    write_text(folder / "bench.json", metered(power_w=2.0, kinds=kinds).to_json())
    write_text(folder / "full.json", metered("full", quantity="throughput", batch=64).to_json())
    return folder


@pytest.fixture(scope="module")
def limited(place: Path) -> qnas.SearchResult:
    """A search whose energy binds, on a device of one's own, beside a budget in images per second."""
    space, device = qnas.load_space(place / "tiny.yaml"), qnas.load_device(place / "bench.json")
    energies = energy_table(device, space, load_table(device, space))
    least = energies.fixed_mj + sum(map(min, energies.mj))
    most = energies.fixed_mj + sum(map(max, energies.mj))
    return qnas.run_search(
        space,
        {str(place / "bench.json"): "10ms", str(place / "full.json"): "100img/s"},
        out=place / "run",
        max_energy=f"{(least + most) / 2}mJ",
        threads=1,
        **SOME,
    )


def test_the_expected_and_the_derived_energy_are_within_the_limit(limited: qnas.SearchResult) -> None:
    device = qnas.load_device(limited.folder.parent / "bench.json")
    energies = energy_table(device, limited.space, load_table(device, limited.space))
    entry = next(e for e in limited.document["limits"] if e["unit"] == "mJ")
    indices = limited.arch.indices(limited.space)
    amount = energies.fixed_mj + sum(row[i] for row, i in zip(energies.mj, indices, strict=True))
    assert limited.energies_mj == {"bench": pytest.approx(amount)}
    assert entry["amount"] == pytest.approx(entry["fixed"] + sum(entry["positions"]))
    assert entry["least"] <= entry["amount"] <= entry["limit"] == entry["budget"] < entry["most"]
    assert qnas.predict(limited, device).energy_mj == pytest.approx(amount)


def test_a_run_reads_back_with_its_energies_and_rates(limited: qnas.SearchResult) -> None:
    limits = read_finished_run(limited.folder).limits
    assert [limit.name for limit in limits] == ["bench", "full", "energy-bench"]
    assert [limit.throughput for limit in limits] == [False, True, False]
    assert limits[1].budget == 10.0
    assert limits[1].describe(10.0) == "10.00 ms an image (100 img/s)"
    assert limits[2].describe(3.0) == "3.000 mJ on bench"
    assert json.loads((limited.folder / "config.json").read_text())["limits"][1]["budget"] == "100img/s"


def test_the_energy_shows_in_every_text(
    limited: qnas.SearchResult,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    page = (limited.folder / "report.html").read_text()
    assert "energy on bench" in page
    assert "--max-energy" in page
    for command in ("explain", "report"):
        assert run_qnas(command, str(limited.folder)) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run_qnas("predict", str(limited.folder), "--device", "bench.json") == 0
    assert " mJ " in capsys.readouterr().out
    assert run_qnas("predict", str(limited.folder), "--device", "full.json") == 0
    shown = capsys.readouterr().out
    assert " img/s)" in shown
    assert "full: the slowest layers, in ms an image at batch 64" in shown
    assert max(map(len, shown.splitlines())) <= 80
    budgets = ("--device", "bench.json", "--budget", "10ms", "--device", "full.json", "--budget", "200img/s")
    words = ("derive", str(limited.folder), *budgets, "--max-energy", "1J", "--out", "derived", "-q")
    assert run_qnas(*words) == 0, capsys.readouterr().err
    shown = " ".join(capsys.readouterr().out.split())
    assert "mJ of 1000 mJ on bench" in shown
    assert "of 5.000 ms an image (200 img/s) on full at 32 px, batch 64" in shown


@pytest.mark.parametrize("key", ["cells", "cells_digest", "fixed", "budget"])
def test_an_edited_energy_is_refused(key: str, limited: qnas.SearchResult) -> None:
    file = limited.folder / "arch.json"
    before = file.read_text()
    document = json.loads(before)
    (entry,) = (each for each in document["limits"] if each["unit"] == "mJ")
    if key == "cells":
        entry["cells"][0][0] += 1.0
    else:
        entry[key] = "0123456789abcdef" if key == "cells_digest" else entry[key] * 1.01
    try:
        file.write_text(json.dumps(document))
        with pytest.raises(QnasError):
            read_finished_run(limited.folder)
    finally:
        file.write_text(before)


def test_a_resumed_search_keeps_its_energy(limited: qnas.SearchResult) -> None:
    config = json.loads((limited.folder / "config.json").read_text())
    again = AskedLimits.of(None, former=config)
    assert again.entries(again.limits(limited.space, "device")) == config["limits"]


def test_a_rate_needs_a_device_of_throughput(place: Path) -> None:
    with pytest.raises(UsageError, match=r"budget '5000img/s': the figures of cortex-a76 are latencies"):
        AskedLimits.of({"cpu": "5000img/s"})
    asked = AskedLimits.of({str(place / "full.json"): "5000 img/s"})
    assert asked.label == "full-5000img-per-s"
    assert AskedLimits.of({str(place / "full.json"): "30ms"}).devices[0][1] == "30ms"


def test_an_energy_needs_a_device_that_states_it(place: Path, tiny_space: SearchSpace) -> None:
    with pytest.raises(
        UsageError, match=r"`max_energy=30mJ`: no energies are stated by cortex-a76: add power_w"
    ):
        AskedLimits.of({"cpu": "30ms"}, max_energy="30mJ")
    with pytest.raises(UsageError, match="`max_energy` '30': expected an energy with its unit"):
        AskedLimits.of({"cpu": "30ms"}, max_energy="30")
    with pytest.raises(
        InfeasibleBudgetError, match=r"no network takes at most 0\.001000 mJ on bench: the smallest"
    ):
        qnas.run_search(tiny_space, {str(place / "bench.json"): "30ms"}, max_energy="1uJ")
