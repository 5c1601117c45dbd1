"""Charts of a search: its course, its rivals and Pareto fronts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qnas.common.errors import CheckpointError
from qnas.common.files import read_json
from qnas.common.units import format_ms
from qnas.runs.finished_run import FinishedRun
from qnas.runs.plots import OF_LIMIT, UNSETTLED
from qnas.runs.report.charts import Band, Level, Mark, Series, chart, thin
from qnas.runs.text import short_name

Rows = Sequence[Mapping[str, Any]]


def step_charts(rows: Rows, steps: Rows) -> Iterator[Markup]:
    """Show the course of a search; `steps` are the rows that trained the architecture."""
    yield _over_steps(
        "Expected amount against its limit",
        "of the limit",
        [
            _by_step(key.removeprefix(OF_LIMIT), steps, key, colour)
            for colour, key in enumerate((k for row in steps[-1:] for k in row if k.startswith(OF_LIMIT)), 1)
        ],
        levels=[Level(1, "the limit")],
        bands=[Band(1 - UNSETTLED, 1 + UNSETTLED, f"within {UNSETTLED:.0%}", of="y")],
        percent=True,
    )
    yield _over_steps(
        "Multiplier: the pressure of the limit",
        "multiplier",
        [_by_step("multiplier", steps, "multiplier", 3)],
        levels=[Level(0, "")],
    )
    yield _over_steps(
        "Temperature of the probabilities",
        "temperature",
        [_by_step("temperature", steps, "temperature", 4)],
        y_ends=(0, 1),
    )
    weights = _by_step("weights, training images", rows, "loss", 1)
    architecture = _by_step("architecture, held-out images", steps, "arch_loss", 2)
    yield _over_steps("Losses, as means over neighbouring steps", "nats", [weights, architecture])
    known = [step for step in steps if "arch_accuracy" in step]
    yield _over_steps(
        "Accuracy, as means over neighbouring steps",
        "accuracy",
        [_by_step("held-out images, of the sampled paths", known, "arch_accuracy", 2)],
        percent=True,
    )
    entropy = _by_step("entropy of a position, nats", steps, "entropy", 1)
    identity = _by_step("share of identity", steps, "identity_share", 2)
    yield _over_steps("Entropy of the probabilities, on average", "", [entropy, identity], y_ends=(0, None))


def _over_steps(title: str, y_label: str, series: Sequence[Series], **options: Any) -> Markup:
    return chart(series, title=title, x_label="step", y_label=y_label, **options)


def _by_step(name: str, rows: Rows, key: str, colour: int) -> Series:
    return Series(name, thin([(row["step"], row[key]) for row in rows]), colour)


def rival_charts(run: FinishedRun) -> Iterator[Markup]:
    """Show the ranked networks by held-out accuracy, and the networks of the comparison by test accuracy."""
    found, limit = run.found, run.limits[0]

    def cloud(name: str, entries: Rows, key: str, colour: int, mark: Mark) -> Series:
        took = [entry["amounts"][0] for entry in entries]
        titles = [
            f"{format_ms(ms)}, {entry[key]:.1%}: {' '.join(map(short_name, entry['choices']))}"
            for ms, entry in zip(took, entries, strict=True)
        ]
        points = [(ms, entry[key]) for ms, entry in zip(took, entries, strict=True)]
        return Series(name, points, colour, mark, titles)

    def draw(title: str, others: Sequence[Series], derived: str, accuracy: float) -> Markup:
        return chart(
            [*others, Series(derived, [(limit.amount(run.indices), accuracy)], 4, "star")],
            title=title,
            x_label=f"ms on {limit.name}",
            y_label="accuracy",
            levels=[Level(limit.limit, "the limit", "x")],
            percent=True,
        )

    if ranking := found.get("ranking", []):
        others = cloud(f"the {len(ranking)} ranked networks", ranking[1:], "heldout_accuracy", 1, "dots")
        first = ranking[0]["heldout_accuracy"]
        yield draw("Held-out images, used for selection", [others], "derived: the first", first)
    clouds = [cloud("random networks", found.get("random", []), "accuracy", 1, "dots")]
    for key, name, colour in (("macs_guided", "best by a limit on MACs", 3), ("largest", "most MACs", 2)):
        if found.get(key):
            clouds.append(cloud(name, [found[key]], "accuracy", colour, "rings"))
    yield draw("Test images, not used for selection", clouds, "derived", found["derived"]["accuracy"])


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
