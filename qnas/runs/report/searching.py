"""The section of a page about a search: its course, its result, and an explanation."""

import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from qnas.common.intervals import wilson
from qnas.runs.explain import BlockCost, Explanation, OnDevice, explain
from qnas.runs.finished_run import FinishedRun, read_finished_run
from qnas.runs.names import METRICS_FILE, PARETO_FOLDER
from qnas.runs.report.charts import Band, Level, Series, chart
from qnas.runs.report.figures import read_metrics
from qnas.runs.report.pictures import heat_map
from qnas.runs.report.search_charts import (
    budget_charts,
    pareto_charts,
    rival_charts,
    training_charts,
)
from qnas.runs.run_text import identity_line, other_budgets, price_lines, solved_line, what_loss_is
from qnas.runs.text import short_name
from qnas.solver.searched_budget import near_searched

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
    """The price of latency on one device."""

    device: str
    price: tuple[tuple[str, str], ...]  # what is said, in words
    other_budgets: tuple[str, ...]  # what each position holds there
    curve: Markup
    blocks: Mapping[str, BlockCost]  # what each takes, by name


@dataclass(frozen=True)
class SearchSection:
    """The content of the section for the template."""

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
    losses, accuracy, entropy = training_charts(rows, steps)
    return SearchSection(
        command_line(run.config),
        tuple((row["step"], text) for row in rows for text in row.get("warnings", ())),
        tuple(budget_charts(steps)),
        losses,
        accuracy,
        entropy,
        tuple(_heats(run, steps)),
        tuple(rival_charts(run)),
        tuple(_rivals(run)),
        _random(run),
        e,
        solved_line(e),
        tuple(_worth(run, d) for d in e.devices),
        what_loss_is(e),
        tuple((s.name, identity_line(s, devices)) for s in e.positions if s.best_block is not None),
        tuple(pareto_charts(folder / PARETO_FOLDER / "pareto.json")),
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
