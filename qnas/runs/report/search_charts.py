"""Charts of a search: its budget, losses and accuracies, rivals and Pareto fronts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qnas.common.errors import CheckpointError
from qnas.common.files import read_json
from qnas.common.units import format_ms
from qnas.runs.finished_run import FinishedRun
from qnas.runs.plots import OF_LIMIT, UNSETTLED
from qnas.runs.report.charts import Band, Level, Series, chart, thin
from qnas.runs.text import short_name


def budget_charts(steps: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    """Show the expected amounts, the multiplier and the temperature by step."""
    if not steps:
        return
    names = [key for key in steps[-1] if key.startswith(OF_LIMIT)]
    yield chart(
        [_by_step(key.removeprefix(OF_LIMIT), steps, key, colour) for colour, key in enumerate(names, 1)],
        title="Expected amount against its limit",
        x_label="step",
        y_label="of the limit",
        levels=[Level(1, "the limit")],
        bands=[Band(1 - UNSETTLED, 1 + UNSETTLED, f"within {UNSETTLED:.0%}", of="y")],
        percent=True,
    )
    yield chart(
        [_by_step("multiplier", steps, "multiplier", 3)],
        title="Multiplier: the pressure of the limit",
        x_label="step",
        y_label="multiplier",
        levels=[Level(0, "")],
    )
    yield chart(
        [_by_step("temperature", steps, "temperature", 4)],
        title="Temperature of the probabilities",
        x_label="step",
        y_label="temperature",
        y_ends=(0, 1),
    )


def training_charts(
    rows: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> tuple[Markup, Markup, Markup]:
    """Show the losses, the held-out accuracy and the entropy of the probabilities by step."""
    known = [step for step in steps if "arch_accuracy" in step]
    losses = [
        _by_step("weights, training images", rows, "loss", 1),
        _by_step("architecture, held-out images", steps, "arch_loss", 2),
    ]
    accuracy = [_by_step("held-out images, of the sampled paths", known, "arch_accuracy", 2)]
    undecided = [
        _by_step("entropy of a position, nats", steps, "entropy", 1),
        _by_step("share of identity", steps, "identity_share", 2),
    ]
    smoothed = "as means over neighbouring steps"
    return (
        chart(losses, title=f"Losses, {smoothed}", x_label="step", y_label="nats"),
        chart(accuracy, title=f"Accuracy, {smoothed}", x_label="step", y_label="accuracy", percent=True),
        chart(
            undecided,
            title="Entropy of the probabilities, on average",
            x_label="step",
            y_label="",
            y_ends=(0, None),
        ),
    )


def _by_step(name: str, rows: Sequence[Mapping[str, Any]], key: str, colour: int) -> Series:
    return Series(name, thin([(row["step"], row[key]) for row in rows]), colour)


def rival_charts(run: FinishedRun) -> Iterator[Markup]:
    """Show the ranked networks by held-out accuracy, and the networks of the comparison by test accuracy."""
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
                    f"the {len(ranking)} ranked networks",
                    [(entry["amounts"][0], entry["heldout_accuracy"]) for entry in others],
                    1,
                    "dots",
                    [title(entry, entry["heldout_accuracy"]) for entry in others],
                ),
                Series("derived: the first", [(own_ms, ranking[0]["heldout_accuracy"])], 4, "star"),
            ],
            title="Held-out images, used for selection",
            x_label=f"ms on {limit.name}",
            y_label="accuracy",
            levels=[Level(limit.limit, "the limit", "x")],
            percent=True,
        )
    named = [("random", "random networks", found.get("random", []), 1, "dots")]
    for key, name in (("macs_guided", "best by a limit on MACs"), ("largest", "most MACs")):
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
        title="Test images, not used for selection",
        x_label=f"ms on {limit.name}",
        y_label="accuracy",
        levels=[Level(limit.limit, "the limit", "x")],
        percent=True,
    )


def pareto_charts(path: Path) -> Iterator[Markup]:
    """Show each device's front by the pareto.json that `qnas pareto` wrote, if there is one."""
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
                Series(
                    "far from the searched budget", [(x, y) for x, y, p in points if p["far"]], 1, "rings"
                ),
                Series("derived", own if ranked and own[0][1] is not None else [], 4, "star"),
            ],
            title=front["device"],
            x_label="ms",
            y_label="held-out accuracy" if ranked else "score",
            levels=[Level(budget, "the search's budget", "x")] if budget is not None else [],
            bands=[Band(low, front["slowest_ms"] if high is None else high, "near the searched budget")],
            log_x=True,
            percent=ranked,
        )
