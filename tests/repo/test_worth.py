"""benchmarks/worth.py: what is compared with a search, and what its figures say."""

import argparse
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.places import ROOT

import qnas
from qnas.data.image_data import ImageData
from qnas.data.loading import load_data
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import sample_arch
from qnas.training.recipe import Recipe

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import experiments as ex  # type: ignore[import-not-found]
import worth  # type: ignore[import-not-found]

Candidate = worth.Candidate


@pytest.fixture(scope="module")
def images() -> ImageData:
    data: ImageData = ex.load_images("digits", 160, resolution_px=worth.STORED_PX)
    return data


@pytest.fixture
def job(images: ImageData, tmp_path: Path) -> "worth.Job":
    question = worth.Question("digits", images.digest, 160, 4, 3)
    cell = worth.Cell("cpu", 0.35, 4.2, 0)
    rivals = {"public": None, "scaled": Candidate("mobilenet_v2:0.3", 0.3, 4.0)}
    return worth.Job(question, cell, worth.Data.of(images), rivals, tmp_path, tmp_path, math.inf)


# ---- what is compared


def test_the_best_candidate_is_the_one_of_highest_value_within_the_budget() -> None:
    slow, fast, best = Candidate("a", 0.7, 3.0), Candidate("b", 0.6, 1.0), Candidate("c", 0.65, 2.0)
    broken = Candidate("d", 0.9, problem="ExportError: no such operator")
    every = [slow, fast, best, broken]
    assert worth.best_within(every, 3.0) is slow  # a budget may be used up
    assert worth.best_within(every, 2.999) is best
    assert worth.best_within(every, 0.9) is None
    # a measurement counts more than a prediction, and of equal ones the faster is taken
    assert worth.best_within([replace(slow, measured_ms=0.5), fast], 1.0) == replace(slow, measured_ms=0.5)
    twin = replace(best, name="e", predicted_ms=1.5)
    assert worth.best_within([best, twin], 3.0) is twin


def test_budgets_are_shares_of_the_range_of_the_default_space() -> None:
    device, space = load_device("cpu"), worth.space_for(10)
    assert (space.input.resolution_px, space.head.classes) == (worth.PX, 10)
    table = compute_table(device, space)
    found = worth.budgets_of(device, space)
    assert list(found) == list(worth.SHARES)
    for share, budget_ms in found.items():
        got = (budget_ms - table.fastest_ms) / (table.slowest_ms - table.fastest_ms)
        assert got == pytest.approx(share, abs=1e-4)


def test_public_networks_are_the_front_of_qnas_rivals_with_their_imagenet_accuracy() -> None:
    found = worth.candidate_values()
    front = {rival.network.name: rival.network for rival in qnas.rivals(worth.FRONT).front}
    assert {name.removeprefix("timm:") for name in found["public"]} == front.keys()
    for name, value in found["public"].items():
        assert value == front[name.removeprefix("timm:")].imagenet_top1
    widths = [worth.build_other(name, 10) for name in list(found["scaled"])[:3]]
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in widths]
    assert sizes == sorted(set(sizes))


def test_without_timm_its_networks_have_the_error_for_a_price_and_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    device, kept = load_device("cpu"), ex.Cache(tmp_path / "worth.jsonl")
    found = worth.known_candidates("public", device, "cpu", 10, tmp_path, kept)
    assert found
    assert all(each.problem.startswith("ModuleNotFoundError") for each in found)
    assert worth.best_within(found, 1e9) is None
    assert not (tmp_path / "worth.jsonl").exists()


def test_a_process_is_sent_the_images_as_they_were_read(images: ImageData) -> None:
    data = worth.Data.of(images)
    again = load_data(data.given(whole=True), resolution_px=worth.STORED_PX, quiet=True)
    for name in ("train", "heldout", "test", "train_and_heldout"):
        ours, theirs = getattr(again, name), getattr(images, name)
        order = torch.arange(len(theirs))
        assert torch.equal(ours.labels, theirs.labels), name
        assert torch.equal(ours.read(order), theirs.read(order)), name
    assert again.classes == images.classes
    few = load_data(data.given(), resolution_px=worth.STORED_PX, quiet=True).test
    assert len(few) == math.ceil(len(images.test) / worth.TESTED)


def test_the_recipe_is_that_of_cifar_but_for_the_size_and_what_only_our_blocks_do() -> None:
    own, shipped = worth.recipe_of(7), Recipe.load("cifar-short")
    changed = {name for name in Recipe.model_fields if getattr(own, name) != getattr(shipped, name)}
    assert changed == {"epochs", "resolution_px", "start_resolution_px", "stochastic_depth"}
    assert own.stages == ((worth.PX, 7),)


def test_any_network_is_trained_as_by_train_subnet(images: ImageData, tmp_path: Path) -> None:
    data, space = worth.Data.of(images), worth.space_for(10)
    arch = sample_arch(space, np.random.default_rng(0))
    trained = qnas.train_subnet(
        (space, arch), data=data.given(), recipe=worth.recipe_of(1), out=tmp_path / "a", seed=3, threads=1
    )
    torch.manual_seed(3)
    network = build_subnet(space, arch, 10)
    worth.train_here(network, data, 1, 3)
    expected = trained.build().state_dict()
    for name, weights in network.state_dict().items():
        torch.testing.assert_close(weights, expected[name], msg=name)


def test_more_epochs_take_the_seconds_of_search_and_training() -> None:
    assert worth.epochs_within(300.0, 100.0, 6) == 18
    assert worth.epochs_within(100.0, 240.0, 6) == 2  # rounded from 2.5
    assert worth.epochs_within(1.0, 240.0, 6) == 1


# ---- a stopped run


def test_what_was_trained_is_not_trained_again(job: "worth.Job") -> None:
    kept = ex.Cache(job.out / "worth.jsonl")
    steps = [(arm, "steps") for arm in ("searched", "searched, from scratch", "random", "scaled")]
    seconds = [("random", "seconds"), ("scaled", "seconds")]
    assert worth.missing(job, kept) == steps + seconds  # there is no public network within this budget
    for arm, alike in steps:
        kept.put(job.parts(arm, alike), {"accuracy": 0.5})
    again = ex.Cache(job.out / "worth.jsonl")
    assert worth.missing(job, again) == seconds
    others = [
        replace(job, cell=replace(job.cell, seed=1)),
        replace(job, cell=replace(job.cell, budget_ms=4.3)),
        replace(job, question=replace(job.question, epochs=5)),
    ]
    assert all(worth.missing(other, again) == steps + seconds for other in others)
    wider = replace(job, rivals=job.rivals | {"scaled": Candidate("mobilenet_v2:0.4", 0.4, 4.1)})
    assert worth.missing(wider, again) == [("scaled", "steps"), *seconds]


def test_nothing_new_is_started_after_the_deadline(job: "worth.Job") -> None:
    worth.train_all(replace(job, deadline=0.0))
    assert not (job.out / "worth.jsonl").exists()


# ---- what it took


def test_processor_seconds_are_also_those_of_processes_that_were_started() -> None:
    busy = "import time\nwhile time.process_time() < 0.4: pass"
    _, spent = worth.spending(lambda: subprocess.run([sys.executable, "-c", busy], check=True))
    assert spent.core_s >= 0.35


def write_counter(folder: Path, name: str, count: int, most: int = 10**9) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{count}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")


def test_energy_is_the_sum_over_packages_and_counters_may_start_again(tmp_path: Path) -> None:
    write_counter(tmp_path, "intel-rapl:0", 999_000_000)
    write_counter(tmp_path, "intel-rapl:1", 5_000_000)
    write_counter(tmp_path, "intel-rapl:0:0", 1)  # the cores of the first, which it counts already
    before = worth.energy_uj(tmp_path)
    write_counter(tmp_path, "intel-rapl:0", 2_600_000)  # 1 J up to the range, then 2.6 J
    write_counter(tmp_path, "intel-rapl:1", 5_400_000)
    write_counter(tmp_path, "intel-rapl:0:0", 900_000_000)
    assert worth.watt_hours(before, worth.energy_uj(tmp_path)) == pytest.approx(4.0 / 3600)


def test_energy_that_is_not_readable_is_unknown_and_not_zero(tmp_path: Path) -> None:
    assert worth.watt_hours(worth.energy_uj(tmp_path), worth.energy_uj(tmp_path)) is None
    write_counter(tmp_path, "intel-rapl:0", 5)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert worth.energy_uj(tmp_path) == {}


# ---- what the figures say


def row(arm: str, share: float, steps: tuple[float, ...], seconds: tuple[float, ...] = ()) -> "worth.Row":
    found = {"steps": steps, "seconds": seconds}
    times = tuple(1.0 for _ in steps)
    spent = {"steps": times, "seconds": ()}
    search = (360.0,) * len(steps) if arm == "searched" else ()
    return worth.Row("cpu", share, 2.0, arm, (), found, times, times, search, spent, ())


def test_gains_are_over_budgets_and_of_the_searched_network() -> None:
    rows = [
        row("searched", 0.2, (0.50, 0.54)),
        row("searched", 0.5, (0.60, 0.62)),
        row("random", 0.2, (0.50, 0.50), (0.53, 0.53)),
        row("random", 0.5, (0.62, 0.64), (0.66, 0.68)),
    ]
    steps = worth.compare(rows, "random", "steps")
    assert steps.gains == pytest.approx((0.02, -0.02))
    assert steps.word == "neither"
    seconds = worth.compare(rows, "random", "seconds")
    assert seconds.gains == pytest.approx((-0.01, -0.06))
    assert seconds.word == "loses"
    assert str(seconds) == "-3.5 points (0 of 2 budgets)"
    assert worth.compare(rows, "public", "steps") is None


def test_the_last_sentence_says_where_a_search_wins_and_where_it_loses() -> None:
    rows = [
        row("searched", 0.2, (0.50,)),
        row("public", 0.2, (0.40,), (0.45,)),
        row("scaled", 0.2, (0.45,), (0.55,)),
    ]
    said = worth.verdict(rows)
    wins, loses = said.index("a search is more accurate than"), said.index("it loses to")
    for name in ("public network at the same steps", "public network at the same seconds"):
        assert wins < said.index(f"the {name}") < loses
    assert loses < said.index("the scaled network at the same seconds")
    assert "-5.0 points (0 of 1 budgets) against the scaled network at the same seconds" in said
    assert "0.100 core-hours" in said
    assert "no spread is known" in said
    assert "not enough" in worth.verdict([row("searched", 0.2, (0.5,)), row("public", 0.2, ())])


def test_the_command_of_a_run_names_all_that_its_figures_depend_on_but_no_folder() -> None:
    options = argparse.Namespace(
        data="cifar10:/a/b", seeds=[0, 1], devices=["own"], images=9, epochs=2, search_epochs=3, minutes=5.0
    )
    assert worth.command_line(options) == (
        "`python benchmarks/worth.py --data cifar10:DIR --seeds 0 1 --devices own --images 9 --epochs 2 "
        "--search-epochs 3 --write`"
    )
    assert "--data digits --seeds" in worth.command_line(
        argparse.Namespace(**vars(options) | {"data": "digits"})
    )


def test_a_row_says_what_there_is_not() -> None:
    cells = worth.cells_of(row("public", 0.2, ()))
    assert cells[2] == "none within the budget"
    assert worth.cells_of(row("random", 0.2, ()))[2] == "not trained yet"
    own = worth.cells_of(row("searched", 0.2, (0.5, 0.52)))
    assert own[2:] == ["51.0 ± 1.4%", "", "1.000", "1.000", "0.100", "0.000", "not readable"]
    assert len(cells) == len(own)


@pytest.mark.slow
def test_a_whole_run_says_all_and_does_nothing_twice(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "worth.py"), "--data", "digits", "--devices", "cpu"]
    command += ["--images", "300", "--epochs", "1", "--search-epochs", "1"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]

    def run() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    printed = run()
    lines = (tmp_path / "worth.jsonl").read_bytes()
    for arm in ("searched", "searched, from scratch", "random"):
        assert printed.count(f"\n| {arm} | ") == len(worth.SHARES), arm
    assert printed.count("\n| scaled (mobilenet_v2:") == len(worth.SHARES)
    assert "**For a user:** at equal latency" in printed
    assert "Latencies were measured together" in printed
    again = run()
    assert again.startswith("## What a search is worth: digits")
    assert printed.endswith(again)
    assert (tmp_path / "worth.jsonl").read_bytes() == lines
