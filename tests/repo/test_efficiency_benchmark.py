"""benchmarks/efficiency.py: its tasks, dense networks, factors and files of results."""

import argparse
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.places import ROOT

from qnas.latency.device import load_device
from qnas.nn.subnet import build_subnet

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import dense  # type: ignore[import-not-found]
import efficiency  # type: ignore[import-not-found]
import experiments as ex  # type: ignore[import-not-found]
import synthetic  # type: ignore[import-not-found]

CLASSES = ("xor", "circles", "spirals")


def drawn(name: str, count: int, seed: int = 0) -> Any:
    return synthetic.TASKS[name].draw(np.random.default_rng(seed), count)


# ---- tasks


@pytest.mark.parametrize("name", synthetic.TASKS)
def test_a_task_is_drawn_from_its_seed_alone_and_is_standardised(name: str) -> None:
    task = synthetic.TASKS[name]
    points, wanted = drawn(name, 20_000)
    again = drawn(name, 20_000)
    assert np.array_equal(points, again[0])
    assert np.array_equal(wanted, again[1])
    assert not np.array_equal(points, drawn(name, 20_000, seed=1)[0])
    assert points.shape == (20_000, task.variables)
    assert points.mean(0) == pytest.approx(0, abs=0.05)
    assert points.var(0) == pytest.approx(1, abs=0.1)
    if task.is_regression:
        assert wanted.mean() == pytest.approx(0, abs=0.05)
        assert wanted.var() == pytest.approx(1, abs=0.1)
    else:
        assert np.bincount(wanted).tolist() == [10_000, 10_000]


def test_classes_are_those_of_their_definitions() -> None:
    points, labels = drawn("xor", 500)
    assert np.array_equal(labels == 1, points[:, 0] * points[:, 1] > 0)
    points, labels = drawn("circles", 500)
    area = (points**2).sum(1) / synthetic.DISC**2  # uniform in [0, 1], four rings of a quarter each
    assert np.array_equal(np.floor(4 * area) % 2, labels)
    assert np.bincount(np.floor(4 * area).astype(int)).min() > 80
    points, labels = drawn("spirals", 500)
    radius, angle = np.hypot(*points.T), np.arctan2(points[:, 1], points[:, 0])
    along = 2 * np.pi * synthetic.TURNS * radius / synthetic.DISC
    turned = np.cos(angle - along)  # 1 on one spiral, -1 on the other
    outside = radius > 0.7  # where noise does not matter
    assert np.array_equal((turned < 0)[outside], (labels == 1)[outside])


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_a_polynomial_has_its_degree_and_nothing_in_common_with_lower_ones(degree: int) -> None:
    value = synthetic.polynomial(degree)
    rng = np.random.default_rng(0)
    start, step = rng.standard_normal((2, synthetic.VARIABLES))
    along = value(start + np.arange(degree + 2)[:, None] * 0.3 * step)
    scale = np.abs(along).max()
    assert np.diff(along, n=degree + 1) == pytest.approx(0, abs=1e-9 * scale)
    assert abs(np.diff(along, n=degree)).min() > 1e-3 * scale
    points = rng.uniform(-synthetic.SIDE, synthetic.SIDE, (20_000, synthetic.VARIABLES))
    for lower in range(degree):
        product = value(points) * (synthetic.polynomial(lower)(points) if lower else 1.0)
        assert abs(product.mean()) < 5 * product.std() / math.sqrt(len(points))


def test_a_radial_function_depends_on_the_distance_alone() -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((50, synthetic.RADIAL_VARIABLES))
    turn, _ = np.linalg.qr(rng.standard_normal((synthetic.RADIAL_VARIABLES,) * 2))
    assert synthetic.radial()(points @ turn) == pytest.approx(synthetic.radial()(points))
    assert np.abs(synthetic.radial()(2 * points) - synthetic.radial()(points)).max() > 0.1


# ---- dense networks


@pytest.mark.parametrize("arm", efficiency.DENSE_ARMS)
def test_parameters_and_macs_are_those_of_the_module(arm: str) -> None:
    network = dense.Dense(*efficiency.DENSE_ARMS[arm], variables=3, width=5, outputs=2)
    tensors = dict(dense.DenseEnsemble(network, [0, 1]).weights.items())
    costs = network.costs(load_device("cpu"))
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * costs["params"]
    macs = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("weight")) // 2
    assert macs == costs["macs"]
    assert costs["latency_ms"] > 0


def test_the_widest_network_is_within_its_parameters_and_no_wider_one_is() -> None:
    for neuron, params in (("linear", 100), ("fan", 100), ("star", 2500), ("fan", 1)):
        found = dense.widest(neuron, "gelu", 2, 2, params)
        assert found.params <= params or found.width == 1
        assert replace(found, width=found.width + 1).params > params


# W_k x + b_k of each registered role, and the formula by its definition
BY_HAND = {
    "linear": lambda x, m: m["conv_c"](x),
    "quadranet": lambda x, m: m["conv_a"](x) * m["conv_b"](x) + m["conv_c"](x),
    "fan": lambda x, m: m["conv_a"](x) * m["conv_b"](x) + m["conv_s"](x**2),
    "compact": lambda x, m: m["conv_c"](x) + m["conv_s"](x**2),
    "factored": lambda x, m: m["conv_a"](x) * m["conv_b"](x),
    "type2": lambda x, m: m["conv_s"](x**2),
    "type3": lambda x, m: m["conv_a"](x) ** 2,
    "type4": lambda x, m: m["conv_a"](x) * m["conv_b"](x),
}


@pytest.mark.parametrize("neuron", [*BY_HAND, dense.STAR])
def test_a_dense_network_computes_its_neurons_member_by_member(neuron: str) -> None:
    network = dense.Dense(neuron, "relu", variables=3, width=4, outputs=2)
    ensemble = dense.DenseEnsemble(network, [0, 1])
    inputs = np.random.default_rng(0).standard_normal((2, 6, 3))
    found = ensemble(torch.from_numpy(inputs).float()).detach().numpy()
    tensors = {name: tensor.detach().numpy() for name, tensor in ensemble.weights.items()}

    def matrix(member: int, role: str) -> Any:
        bias = tensors[f"{role}_bias"][member] if f"{role}_bias" in tensors else 0
        return lambda x: x @ tensors[f"{role}_weight"][member] + bias

    for member in range(2):
        x = inputs[member]
        for i in range(2):
            if neuron == dense.STAR:
                x = np.maximum(matrix(member, f"{i}_factor1")(x), 0) * matrix(member, f"{i}_factor2")(x)
                continue
            roles = {role: matrix(member, f"{i}_{role}") for role in dense.NEURONS[neuron].roles}
            x = np.maximum(BY_HAND[neuron](x, roles), 0)
        assert found[member] == pytest.approx(matrix(member, "out")(x), rel=1e-4, abs=1e-5)
    assert not np.allclose(tensors["out_weight"][0], tensors["out_weight"][1])


def test_constants_are_not_there_twice() -> None:
    assert dense.biased_roles("linear") == {"conv_c"}
    assert dense.biased_roles("compact") == {"conv_c"}  # one constant beside W_s x^2
    assert dense.biased_roles("fan") == {"conv_a", "conv_b", "conv_s"}
    assert dense.biased_roles("quadranet") == {"conv_a", "conv_b", "conv_c"}
    assert dense.biased_roles("type3") == {"conv_a"}


def test_a_training_depends_on_its_task_and_seed_whatever_runs_beside_it() -> None:
    recipe = dense.DenseRecipe(points=200, steps=20, batch_size=32)
    xor, spirals = synthetic.TASKS["xor"], synthetic.TASKS["spirals"]
    network = dense.widest("quadranet", "gelu", 2, 2, 60)
    together = dense.train_dense(network, recipe, [(xor, 0), (spirals, 0), (xor, 1)])
    alone = dense.train_dense(network, recipe, [(xor, 1)])
    assert together[2] == pytest.approx(alone[0], abs=2e-3)  # sums of another order
    assert len({*together}) == 3


def test_quadratic_networks_learn_what_is_quadratic() -> None:
    recipe = dense.DenseRecipe(points=500, steps=150, batch_size=64)
    network = dense.Dense("quadranet", "gelu", variables=2, width=4, outputs=2)
    (error,) = dense.train_dense(network, recipe, [(synthetic.TASKS["xor"], 0)])
    assert error < 0.1
    # a linear layer alone does no better than guessing
    (error,) = dense.train_dense(replace(network, depth=0, width=2), recipe, [(synthetic.TASKS["xor"], 0)])
    assert error > 0.4


def test_a_training_without_numbers_has_no_error() -> None:
    recipe = dense.DenseRecipe(points=50, steps=3, batch_size=8, learning_rate=math.inf)
    network = dense.Dense("linear", "gelu", variables=2, width=2, outputs=2)
    assert dense.train_dense(network, recipe, [(synthetic.TASKS["xor"], 0)]) == [None]


def test_errors_are_shares_of_wrong_classes_and_squares_by_the_variance() -> None:
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    assert dense.errors_of(outputs, torch.tensor([[0, 1, 1, 0]])).tolist() == [0.25]
    wanted = torch.tensor([[1.0, 3.0, 1.0, 3.0]])  # variance 1
    assert dense.errors_of(torch.full((1, 4, 1), 2.0), wanted).tolist() == [1.0]
    assert dense.errors_of(wanted[..., None] + 0.5, wanted).tolist() == [0.25]


# ---- image networks


@pytest.mark.parametrize("arm", efficiency.IMAGE_ARMS)
def test_an_image_network_has_the_blocks_of_its_arm_and_its_parameters(arm: str) -> None:
    space, arch = efficiency.image_network(arm, 4, 8, 1, 10, kernel=3)
    costs = efficiency.image_costs(space, arch, load_device("cpu"))
    network = build_subnet(space, arch, 10)
    assert costs["params"] == sum(weight.numel() for weight in network.parameters())
    wide = efficiency.image_costs(*efficiency.image_network(arm, 8, 8, 1, 10, kernel=3), load_device("cpu"))
    assert all(wide[axis] > costs[axis] for axis in efficiency.AXES)
    assert {c.block for p in space.positions for c in p.candidates} == {efficiency.IMAGE_ARMS[arm]["block"]}
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)


# ---- what the linear network needs


def array(*values: float) -> Any:
    return np.array(values, dtype=np.float64)


def test_sizes_are_read_off_a_curve_in_logarithms() -> None:
    sizes = array(1, 10, 100)
    found, bounds = efficiency.size_at(sizes, array(1, 0.1, 0.01), array(1, 10**-0.5, 0.1, 10**-1.5, 0.01))
    assert found == pytest.approx([1, 10**0.5, 10, 10**1.5, 100])
    assert bounds.tolist() == [0] * 5
    found, bounds = efficiency.size_at(sizes, array(1, 0.1, 0.01), array(2, 0.001))
    assert found == pytest.approx([1, 100])
    assert bounds.tolist() == [-1, 1]
    # a larger network that is worse is not taken, and of equal ones the smallest is
    found, bounds = efficiency.size_at(array(1, 10, 100, 1000), array(1, 0.1, 0.5, 0.1), array(0.1, 0.05))
    assert found == pytest.approx([10, 1000])
    assert bounds.tolist() == [0, 1]


def test_a_factor_is_how_far_two_curves_are_apart() -> None:
    sizes, errors = array(10, 100, 1000), array(0.3, 0.1, 0.02)
    for shift in (3, 1 / 3):
        found = efficiency.factor_between(sizes, errors, shift * sizes, errors)
        assert (found.low, found.high) == pytest.approx((shift, shift))
    # a linear network that never comes down to 0.3: its largest size is a lower bound
    never = efficiency.factor_between(sizes, errors, sizes, array(0.5, 0.5, 0.4))
    always = efficiency.factor_between(sizes, errors, sizes, array(0.01, 0.009, 0.008))
    # the error in the middle of the logarithms is reached between 100 and 1000
    middle = math.log(0.1 / (0.3 * 0.02) ** 0.5) / math.log(0.1 / 0.02)
    assert (never.low, never.high) == pytest.approx((1000 / 10 ** (2 + middle), math.inf))
    assert (always.low, always.high) == pytest.approx((0, 10 / 10 ** (2 + middle)))
    shown = [str(factor) for factor in (never, always, efficiency.Factor(12.3, 12.4))]
    assert shown == [">6.9", "<0.069", "12"]


def test_a_few_bounds_leave_a_median_with_two_ends() -> None:
    sizes, errors = array(10, 100, 1000), array(0.3, 0.1, 0.02)
    # the linear curve ends before the lowest errors, those of more than 744: 1.3 of 24 levels
    found = efficiency.factor_between(sizes, errors, 2 * sizes, array(0.3, 0.1, 0.024))
    assert 1.5 < found.low < found.high < 3


def curve(errors: Any, shift: float = 1.0) -> Any:
    sizes = shift * array(10, 100, 1000)
    return efficiency.Curve(dict.fromkeys(efficiency.AXES, sizes), errors)


def test_intervals_hold_the_factor_and_are_points_where_seeds_agree() -> None:
    errors = array(0.3, 0.1, 0.02)[:, None]
    same = efficiency.match(curve(errors.repeat(3, 1)), curve(errors.repeat(3, 1), 4), "macs")
    assert [same.factor.low, same.factor.high, same.low, same.high] == pytest.approx([4] * 4)
    assert same.verdict == "more"
    rng = np.random.default_rng(0)
    noisy = [curve(errors * np.exp(0.3 * rng.standard_normal((3, 5))), shift) for shift in (1, 4, 0.2)]
    wide = efficiency.match(noisy[0], noisy[1], "macs")
    assert wide.low < wide.factor.low <= wide.factor.high < wide.high
    assert wide.low < 4 < wide.high
    verdicts = [efficiency.match(noisy[0], other, "macs").verdict for other in noisy]
    assert verdicts == ["", "more", "less"]


def test_an_interval_decides_where_all_of_it_is_on_one_side() -> None:
    factor = efficiency.Factor(1.0, 1.0)
    verdicts = [efficiency.Match(factor, *ends).verdict for ends in ((2, math.inf), (0, 0.8), (0.5, 1.5))]
    assert verdicts == ["more", "less", ""]
    assert str(efficiency.Match(efficiency.Factor(2.5, math.inf), 2.0, math.inf)) == ">2.5 [2, ∞]"


def test_a_diverged_network_is_as_good_as_guessing() -> None:
    rows = [
        [{"params": 5, "macs": 4, "latency_ms": 0.1, "error": error} for error in errors]
        for errors in ((None, 0.25), (3.0, 0.125))
    ]
    assert efficiency.curve_of(rows, 1.0).errors.tolist() == [[1.0, 0.25], [1.0, 0.125]]


def test_the_sentence_says_what_the_intervals_say() -> None:
    def certain(factor: float) -> Any:
        return efficiency.Match(efficiency.Factor(factor, factor), factor, factor)

    undecided = efficiency.Match(efficiency.Factor(1.0, 1.0), 0.5, 2.0)
    matches = {
        "linear, ReLU": dict.fromkeys(efficiency.AXES, certain(5)),  # no quadratic neuron: not mentioned
        "fan": {"params": certain(2), "macs": certain(2), "latency_ms": certain(0.5)},
        "type2": {"params": undecided, "macs": certain(0.5), "latency_ms": certain(0.5)},
    }
    assert efficiency.meaning(matches, 5) == (
        "For a user who needs the same error here, parameters are saved by fan, undecided for type2; MACs "
        "are saved by fan, lost by type2; latency is saved by none, lost by fan and type2 (90% intervals "
        "over 5 seeds above or below 1)."
    )


def test_a_study_becomes_a_table_and_a_picture(tmp_path: Path) -> None:
    errors = array(0.3, 0.1, 0.02)[:, None].repeat(2, 1)
    curves = {"linear": curve(errors, 4), "fan": curve(errors)}
    study = efficiency.Study("spirals", "How.", "python x.py", curves, 0.5, False)
    lines = efficiency.describe(study).splitlines()
    assert lines[0] == "## Efficiency on spirals"
    # what both have: from 40 parameters to 1,000, and their geometric mean
    assert lines[4].startswith("| network | error, 40 parameters | error, 200 parameters | error, 1,000 ")
    linear, fan = (line.split(" | ") for line in lines[6:8])
    assert (linear[0], linear[1], linear[4:]) == ("| linear", "30.0%", ["1", "1", "1 |"])
    middle = 0.3 * (1 / 3) ** (math.log(5) / math.log(10))  # of the line from 40 to 400 parameters
    assert linear[2] == f"{100 * middle:.1f}%"
    assert (fan[0], fan[3], fan[4:]) == ("| fan", "2.0%", ["4 [4, 4]"] * 2 + ["4 [4, 4] |"])
    efficiency.draw(study, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# ---- what was done already


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"neurons": ["linear"], "seeds": [0, 1], "steps": 2} | changes))


def test_all_that_a_dense_training_depends_on_is_in_its_key() -> None:
    task, network, recipe = synthetic.TASKS["xor"], dense.Dense("fan", "gelu", 2, 3, 2), dense.DenseRecipe()

    def changed(value: Any) -> list[Any]:
        return [
            replace(value, **{f.name: other if isinstance(other := "relu", type(now)) else now + 1})
            for f in fields(value)
            for now in [getattr(value, f.name)]
        ]

    parts = [efficiency.dense_parts(task, network, recipe, seed) for seed in (0, 1)]
    parts += [efficiency.dense_parts(task, each, recipe, 0) for each in changed(network)]
    parts += [efficiency.dense_parts(task, network, each, 0) for each in changed(recipe)]
    others = [replace(task, name="another"), replace(task, draw=synthetic.draw_circles)]
    parts += [efficiency.dense_parts(each, network, recipe, 0) for each in others]
    assert len(parts) == 4 + len(asdict(network)) + len(asdict(recipe))
    assert len({ex.cache_key(part) for part in parts}) == len(parts)


def test_a_stopped_run_continues_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    path = tmp_path / "efficiency.jsonl"
    efficiency.train_missing(["xor", "circles"], options(), ex.Cache(path))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len(efficiency.DENSE_PARAMS[2]) * 2 * 2
    efficiency.train_missing(["xor", "circles"], options(), ex.Cache(path))
    assert path.read_bytes() == whole
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:9])  # stopped while it wrote
    efficiency.train_missing(["xor", "circles"], options(), ex.Cache(path))
    study = efficiency.dense_study("circles", options(), ex.Cache(path))
    assert study.curves["linear"].errors.shape == (len(efficiency.DENSE_PARAMS[2]), 2)
    assert study.command == (
        "python benchmarks/efficiency.py --task circles --steps 2 --seeds 0 1 --neurons linear --write"
    )
    with pytest.raises(AssertionError, match="not trained yet"):
        efficiency.dense_study("spirals", options(), ex.Cache(path))


@pytest.mark.slow
def test_points_and_images_are_compared_by_one_command_and_trained_once(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "efficiency.py")
    command = [sys.executable, script, "--task", "xor", "--task", "digits", "--neurons", "quadranet", "star"]
    command += [
        "--seeds",
        "0",
        "1",
        "--steps",
        "5",
        "--images",
        "200",
        "--epochs",
        "1",
        "--channels",
        "4",
        "8",
    ]

    def run() -> str:
        done = subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True, text=True)
        return done.stdout

    printed = run()
    for name in ("xor", "digits"):
        assert f"## Efficiency on {name}\n" in printed
    for arm in ("linear", "quadranet", "star"):
        assert printed.count(f"\n| {arm} | ") == 2
    done = (tmp_path / "efficiency.jsonl").read_bytes()
    assert len(done.splitlines()) == 3 * 2 * (len(efficiency.DENSE_PARAMS[2]) + 2)
    assert run().startswith("## ")
    assert (tmp_path / "efficiency.jsonl").read_bytes() == done
