"""What a page says of a search: how it went, what it found, and why."""

import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from qnas.common.errors import CheckpointError
from qnas.common.files import read_json
from qnas.common.intervals import wilson
from qnas.common.units import format_ms
from qnas.runs.explain import BlockCost, Explanation, OnDevice, explain
from qnas.runs.finished_run import FinishedRun, read_finished_run
from qnas.runs.names import METRICS_FILE, PARETO_FOLDER
from qnas.runs.plots import OF_LIMIT, UNSETTLED
from qnas.runs.report.charts import Band, Level, Series, chart, thin
from qnas.runs.report.figures import read_metrics
from qnas.runs.report.pictures import heat_map
from qnas.runs.run_text import identity_line, other_budgets, price_lines, solved_line, what_loss_is
from qnas.runs.text import short_name
from qnas.solver.derive import near_searched

# of a search's config -> the option that asks for it
OPTIONS = {
    "seed": "--seed",
    "search_epochs": "--epochs",
    "warmup_epochs": "--warmup-epochs",
    "batch_size": "--batch-size",
    "resolution_px": "--resolution",
    "latency_loss": "--latency-loss",
    "weights": "--weights",
    "gradient": "--gradient",
    "paths": "--paths",
    "effect_networks": "--effect-networks",
    "k_best": "--k-best",
    "screened": "--screened",
    "random_networks": "--random-networks",
    "threads": "--threads",
    "torch_device": "--torch-device",
    "precision": "--precision",
}


@dataclass(frozen=True)
class Heat:
    """The probabilities of a position's candidates over the search."""

    position: str
    names: tuple[str, ...]
    picture: str  # a data URI: a row a candidate, a column a snapshot
    chosen: str
    final: tuple[tuple[str, float], ...]  # each candidate's last probability


@dataclass(frozen=True)
class Rival:
    """A network of the comparison, and where its figures stand in search.json."""

    name: str
    key: str
    interval: str


@dataclass(frozen=True)
class Worth:
    """What latency is worth on one device."""

    device: str
    price: tuple[tuple[str, str], ...]  # what is said, in words
    other_budgets: tuple[str, ...]  # what each position holds there
    curve: Markup
    blocks: Mapping[str, BlockCost]  # what each takes, by name


@dataclass(frozen=True)
class SearchSection:
    """What the template needs of a search."""

    command: str
    warnings: tuple[tuple[int, str], ...]  # step, what was said
    budget: tuple[Markup, ...]  # charts of the way to the budget
    losses: Markup
    accuracy: Markup  # nothing where a run is older than this chart
    entropy: Markup
    heats: tuple[Heat, ...]
    accuracies: tuple[Markup, ...]
    rivals: tuple[Rival, ...]
    random: str
    explanation: Explanation
    solved: str  # where images chose another network than the effects
    devices: tuple[Worth, ...]
    loss_note: str
    identities: tuple[tuple[str, str], ...]
    pareto: tuple[Markup, ...]


def search_section(folder: Path, document: Mapping[str, Any]) -> SearchSection:
    """Return what a page says of a finished search; `document` is its arch.json."""
    run = read_finished_run(folder, document)
    rows = read_metrics(folder / METRICS_FILE)
    steps = [row for row in rows if "multiplier" in row]
    e = explain(run)
    devices = [d.device for d in e.devices]
    return SearchSection(
        command_line(run.config),
        tuple((row["step"], text) for row in rows for text in row.get("warnings", ())),
        tuple(_budget_charts(steps)),
        _loss_chart(rows, steps),
        _accuracy_chart(steps),
        _entropy_chart(steps),
        tuple(_heats(run, steps)),
        tuple(_accuracy_charts(run)),
        tuple(_rivals(run)),
        _random(run),
        e,
        solved_line(e),
        tuple(_worth(run, d) for d in e.devices),
        what_loss_is(e),
        tuple((s.name, identity_line(s, devices)) for s in e.positions if s.best_block is not None),
        tuple(_pareto_charts(folder / PARETO_FOLDER / "pareto.json")),
    )


def command_line(config: Mapping[str, Any]) -> str:
    """Return a command that asks for the same search, every option written out."""
    words = ["qnas", "search"]
    for name in ("space", "data", "latency"):
        if config.get(name) is not None:
            words += [f"--{name}", str(config[name])]
    for entry in config.get("limits", []):
        if "device" in entry:
            words += ["--device", entry["device"], "--budget", entry["budget"]]
        else:
            words += [f"--max-{entry['name']}", entry["budget"]]
    search = config.get("search", {})
    for name, option in OPTIONS.items():
        if search.get(name) is not None:
            words += [option, str(search[name])]
    return shlex.join([*words, *(["--compile"] if search.get("compile") else [])])


def _budget_charts(steps: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    if not steps:
        return
    names = [key for key in steps[-1] if key.startswith(OF_LIMIT)]
    yield chart(
        [
            Series(key.removeprefix(OF_LIMIT), _curve(steps, key), colour)
            for colour, key in enumerate(names, 1)
        ],
        title="Expected amount against its limit",
        x_label="step",
        y_label="of the limit",
        levels=[Level(1, "the limit")],
        bands=[Band(1 - UNSETTLED, 1 + UNSETTLED, f"within {UNSETTLED:.0%}", of="y")],
        percent=True,
    )
    yield chart(
        [Series("multiplier", _curve(steps, "multiplier"), 3)],
        title="Multiplier: how strongly the limit presses",
        x_label="step",
        y_label="multiplier",
        levels=[Level(0, "")],
    )
    yield chart(
        [Series("temperature", _curve(steps, "temperature"), 4)],
        title="Temperature of the probabilities",
        x_label="step",
        y_label="temperature",
        y_ends=(0, 1),
    )


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return thin([(row["step"], row[key]) for row in rows])


def _loss_chart(rows: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> Markup:
    return chart(
        [
            Series("weights, training images", _curve(rows, "loss"), 1),
            Series("architecture, held-out images", _curve(steps, "arch_loss"), 2),
        ],
        title="Losses, as means over neighbouring steps",
        x_label="step",
        y_label="nats",
    )


def _accuracy_chart(steps: Sequence[Mapping[str, Any]]) -> Markup:
    known = [step for step in steps if "arch_accuracy" in step]
    return chart(
        [Series("held-out images, of the paths that are drawn", _curve(known, "arch_accuracy"), 2)],
        title="Accuracy, as means over neighbouring steps",
        x_label="step",
        y_label="accuracy",
        percent=True,
    )


def _entropy_chart(steps: Sequence[Mapping[str, Any]]) -> Markup:
    return chart(
        [
            Series("entropy of a position, nats", _curve(steps, "entropy"), 1),
            Series("share of identity", _curve(steps, "identity_share"), 2),
        ],
        title="How undecided the probabilities are, on average",
        x_label="step",
        y_label="",
        y_ends=(0, None),
    )


def _heats(run: FinishedRun, steps: Sequence[Mapping[str, Any]]) -> Iterator[Heat]:
    snapshots = [row["probabilities"] for row in steps if "probabilities" in row]
    if not snapshots:
        return
    final = run.searched.log_probabilities
    for at, position in enumerate(run.space.positions):
        if len(position.names) < 2:
            continue
        shares = np.array([snapshot[at] for snapshot in snapshots]).T
        yield Heat(
            position.name,
            tuple(map(short_name, position.names)),
            heat_map(shares),
            short_name(run.arch.choices[at]),
            tuple(zip(map(short_name, position.names), np.exp(final[at]).tolist(), strict=True)),
        )


def _accuracy_charts(run: FinishedRun) -> Iterator[Markup]:
    """Show what was solved for by held-out accuracy, and what it is compared with by test accuracy."""
    found, indices = run.found, run.indices
    limit = run.limits[0]
    own_ms = limit.amount(indices)
    ranking = found.get("ranking", [])

    def title(entry: Mapping[str, Any], accuracy: float) -> str:
        latency_ms = entry.get("latency_ms", entry["amounts"][0])
        choices = " ".join(map(short_name, entry["choices"]))
        return f"{format_ms(latency_ms)}, {accuracy:.1%}: {choices}"

    if ranking:
        others = ranking[1:]
        yield chart(
            [
                Series(
                    f"the {len(ranking)} that were ranked",
                    [(entry["amounts"][0], entry["heldout_accuracy"]) for entry in others],
                    1,
                    "dots",
                    [title(entry, entry["heldout_accuracy"]) for entry in others],
                ),
                Series("the first, derived", [(own_ms, ranking[0]["heldout_accuracy"])], 4, "star"),
            ],
            title="On held-out images, which chose",
            x_label=f"ms on {limit.name}",
            y_label="accuracy",
            levels=[Level(limit.limit, "the limit", "x")],
            percent=True,
        )
    named = [("random", "random networks", found.get("random", []), 1, "dots")]
    for key, name in (("macs_guided", "chosen by MACs alone"), ("largest", "most MACs")):
        if found.get(key):
            named.append((key, name, [found[key]], 2 if key == "largest" else 3, "rings"))
    series = [
        Series(
            name,
            [(entry["latency_ms"], entry["accuracy"]) for entry in entries],
            colour,
            mark,  # type: ignore[arg-type]  # one of the marks
            [title(entry, entry["accuracy"]) for entry in entries],
        )
        for _, name, entries, colour, mark in named
    ]
    yield chart(
        [*series, Series("derived", [(own_ms, found["derived"]["accuracy"])], 4, "star")],
        title="On test images, which chose nothing",
        x_label=f"ms on {limit.name}",
        y_label="accuracy",
        levels=[Level(limit.limit, "the limit", "x")],
        percent=True,
    )


def _rivals(run: FinishedRun) -> Iterator[Rival]:
    images = run.found.get("images", {}).get("test")
    for key, name in (
        ("derived", "derived"),
        ("macs_guided", "chosen by the same scores under a limit on MACs alone"),
        ("largest", "of most MACs within the limits"),
    ):
        entry = run.found.get(key)
        if entry and "latency_ms" in entry:
            yield Rival(name, f"search.{key}", interval_text(entry["accuracy"], images))


def interval_text(accuracy: float, images: int | None) -> str:
    """Write the 95% interval of an accuracy; empty where the number of images is not known."""
    if images is None:
        return ""
    low, high = wilson(accuracy, images)
    return f"{100 * low:.1f}\N{EN DASH}{high:.1%}"


def _random(run: FinishedRun) -> str:
    accuracies = [entry["accuracy"] for entry in run.found.get("random", [])]
    if not accuracies:
        return "no random networks of its latency were drawn"
    spread = f" \N{PLUS-MINUS SIGN} {statistics.stdev(accuracies):.1%}" if len(accuracies) > 1 else ""
    return (
        f"{len(accuracies)} random networks of its latency: {statistics.mean(accuracies):.1%}{spread}, "
        f"the best {max(accuracies):.1%}"
    )


def _worth(run: FinishedRun, d: OnDevice) -> Worth:
    points = [(point.latency_ms, point.loss) for point in d.curve]
    limit, searched = next(each for each in run.limits if each.name == d.device), run.searched
    low, high = near_searched(searched.log_probabilities, limit, pressed=searched.pressed)
    near = Band(low, limit.most if high is None else high, "budgets near what was searched for")
    curve = chart(
        [
            Series("least loss within a budget", points, 1, "step"),
            Series("", [(p.latency_ms, p.loss) for p in d.curve if p.far], 1, "rings"),
            Series("", [(p.latency_ms, p.loss) for p in d.curve if not p.far], 1, "dots"),
        ],
        title="What latency buys, by the effects; hollow: far from what was searched for",
        x_label=f"ms on {d.device}",
        y_label="nats against this budget",
        levels=[Level(d.budget_ms, "the budget", "x")],
        bands=[near] if len(run.limits) == 1 else [],  # of several another one may have pressed
    )
    others = tuple(other_budgets(flips, d.budget_ms) for flips in d.flips)
    return Worth(d.device, tuple(price_lines(d)), others, curve, {block.name: block for block in d.blocks})


def _pareto_charts(path: Path) -> Iterator[Markup]:
    """Show each device's front as `qnas pareto` left it, where it was run."""
    if not path.is_file():
        return
    document = read_json(path, CheckpointError)
    ranked = document["ranked"]
    value = "heldout_accuracy" if ranked else "score"
    for front in document["devices"]:
        low, high = front["trusted_ms"]
        points = [(p["latency_ms"], p[value], p) for p in front["points"]]
        own = [(front["own_latency_ms"], front["own_accuracy"])]
        budget = front["own_budget_ms"]
        yield chart(
            [
                Series("front", [(x, y) for x, y, p in points if p["on_front"]], 1, "step"),
                Series("best within a budget", [(x, y) for x, y, p in points if not p["far"]], 1, "dots"),
                Series("far from the search", [(x, y) for x, y, p in points if p["far"]], 1, "rings"),
                Series("derived", own if ranked and own[0][1] is not None else [], 4, "star"),
            ],
            title=front["device"],
            x_label="ms",
            y_label="held-out accuracy" if ranked else "score",
            levels=[Level(budget, "the search's budget", "x")] if budget is not None else [],
            bands=[Band(low, front["slowest_ms"] if high is None else high, "near the search")],
            log_x=True,
            percent=ranked,
        )
