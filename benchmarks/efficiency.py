"""Quadratic and conventional networks at equal parameters, multiply-adds and predicted latency.

    python benchmarks/efficiency.py --task spirals --task digits --task cifar10:DIR [--write]

A task is one of synthetic.py (`xor`, `circles`, `spirals`, `polynomial-2` to `-4`, `barron`, `radial`) or a
data set as in `qnas search --data`. Without --task, all synthetic ones and the digits run.

- Synthetic tasks train dense networks with two hidden layers (dense.py), of all kinds of neurons. A
  network is the widest of its kind within each of several numbers of parameters.
- Image tasks train convolutional networks of three stages (channels C, 2C and 4C) for several C: QuadraBlocks
  of all kinds of neurons, star blocks, and inverted residuals, linear and factored.

Everything else is alike: the recipe, and for each seed the points or images and their order. The conventional
network has linear neurons and the same activation, a GELU. Its counterpart with ReLU, and inverted residuals,
show how much other choices change.

Each table says what a linear network needs to match the others. Errors over sizes are curves: the mean over
seeds, and the lowest up to each size, straight lines between the logarithms. Of LEVELS errors, evenly spaced
in the logarithm between the highest and the lowest of a kind's curve, each has two sizes: what the kind
needs, and what the linear network needs. The median of their quotients is the factor. Where the linear curve
does not go down to an error, its largest size is a lower bound; where it begins below, its smallest is an
upper bound. A median that is a bound itself is marked `>` or `<`. Intervals are by bootstrap over seeds, the
same ones of both kinds, and take bounds as low and as high as they may be.
The errors in a table are at sizes that all kinds have.

Each training is a line of results/efficiency.jsonl, with all that it depends on; a stopped run continues.
--write writes a section of RESULTS.md for each task, a picture into docs/images, and its section of
docs/concepts/efficiency.md.
"""

import argparse
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from dense import STAR, Dense, DenseRecipe, train_dense, widest
from experiments import (
    OUT,
    RESULTS,
    TRAINED_PX,
    Cache,
    Recipe,
    load_images,
    markdown_table,
    train_alone,
    write_section,
)
from numpy.typing import NDArray
from synthetic import TASKS, Task

from qnas.common import host
from qnas.common.files import write_bytes
from qnas.latency.device import Device, load_device
from qnas.latency.device_table import compute_table
from qnas.spaces.arch import Arch, make_arch
from qnas.spaces.lower import count_macs, count_params, lower
from qnas.spaces.space import SearchSpace, make_space
from qnas.training.loop import set_up_process

DEVICE = "cpu"
LINEAR = "linear"
# what is trained on synthetic tasks: neuron and activation
DENSE_ARMS = {
    LINEAR: ("linear", "gelu"),
    "linear, ReLU": ("linear", "relu"),
    **{name: (name, "gelu") for name in ("quadranet", "fan", "compact", "factored")},
    **{name: (name, "gelu") for name in ("type2", "type3", "type4", STAR)},
}
# at most so many parameters, by outputs: two classes, or a number
DENSE_PARAMS = {2: (44, 100, 250, 600), 1: (150, 400, 1000, 2500)}
# what is trained on images: the candidate, besides its kernel
BATCH_NORM = ("star", "mbconv")  # blocks that need it, as in benchmarks/spaces; the others have layer norm
IMAGE_ARMS: dict[str, dict[str, Any]] = {
    LINEAR: {"block": "quadra", "expansion": 2, "neuron": "linear"},
    **{
        name: {"block": "quadra", "expansion": 2, "neuron": name}
        for name in ("quadranet", "fan", "compact", "factored", "type2", "type3", "type4")
    },
    STAR: {"block": "star", "expansion": 2},
    "inverted residual": {"block": "mbconv", "expansion": 3},
    "inverted residual, factored": {"block": "mbconv", "expansion": 3, "neuron": "factored"},
}
CONVENTIONAL = ("linear, ReLU", "inverted residual")  # beside `linear`, which the others are compared with
CHANNELS = (4, 6, 8, 12, 16)  # of the first stage
POSITIONS = (1, 2, 2)
IMAGES_PX = {"digits": 8}  # others: TRAINED_PX
AXES = {"params": "parameters", "macs": "MACs", "latency_ms": "ms"}
LEVELS = 25
DRAWS = 1000  # bootstrap samples
INTERVAL = 0.9
SHOWN_SIZES = 3  # columns of errors in a table

ROOT = Path(__file__).resolve().parents[1]
PICTURES, PAGE = ROOT / "docs" / "images", ROOT / "docs" / "concepts" / "efficiency.md"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The errors of one kind of network over sizes."""

    sizes: Mapping[str, Floats]  # by axis: (sizes,), increasing
    errors: Floats  # (sizes, seeds)

    @property
    def mean(self) -> Floats:
        """The mean error over seeds at each size."""
        return self.errors.mean(1)


@dataclass(frozen=True)
class Study:
    """The curves of a task by arm, and how they were measured."""

    name: str
    how: str
    command: str
    curves: Mapping[str, Curve]
    guess: float  # the error of guessing
    is_regression: bool


@dataclass(frozen=True)
class Factor:
    """How many times a size the linear network needs: between `low` and `high`, which are mostly the same."""

    low: float  # 0: there is only an upper bound
    high: float  # infinite: there is only a lower bound

    def __str__(self) -> str:
        if self.high == math.inf:
            return f">{shown_factor(self.low)}"
        return (
            f"<{shown_factor(self.high)}" if self.low == 0 else shown_factor(math.sqrt(self.low * self.high))
        )


@dataclass(frozen=True)
class Match:
    """A factor with its interval."""

    factor: Factor
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.factor} [{shown_factor(self.low)}, {shown_factor(self.high)}]"

    @property
    def verdict(self) -> str:
        """`more` where the linear network needs more, `less` where less, else empty."""
        return "more" if self.low > 1 else "less" if self.high < 1 else ""


def shown_factor(value: float) -> str:
    """Format a factor with two digits."""
    if value == math.inf:
        return "∞"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", action="append", help="a synthetic task, or data: digits, cifar10:DIR")
    parser.add_argument("--neurons", nargs="+", choices=[*dict.fromkeys([*DENSE_ARMS, *IMAGE_ARMS])])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=DenseRecipe.steps, help="of a dense network")
    parser.add_argument("--channels", nargs="+", type=int, default=list(CHANNELS), help="of an image network")
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--images", type=int, default=Recipe.images, help="to train on")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help="write RESULTS.md, pictures and their page")
    options = parser.parse_args()
    set_up_process(threads=1)
    known, names = Cache(options.out / "efficiency.jsonl"), options.task or [*TASKS, "digits"]
    train_missing([name for name in names if name in TASKS], options, known)
    for name in names:
        study = (dense_study if name in TASKS else image_study)(name, options, known)
        text = describe(study)
        print(text, flush=True)
        if options.write:
            picture = PICTURES / f"efficiency-{study.name}.png"
            draw(study, picture)
            write_section(RESULTS, f"efficiency {study.name}", text)
            sentence = text.rpartition("\n\n")[2]
            shown = f"## {title(study.name)}\n\n![Errors over sizes](../images/{picture.name})\n\n{sentence}"
            write_section(PAGE, f"efficiency {study.name}", shown)


def chosen(arms: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    """Return the arms to compare; the linear one is always there."""
    return [arm for arm in arms if options.neurons is None or arm in (LINEAR, *options.neurons)]


def command_line(task: str, options: argparse.Namespace, own: Sequence[str]) -> str:
    """Return the command of a study, with all options that its figures depend on."""
    words = ["python benchmarks/efficiency.py", "--task", task]
    for name in (*own, "seeds", *(["neurons"] if options.neurons else [])):
        value = getattr(options, name)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(f'"{word}"' if ", " in word else word for word in [*words, "--write"])


# ---- trainings


def dense_networks(arm: str, variables: int, outputs: int) -> list[Dense]:
    """Return the networks of an arm, from the smallest."""
    neuron, activation = DENSE_ARMS[arm]
    networks = [widest(neuron, activation, variables, outputs, params) for params in DENSE_PARAMS[outputs]]
    return [*dict.fromkeys(networks)]


def dense_parts(task: Task, network: Dense, recipe: DenseRecipe, seed: int) -> dict[str, Any]:
    """Return all on which a training depends."""
    return {
        "task": task.name,
        "points": task.digest,
        "network": asdict(network),
        "recipe": asdict(recipe),
        "seed": seed,
    }


def train_missing(names: Sequence[str], options: argparse.Namespace, known: Cache) -> None:
    """Train every dense network that is not known yet, on all tasks for which it has the shape at once."""
    recipe = DenseRecipe(steps=options.steps)
    for arm in chosen(DENSE_ARMS, options):
        for shape in dict.fromkeys((TASKS[name].variables, TASKS[name].outputs) for name in names):
            tasks = [TASKS[name] for name in names if (TASKS[name].variables, TASKS[name].outputs) == shape]
            for network in dense_networks(arm, *shape):
                members = [
                    (task, seed)
                    for task in tasks
                    for seed in options.seeds
                    if known.get(dense_parts(task, network, recipe, seed)) is None
                ]
                if not members:
                    continue
                start = time.process_time()
                errors = train_dense(network, recipe, members)
                spent = time.process_time() - start
                for (task, seed), error in zip(members, errors, strict=True):
                    found = {"error": error, "seconds": spent / len(members)}
                    known.put(dense_parts(task, network, recipe, seed), found)
                print(f"{arm}, {network.params} parameters: {len(members)} in {spent:.1f} s", flush=True)


def dense_study(name: str, options: argparse.Namespace, known: Cache) -> Study:
    """Return the study of a synthetic task whose networks are trained."""
    task, recipe, device = TASKS[name], DenseRecipe(steps=options.steps), load_device(DEVICE)
    curves = {}
    for arm in chosen(DENSE_ARMS, options):
        rows = []
        for network in dense_networks(arm, task.variables, task.outputs):
            trained = [known.get(dense_parts(task, network, recipe, seed)) for seed in options.seeds]
            assert None not in trained, f"{name}, {arm}: not trained yet"
            rows.append([network.costs(device) | row for row in trained if row])
        curves[arm] = curve_of(rows, task.guess)
    predicted = "mean squared error by variance" if task.is_regression else "share of wrong classes"
    how = (
        f"Dense networks with two hidden layers, {task.variables} inputs, {recipe.points} training points, "
        f"{recipe.steps} steps of {recipe.batch_size} points, Adam at {recipe.learning_rate:g} with a "
        f"cosine. Error: {predicted}, on {recipe.test_points:,} other points."
    )
    command = command_line(name, options, ("steps",))
    return Study(name, how, command, curves, task.guess, task.is_regression)


def curve_of(rows: Sequence[Sequence[Mapping[str, Any]]], guess: float) -> Curve:
    """Return the curve of rows by size and seed.

    A diverged network has the error of guessing, and so has one that is worse: nobody would use either.
    """
    sizes = {axis: np.array([own[0][axis] for own in rows], dtype=np.float64) for axis in AXES}
    errors = [[guess if row["error"] is None else min(row["error"], guess) for row in own] for own in rows]
    return Curve(sizes, np.array(errors))


def image_study(spec: str, options: argparse.Namespace, known: Cache) -> Study:
    """Train what is not known yet, and return the study of a data set."""
    name, _, folder = spec.partition(":")
    px, device = IMAGES_PX.get(name, TRAINED_PX), load_device(DEVICE)
    data = load_images(spec, options.images, resolution_px=px)
    recipe = Recipe(images=len(data.train_and_heldout), epochs=options.epochs)
    colours, classes, curves = len(data.train.mean), len(data.classes), {}
    for arm in chosen(IMAGE_ARMS, options):
        rows = []
        for channels in options.channels:
            space, arch = image_network(arm, channels, px, colours, classes, kernel=options.kernel)
            costs = image_costs(space, arch, device)
            trained = [train_alone(space, arch, data, recipe, seed, known) for seed in options.seeds]
            rows.append([{**costs, "error": 1 - row["accuracy"]} for row in trained])
        curves[arm] = curve_of(rows, 1 - 1 / classes)
    how = (
        f"Convolutional networks of three stages at {px} px, kernels of {options.kernel}, {recipe.images} "
        f"training images, {recipe.epochs} epochs of batches of {recipe.batch_size}, AdamW at "
        f"{recipe.learning_rate:g} with a cosine. Error: share of wrong classes, on "
        f"{len(data.test):,} test images."
    )
    own = ("images", "epochs", "channels", "kernel")
    command = command_line(f"{name}:DIR" if folder else name, options, own)
    return Study(name, how, command, curves, 1 - 1 / classes, is_regression=False)


def image_network(
    arm: str, channels: int, px: int, colours: int, classes: int, *, kernel: int
) -> tuple[SearchSpace, Arch]:
    """Return the only network of a space: all blocks are those of the arm."""
    candidate = IMAGE_ARMS[arm] | {"kernel": kernel}
    has_batch_norm = candidate["block"] in BATCH_NORM
    space = make_space(
        f"efficiency-{channels}",
        input={"channels": colours, "resolution_px": px},
        norm="batchnorm" if has_batch_norm else "layernorm",
        activation="relu6" if has_batch_norm else "gelu",
        stem={"channels": channels, "kernel": 3, "stride": 2 if px > 8 else 1, "activation": has_batch_norm},
        candidates=[candidate],
        stages=[
            {"channels": channels * 2**i, "positions": count, "stride": 1 if i == 0 else 2}
            for i, count in enumerate(POSITIONS)
        ],
        head={"classes": classes},
    )
    return space, make_arch(space, tuple(position.names[0] for position in space.positions))


def image_costs(space: SearchSpace, arch: Arch, device: Device) -> dict[str, float]:
    """Return the parameters, the multiply-adds and the predicted latency for one image."""
    blocks = lower(space, arch)
    latency_ms = compute_table(device, space).latency_ms(arch.indices(space))
    return {"params": count_params(blocks), "macs": count_macs(blocks), "latency_ms": latency_ms}


# ---- what the linear network needs


def size_at(sizes: Floats, errors: Floats, levels: Floats) -> tuple[Floats, Floats]:
    """Return the size at which a curve comes down to each level, and whether that is a bound.

    `sizes` increase; the curve is the lowest error up to each, straight in the logarithms. The bound is 1
    where even the largest size has more than the level, so that its size is a lower bound, and -1 where the
    smallest has less, so that it is an upper bound.
    """
    x, y = np.log(sizes), np.log(np.minimum.accumulate(errors))
    # of equal errors the smallest size is what is needed
    first = np.concatenate([[True], np.diff(y) < 0])
    x, y, wanted = x[first], y[first], np.log(levels)
    # compared with a tolerance: a level may be one of the errors, up to rounding
    bounds = np.where(wanted < y[-1] - 1e-9, 1, np.where(wanted > y[0] + 1e-9, -1, 0))
    found = np.exp(np.interp(-wanted, -y, x))
    return np.where(bounds == 1, sizes[-1], found), bounds


def factor_between(sizes: Floats, errors: Floats, linear_sizes: Floats, linear_errors: Floats) -> Factor:
    """Return the median over levels of what the linear network needs, divided by what the other one needs.

    Its ends are the medians with what is only a bound as low, and as high, as it may be.
    """
    best = np.minimum.accumulate(errors)
    levels = np.geomspace(best[0], best[-1], LEVELS)
    own, _ = size_at(sizes, errors, levels)
    theirs, bounds = size_at(linear_sizes, linear_errors, levels)
    factors = theirs / own
    low = np.median(np.where(bounds == -1, 0.0, factors))
    return Factor(float(low), float(np.median(np.where(bounds == 1, np.inf, factors))))


def match(curve: Curve, linear: Curve, axis: str) -> Match:
    """Return the factor between two curves along an axis, with its interval by bootstrap over seeds."""

    @cache  # there are few different samples of a few seeds
    def factor(*seeds: int) -> Factor:
        own, theirs = (floored(each.errors[:, seeds].mean(1)) for each in (curve, linear))
        return factor_between(curve.sizes[axis], own, linear.sizes[axis], theirs)

    count = curve.errors.shape[1]
    picks = np.sort(np.random.default_rng(0).integers(count, size=(DRAWS, count)), 1)
    drawn = [factor(*pick) for pick in picks.tolist()]
    tail = round((1 - INTERVAL) / 2 * DRAWS)
    low, high = sorted(each.low for each in drawn)[tail], sorted(each.high for each in drawn)[-1 - tail]
    return Match(factor(*range(count)), low, high)


def floored(errors: Floats) -> Floats:
    """Return errors of at least one in a hundred thousand, as none has a logarithm."""
    return np.maximum(errors, 1e-5)


# ---- the report


def title(name: str) -> str:
    """Return the heading of a task."""
    return f"Efficiency on {name}"


def describe(study: Study) -> str:
    """Return the section of a study: how, a table, and what it means for a user."""
    linear = study.curves[LINEAR]
    matches = {
        arm: {axis: match(curve, linear, axis) for axis in AXES}
        for arm, curve in study.curves.items()
        if arm != LINEAR
    }
    every = [curve.sizes["params"] for curve in study.curves.values()]
    common = max(sizes[0] for sizes in every), min(sizes[-1] for sizes in every)
    wanted = np.geomspace(*common, SHOWN_SIZES)
    rows = []
    for arm, curve in study.curves.items():
        own = [str(matches[arm][axis]) for axis in AXES] if arm != LINEAR else ["1"] * len(AXES)
        errors = [shown_error(error_at(curve, size), study.is_regression) for size in wanted]
        rows.append([arm, *errors, *own])
    header = ["network", *(f"error, {size:,.0f} parameters" for size in wanted)]
    header += [f"linear needs, x {unit}" for unit in AXES.values()]
    seeds = linear.errors.shape[1]
    return (
        f"## {title(study.name)}\n\n{study.how} {seeds} seeds, {host.cpu_name()}; latencies of the table "
        f"`{DEVICE}` (`{study.command}`).\n\n{markdown_table(header, rows)}\n\n{meaning(matches, seeds)}"
    )


def error_at(curve: Curve, params: float) -> float:
    """Return the mean error at a number of parameters, by straight lines between the logarithms."""
    sizes, errors = np.log(curve.sizes["params"]), np.log(floored(curve.mean))
    return float(np.exp(np.interp(np.log(params), sizes, errors)))


def shown_error(error: float, is_regression: bool) -> str:
    """Format an error: a number for regression, a percentage for classes."""
    return f"{error:.3g}" if is_regression else f"{100 * error:.1f}%"


def meaning(matches: Mapping[str, Mapping[str, Match]], seeds: int) -> str:
    """Return one sentence on which kinds pay off, by the intervals alone."""
    clauses = []
    for axis, what in (("params", "parameters are"), ("macs", "MACs are"), ("latency_ms", "latency is")):
        arms: dict[str, list[str]] = {"more": [], "less": [], "": []}
        for arm, found in matches.items():
            if arm not in CONVENTIONAL:
                arms[found[axis].verdict].append(arm)
        parts = [f"{what} saved by {listed(arms['more'])}"]
        parts += [f"lost by {listed(arms['less'])}"] if arms["less"] else []
        parts += [f"undecided for {listed(arms[''])}"] if arms[""] else []
        clauses.append(", ".join(parts))
    judged = f"{INTERVAL:.0%} intervals over {seeds} seeds above or below 1"
    return f"For a user who needs the same error here, {'; '.join(clauses)} ({judged})."


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence."""
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def draw(study: Study, path: Path) -> None:
    """Draw the errors over parameters, MACs and latency as a PNG, with bands from best to worst seed."""
    from matplotlib.figure import Figure  # not pyplot, which keeps state and looks for a display
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (axis, unit) in zip(panels, AXES.items(), strict=True):
        for number, (arm, curve) in enumerate(study.curves.items()):
            is_plain = arm == LINEAR or arm in CONVENTIONAL
            colour = "black" if arm == LINEAR else f"C{number % 10}"
            style = {"color": colour, "linestyle": "--" if is_plain else "-", "marker": "o", "markersize": 3}
            axes.plot(curve.sizes[axis], floored(curve.mean), label=arm, linewidth=1.2, **style)
            low, high = floored(curve.errors.min(1)), floored(curve.errors.max(1))
            axes.fill_between(curve.sizes[axis], low, high, color=colour, alpha=0.07, linewidth=0)
        axes.axhline(study.guess, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel({"latency_ms": f"predicted ms on {DEVICE}"}.get(axis, unit))
    panels[0].set_ylabel("squared error by variance" if study.is_regression else "error")
    figure.suptitle(study.name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=90)
    write_bytes(path, image.getvalue())


if __name__ == "__main__":
    main()
