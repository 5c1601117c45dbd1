"""The experiments of benchmarks/: their shared code, and that they run."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.places import ROOT

from qnas.data.image_data import ImageData
from qnas.latency.device import load_device
from qnas.latency.device_table import compute_table
from qnas.latency.kernels import Kernel
from qnas.spaces.arch import arch_from_indices, sample_arch
from qnas.spaces.lower import lower
from qnas.spaces.space import SearchSpace, load_space

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import a100_published  # type: ignore[import-not-found]
import depthwise_forms  # type: ignore[import-not-found]
import exact_layouts  # type: ignore[import-not-found]
import exact_solve  # type: ignore[import-not-found]
import experiments as ex  # type: ignore[import-not-found]
import kind_ranks  # type: ignore[import-not-found]
import measured_share  # type: ignore[import-not-found]
import relinear  # type: ignore[import-not-found]
import search_quality  # type: ignore[import-not-found]


@pytest.fixture
def digits() -> ImageData:
    data: ImageData = ex.load_images("digits", 500, resolution_px=8)
    return data


# ---- figures


def tau_by_pairs(x: list[float], y: list[float]) -> float:
    """Kendall's tau-b by its definition: (C - D) / sqrt((C + D + ties of x) (C + D + ties of y))."""
    agree = disagree = x_alone = y_alone = 0
    for i, j in combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        agree += a * b > 0
        disagree += a * b < 0
        x_alone += a == 0 and b != 0
        y_alone += b == 0 and a != 0
    both = agree + disagree
    return float((agree - disagree) / math.sqrt((both + x_alone) * (both + y_alone)))


def test_tau_counts_pairs_and_leaves_ties_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.integers(0, 6, 12).astype(float).tolist(), rng.integers(0, 6, 12).astype(float).tolist()
        found = ex.rank_interval(x, y, draws=50)
        assert found.value == pytest.approx(tau_by_pairs(x, y))
        assert found.low <= found.value <= found.high


def test_equal_orders_have_tau_one_and_a_reversed_one_minus_one() -> None:
    figures = list(np.random.default_rng(0).random(12))
    same = ex.rank_interval(figures, [v**3 for v in figures], draws=50)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    assert ex.rank_interval(figures, [-v for v in figures], draws=50).value == pytest.approx(-1)


def test_pairs_of_one_kind_and_of_different_kinds_are_all_pairs() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, 12).astype(float).tolist(), rng.integers(0, 6, 12).astype(float).tolist()
    assert kind_ranks.pair_tau(x, y, ["a"] * 12, same=True) == pytest.approx(tau_by_pairs(x, y))
    assert kind_ranks.pair_tau(x, y, ["a"] * 12, same=False) is None
    apart = [str(i) for i in range(12)]
    assert kind_ranks.pair_tau(x, y, apart, same=False) == pytest.approx(tau_by_pairs(x, y))


def test_a_bias_for_a_kind_turns_pairs_of_different_kinds_alone() -> None:
    alone, kinds = [0.60, 0.62, 0.64, 0.61, 0.63, 0.65], ["a", "a", "a", "b", "b", "b"]
    supernet = [0.50, 0.52, 0.54, 0.41, 0.43, 0.45]  # 10 points less for kind a, 20 for kind b
    assert kind_ranks.pair_tau(supernet, alone, kinds, same=True) == 1
    # of the nine pairs of an a and a b, the b is truly better in six
    assert kind_ranks.pair_tau(supernet, alone, kinds, same=False) == pytest.approx((3 - 6) / 9)
    assert kind_ranks.kind_bias(supernet, alone, kinds) == pytest.approx(math.sqrt(2) * 0.05)
    assert kind_ranks.kind_bias([value - 0.2 for value in alone], alone, kinds) == pytest.approx(0, abs=1e-12)
    assert kind_ranks.kind_bias(supernet, alone, ["a"] * 6) is None


def test_networks_of_a_kind_have_no_other_and_use_a_budget_that_all_can() -> None:
    space = ex.tiny_space("union-tiny")
    table = compute_table(load_device("cpu"), space)
    budget_ms = kind_ranks.common_budget_ms(space, table)
    found = kind_ranks.networks_by_kind(space, table, budget_ms, 3)
    assert len(found) == 5
    for name, archs in found.items():
        assert len({json.dumps(ex.blocks_of(space, arch)) for arch in archs}) == 3
        for arch in archs:
            assert {block.kind for block in lower(space, arch) if block.block and block.layers} == {name}
            assert 0.6 * budget_ms <= table.latency_ms(arch.indices(space)) <= budget_ms


def test_the_interval_holds_the_true_tau_about_as_often_as_it_says() -> None:
    correlation = 0.6
    true_tau = 2 / math.pi * math.asin(correlation)  # of a bivariate normal distribution
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(40):
        x, noise = rng.standard_normal((2, 24))
        y = correlation * x + math.sqrt(1 - correlation**2) * noise
        found = ex.rank_interval(x, y, draws=100)
        held += found.low <= true_tau <= found.high
    # percentile intervals of 24 are somewhat short, and 40 trials vary by 3.4%
    assert 32 <= held <= 40
    assert found.high - found.low > 0.2


def test_the_better_half_is_not_below_the_rest() -> None:
    figures = [0.3, 0.9, 0.1, 0.5, 0.7]
    kept = ex.upper_half(figures)
    assert list(kept) == [1, 3, 4]
    assert len(ex.upper_half(figures[:4])) == 2


def test_the_spread_is_that_of_a_sample() -> None:
    assert ex.mean_and_sd([1.0, 3.0]) == pytest.approx((2.0, math.sqrt(2)))
    assert math.isnan(ex.mean_and_sd([1.0])[1])
    assert ex.percent(0.8731, 0.0042) == "87.3 ± 0.4%"
    assert ex.percent(0.8731) == "87.3%"


def test_planned_epochs_take_the_seconds_that_there_are() -> None:
    warm_up, search = ex.plan_epochs(2.0, 3.0, 120.0, 0.4)
    assert 2 * warm_up + 3 * search == pytest.approx(120, abs=1.5)
    assert warm_up / (warm_up + search) == pytest.approx(0.4, abs=0.02)
    assert ex.plan_epochs(50.0, 50.0, 1.0, 0.4) == (1, 1)


# ---- what was done already


def test_a_result_is_found_again_by_equal_parts_only(tmp_path: Path) -> None:
    cache = ex.Cache(tmp_path / "results" / "rows.jsonl")
    cache.put({"a": 1, "b": [2]}, {"accuracy": 0.5})
    again = ex.Cache(tmp_path / "results" / "rows.jsonl")
    assert again.get({"b": [2], "a": 1})["accuracy"] == 0.5
    assert again.get({"a": 1, "b": [3]}) is None


def test_half_a_line_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    cache = ex.Cache(path)
    for i in range(3):
        cache.put({"i": i}, {"value": i})
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    cache = ex.Cache(path)
    assert [cache.get({"i": i}) is not None for i in range(3)] == [True, True, False]
    cache.put({"i": 2}, {"value": 2})
    again = ex.Cache(path)
    assert [again.get({"i": i})["value"] for i in range(3)] == [0, 1, 2]


def test_all_that_a_training_depends_on_is_in_its_key(tiny_space: SearchSpace, digits: ImageData) -> None:
    recipe, other = ex.Recipe(), tiny_space.with_norm("batchnorm")
    arch = arch_from_indices(tiny_space, (0, 1, 0, 1))
    parts = ex.training_parts(tiny_space, arch, digits, recipe, 0)
    others = [
        ex.training_parts(other, arch, digits, recipe, 0),
        ex.training_parts(tiny_space, arch_from_indices(tiny_space, (0, 2, 0, 1)), digits, recipe, 0),
        ex.training_parts(tiny_space, arch, replace(digits, digest="another"), recipe, 0),
        ex.training_parts(tiny_space, arch, digits, recipe, 1),
        *(
            ex.training_parts(tiny_space, arch, digits, replace(recipe, **{name: value + 1}), 0)
            for name, value in vars(recipe).items()
        ),
    ]
    keys = {ex.cache_key(p) for p in (parts, *others)}
    assert len(keys) == 1 + len(others)


def test_networks_have_the_same_blocks_where_they_are_the_same_network(tiny_space: SearchSpace) -> None:
    layers_of: dict[str, set[object]] = {}
    for indices in product(*(range(len(p.candidates)) for p in tiny_space.positions)):
        arch = arch_from_indices(tiny_space, indices)
        layers = tuple(block.layers for block in lower(tiny_space, arch) if block.layers)
        layers_of.setdefault(json.dumps(ex.blocks_of(tiny_space, arch)), set()).add(layers)
    assert all(len(found) == 1 for found in layers_of.values())
    assert len(set.union(*layers_of.values())) == len(layers_of)


# ---- data and networks


def test_a_part_of_the_data_has_all_classes_alike(digits: ImageData) -> None:
    split = digits.train_and_heldout
    kept = ex.stratified(split, 103)
    counts = torch.bincount(kept.labels).tolist()
    assert sum(counts) == 103
    assert max(counts) - min(counts) <= 1
    # the images are the split's, with their own labels, none of them twice
    known, picked = (
        {
            (image.numpy().tobytes(), int(y))
            for image, y in zip(part.read(torch.arange(len(part))), part.labels, strict=True)
        }
        for part in (split, kept)
    )
    assert picked <= known
    assert len(picked) == 103


def test_kept_images_are_trained_or_held_out_and_all_of_them_train_alone(digits: ImageData) -> None:
    assert (len(digits.train), len(digits.heldout)) == (400, 100)
    both = torch.cat([digits.train.labels, digits.heldout.labels])
    assert torch.equal(digits.train_and_heldout.labels, both)
    first = digits.train_and_heldout.read(torch.arange(400))
    assert torch.equal(first, digits.train.read(torch.arange(400)))


def test_networks_are_spread_over_latencies_and_rivals_have_one() -> None:
    space = ex.tiny_space("quadranet-tiny")
    table = compute_table(load_device("cpu"), space)
    spread = [table.latency_ms(arch.indices(space)) for arch in ex.spread_networks(space, table, 12, 0)]
    gaps = np.diff(spread)
    window = 0.9 * (table.slowest_ms - table.fastest_ms) / 12
    assert all(0 < gap < 2 * window for gap in gaps)
    budget_ms = ex.middle_ms(table)
    rivals = [ex.rivals(space, table, budget_ms, seed) for seed in (0, 1)]
    blocks = [json.dumps(ex.blocks_of(space, arch)) for found in rivals for arch in found]
    for arch in rivals[0]:
        assert 0.97 * budget_ms <= table.latency_ms(arch.indices(space)) <= budget_ms
    assert len(set(blocks[:10])) == 10
    assert blocks[:10] != blocks[10:]
    assert [json.dumps(ex.blocks_of(space, a)) for a in ex.rivals(space, table, budget_ms, 0)] == blocks[:10]


def test_the_spaces_of_the_experiments_have_one_layout() -> None:
    spaces = [load_space(path) for path in sorted((ROOT / "benchmarks" / "spaces").glob("*.yaml"))]
    assert {space.name for space in spaces} == {"quadranet-tiny", "proxyless-tiny", "union-tiny"}
    layouts = {
        (space.input.resolution_px, space.stem.stride, *((s.channels, s.stride) for s in space.stages))
        for space in spaces
    }
    assert len(layouts) == 1


def test_a_network_is_trained_once(tiny_space: SearchSpace, digits: ImageData, tmp_path: Path) -> None:
    recipe = ex.Recipe(images=500, epochs=1)
    arch = sample_arch(tiny_space, np.random.default_rng(0))
    row = ex.train_alone(tiny_space, arch, digits, recipe, 0, ex.Cache(tmp_path / "rows.jsonl"))
    assert 0 <= row["accuracy"] <= 1
    assert ex.train_alone(tiny_space, arch, digits, recipe, 0, ex.Cache(tmp_path / "rows.jsonl")) == row
    fresh = ex.train_alone(tiny_space, arch, digits, recipe, 0, ex.Cache(tmp_path / "others.jsonl"))
    assert fresh["accuracy"] == row["accuracy"]  # by its parts alone
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


# ---- tables


def test_a_table_has_a_cell_for_each_heading() -> None:
    lines = ex.markdown_table(["network", "accuracy"], [["a", "90%"], ["b", "91%"]]).splitlines()
    assert lines == ["| network | accuracy |", "| :-- | --: |", "| a | 90% |", "| b | 91% |"]
    with pytest.raises(AssertionError, match="another length"):
        ex.markdown_table(["network", "accuracy"], [["a"]])


def test_a_section_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n")
    ex.write_section(path, "ranks", "first\n")
    ex.write_section(path, "quality", "second")
    before = path.read_text()
    ex.write_section(path, "ranks", "third")
    assert path.read_text() == before.replace("first", "third")
    assert before.startswith("# Results\n")
    assert before.index("first") < before.index("second")


# ---- the experiments


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--data", "digits", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_a_seed_or_a_network_does_alike_is_no_noise() -> None:
    networks, seeds = np.array([[0.5], [0.6], [0.8], [0.7]]), np.array([0.0, 0.1, -0.2])
    assert search_quality.interaction_sd(networks + seeds) == pytest.approx(0.0, abs=1e-12)
    rng = np.random.default_rng(0)
    noisy = [
        search_quality.interaction_sd(networks + seeds + rng.normal(0, 0.01, (4, 3))) for _ in range(200)
    ]
    assert math.sqrt(np.mean(np.square(noisy))) == pytest.approx(0.01, rel=0.1)


def test_searches_are_compared_with_the_random_networks() -> None:
    def row(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "latency_ms": 2.0, "macs": 3e6, "params": 5e3}

    random = [row(0.5 + 0.01 * i) for i in range(10)]  # their median is their mean
    data = {"kinds": {"random": random, "shared": [row(0.555), row(0.605)]}}
    assert search_quality.describe_kind("shared", data) == [
        *["shared", "2", "58.0 ± 3.5%", "+3.5 ± 3.5", "8.0 of 10", "2.00", "3.00", "5"]
    ]
    mean, median, best = search_quality.describe_random(data)
    assert mean[:3] == ["10 random, mean", "", "54.5 ± 3.0%"]
    assert median == ["10 random, median", "", "54.5%", "+0.0", "", "", "", ""]
    assert best[:4] == ["10 random, best", "", "59.0%", "+4.5"]
    off = [row(0.1), *random[1:]]
    assert search_quality.describe_random(data | {"kinds": {"random": off}})[1][2:4] == ["54.5%", "+4.0"]
    part = {"kinds": {"random": random[:9], "shared": [row(0.555)]}}  # not all trained yet
    assert not search_quality.describe_kind("shared", part)
    assert not search_quality.describe_random(part)


def test_it_is_said_how_far_networks_differ_beyond_their_trainings() -> None:
    random = [{"accuracy": accuracy} for accuracy in (0.4, *[0.58, 0.62] * 4, 0.6)]
    alike = {"kinds": {"random": random}, "repeated": [[0.5, 0.6, 0.4], [0.7, 0.8, 0.6]]}
    said = search_quality.describe_noise(alike)  # deviations of ten and of nine: 6.6 and 2.0 points
    assert "seeds differ by 0.0 points" in said
    assert "differ by 6.6 points, of which about 6.6 come from the networks themselves" in said
    assert "Without the least accurate network they differ by 2.0 points." in said
    apart = alike | {"repeated": [[0.5, 0.6, 0.4], [0.6, 0.5, 0.7]]}  # sum of squares 0.04, two degrees
    assert "differ by 14.1 points" in search_quality.describe_noise(apart)
    assert "of which about 0.0 come from the networks themselves" in search_quality.describe_noise(apart)
    assert "not known" in search_quality.describe_noise(alike | {"repeated": [[0.5, 0.6, 0.4]]})


def test_a_supernet_is_said_to_know_an_order_or_not() -> None:
    data = {"alone": [0.60, 0.62, 0.61, 0.65], "params": [200, 100, 300, 4000]}
    right = {"seen": [0.1, 0.3, 0.2, 0.4], "explained": 0.5}
    wrong = {"seen": [0.4, 0.2, 0.3, 0.1], "explained": 0.6}
    describe = search_quality.describe_known
    assert describe("shared", [right], data) == ["shared", "1", "12.9", "1.00", "0.67", "0.50"]
    # sums of ranks of the second: 6, 3, 6, 5, whose tau-b is -3 of the root of 5 * 6
    both = describe("shared", [right, wrong], data)
    assert both == ["shared", "2", "12.9", "0.00 ± 1.41", "0.06 ± 0.86", "0.55"]


@pytest.mark.slow
def test_both_experiments_run_and_do_nothing_twice(tmp_path: Path) -> None:
    small = ("--images", 200, "--epochs", 1, "--seconds", 1, "--out", tmp_path)
    ranks = ("rank_correlation.py", *small, "--networks", 4, "--arms", "shared")
    printed = run_script(*ranks)
    assert "supernet, shared, by accuracy" in printed
    assert "another seed" in printed
    quality = ("search_quality.py", *small, "--seeds", 0, "--arms", "shared", "--parts", "random", "searches")
    printed += run_script(*quality)
    for row in ("10 random, mean", "10 random, best", "shared, re-ranked", "shared, by MACs"):
        assert re.search(rf"^\| {row} \| 1? ?\|", printed, re.MULTILINE), row
    done = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert run_script(*quality).startswith("## ")
    # the rivals are trained now: the ranks of networks of one latency follow, though no seed is complete
    assert "## " in run_script(*ranks)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == done
    # another budget has other networks, and its figures stand beside the first
    first = json.loads((tmp_path / "search_quality.json").read_text())
    printed = run_script("search_quality.py", *small, "--parts", "random", "--share", 0.5)
    assert "## Search quality at 0.5 of the range" in printed
    second = json.loads((tmp_path / "search_quality_0.5.json").read_text())
    assert json.loads((tmp_path / "search_quality.json").read_text()) == first
    quadra = search_quality.tiny_setting("quadranet-tiny")
    own = (quadra.limits[0].budget - quadra.table.fastest_ms) / search_quality.BUDGET_SHARE
    assert second["budget_ms"] == pytest.approx(quadra.table.fastest_ms + 0.5 * own)
    assert first["budget_ms"] == quadra.limits[0].budget
    slower = [row["latency_ms"] for row in second["data"][0]["kinds"]["random"]]
    assert min(slower) >= 0.97 * second["budget_ms"] > first["budget_ms"]


@pytest.mark.slow
def test_ways_of_weight_steps_are_compared_and_nothing_is_done_twice(tmp_path: Path) -> None:
    small = ("--images", 200, "--epochs", 1, "--seconds", 1, "--networks", 1, "--seeds", 0, 1)
    command = ("kind_ranks.py", *small, "--arms", "path", "fair sandwich", "--out", tmp_path)
    printed = run_script(*command)
    for arm in ("path", "fair sandwich"):
        assert re.search(rf"^\| {arm} \| 2 \|.*%", printed, re.MULTILINE), arm
    done = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert len(done) == 2
    assert run_script(*command).startswith("## ")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == done


def test_a_training_has_diverged_where_it_ends_as_a_guess_or_far_above_its_lowest() -> None:
    guess = math.log(10)
    assert not relinear.has_diverged([2.0, 1.5, 1.6], 10)
    assert relinear.has_diverged([1.9, 1.0, 1.51], 10)
    assert relinear.has_diverged([guess, guess, guess], 10)
    rows = [{"diverged": True, "accuracy": None}, {"diverged": False, "accuracy": 0.5}]
    assert relinear.describe_runs(rows) == ["1 of 2", "50.0%"]
    assert relinear.describe_runs(rows[:1]) == ["1 of 1", "-"]


@pytest.mark.slow
def test_the_stability_of_quadratic_weights_is_measured_once(tmp_path: Path) -> None:
    small = (
        "relinear.py",
        "--images",
        200,
        "--epochs",
        2,
        "--seeds",
        0,
        "--rates",
        1,
        100,
        "--out",
        tmp_path,
    )
    printed = run_script(*small)
    for form in relinear.FORMS:
        assert f"| {form} |" in printed
    done = (tmp_path / "relinear.jsonl").read_bytes()
    assert len(done.splitlines()) == 2 * len(relinear.FORMS)
    assert run_script(*small).startswith("## ")
    assert (tmp_path / "relinear.jsonl").read_bytes() == done


# ---- the exact solve beside other ways to choose


@pytest.mark.parametrize(("limits", "share", "seed"), [*product((1, 2, 3), (0.3, 0.6), (0, 1))])
def test_ways_to_choose_are_within_limits_and_at_most_as_good_as_the_best_of_all(
    limits: int, share: float, seed: int
) -> None:
    instance = exact_solve.draw_instance(5, 4, limits, share, seed)
    every = np.array(list(product(range(4), repeat=5)))
    within = every[[bool(instance.fits(network[None])[0]) for network in every]]
    best = float(instance.score(within).max())
    for network in within[:20]:  # by definition, not by the arrays of the script
        amounts = [sum(rows[i][c] for i, c in enumerate(network)) for rows in instance.amounts]
        assert all(amount <= most for amount, most in zip(amounts, instance.room, strict=True))
    scores = {}
    for name, method in exact_solve.METHODS.items():
        found = method(instance)
        assert found is not None, name
        if name != "argmax":
            assert instance.fits(np.array([found]))[0], name
            scores[name] = float(instance.score(np.array([found]))[0])
            assert scores[name] <= best + 1e-12, name
    assert scores["exact"] == pytest.approx(best)
    assert scores["HiGHS"] == pytest.approx(best)


def test_what_finds_nothing_is_no_violation() -> None:
    instance = exact_solve.draw_instance(5, 4, 1, 0.5, 0)
    hopeless = replace(instance, room=instance.amounts.min(2).sum(1) * 0.99)
    assert exact_solve.evolution(hopeless) is None
    assert exact_solve.greedy_repair(hopeless) is None
    assert exact_solve.penalised(hopeless) is None


@pytest.mark.parametrize("seed", [0, 1])
def test_ways_to_choose_a_layout_are_at_most_as_good_as_the_best_of_all(seed: int) -> None:
    for instance in exact_layouts.instances("quadranet-small", (24, 32), (0.5, 1), seed):
        assert len(instance.family) == 8
        found = {way: choose(instance.fresh()) for way, choose in exact_layouts.WAYS.items()}
        best = found["each by itself"]
        assert found["exact, 20 best"] == pytest.approx(best)
        for score, layout in found.values():
            assert score <= best[0] + 1e-9
            assert layout in instance.family
        assert found["one multiplier"][1].channels in ((32, 32, 64), (32, 64, 128))
        hopeless = replace(instance, budget_ms=1e-3)
        assert [choose(hopeless) for choose in list(exact_layouts.WAYS.values())[1:]] == [None] * 4


# ---- forms of depthwise convolutions


@pytest.mark.parametrize("kernel", [3, 7])
def test_forms_of_depthwise_convolutions_compute_the_same(kernel: int) -> None:
    outputs = {}
    for form in depthwise_forms.FORMS:
        torch.manual_seed(0)
        block = depthwise_forms.Block(6, 2, kernel, form).eval()
        with torch.no_grad():
            outputs[form] = block(torch.randn(1, 6, 9, 9, generator=torch.Generator().manual_seed(1)))
    for form in ("whole", "multiplier", "grouped", "doubled"):
        torch.testing.assert_close(outputs[form], outputs["separate"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs["linear"], outputs["separate"], atol=1e-2)


# ---- one image on an A100


def test_networks_that_stand_for_a_row_have_its_multiply_adds() -> None:
    found = list(a100_published.networks_of(load_space("quadranet-mobile"), 279))
    assert len(set(found)) == len(found) == a100_published.NETWORKS
    for operators in found:
        macs = sum(
            k.rows * k.kernel**2 * (1 if k.kind == "dwconv" else k.c_in) * k.c_out
            for k in operators
            if k.kind in ("conv", "dwconv", "linear")
        )
        assert macs == pytest.approx(279e6, rel=0.031)


def test_a_price_splits_off_what_is_estimated() -> None:
    device = load_device("a100")
    conv, norm = Kernel("conv", 14, 96, 192), Kernel("layernorm", 14, 96, 96)
    total, estimated = a100_published.price(device, (conv, norm, conv))
    assert estimated == pytest.approx(device.kernel_ms(norm))
    assert total == pytest.approx(estimated + 2 * device.kernel_ms(Kernel("conv1x1", 14, 96, 192)))


def test_the_measured_share_of_a_row_is_that_of_its_network_in_a_space_of_these_words() -> None:
    row = ("quadranet-mobile-bn", "batchnorm", "relu6", True)
    space = measured_share.space_of(*row)
    assert (space.norm, space.activation) == ("batchnorm", "relu6")
    words = {"", "gelu_layernorm", "scale"}
    assert {"_".join(name.split("_")[3:]) for name in space.positions[0].names} == words
    assert measured_share.space_of("union-mobile", "batchnorm", "relu6", False) == load_space("union-mobile")
    _, took, macs, blocks, share, estimates = measured_share.row_of(load_device("vpu"), 30.0, *row)
    assert 29.0 < float(took) <= 30.0
    assert macs.endswith("M")
    assert "quadra" in blocks
    left = sum(float(each.split()[-1].rstrip("%")) for each in estimates.split(", "))
    assert float(share.rstrip("%")) + left == pytest.approx(100, abs=0.3)
