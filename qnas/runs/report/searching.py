"""The section of a page about a search: its course, its result, and an explanation."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qnas.common.intervals import wilson
from qnas.runs.explain import OnDevice, explain
from qnas.runs.finished_run import FinishedRun, read_finished_run
from qnas.runs.metrics import read_metrics
from qnas.runs.names import METRICS_FILE, PARETO_FOLDER
from qnas.runs.report.charts import Band, Level, Series, chart
from qnas.runs.report.commands import search_command
from qnas.runs.report.pictures import heat_map
from qnas.runs.report.search_charts import pareto_charts, rival_charts, step_charts
from qnas.runs.run_text import identity_line, other_budgets, price_lines, solved_line, what_loss_is
from qnas.runs.text import mean_and_spread, short_name
from qnas.solver.searched_budget import near_searched


def search_section(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the section for the template; `document` is the run's arch.json."""
    run = read_finished_run(folder, document)
    rows = read_metrics(folder / METRICS_FILE)
    steps = [row for row in rows if "multiplier" in row]
    e = explain(run)
    devices = [d.device for d in e.devices]
    return {
        "command": search_command(run.config),
        "warnings": [(row["step"], text) for row in rows for text in row.get("warnings", ())],
        "charts": list(step_charts(rows, steps)),
        "heats": list(_heats(run, steps)),
        "accuracies": list(rival_charts(run)),
        "rivals": list(_rivals(run)),
        "random": _random(run),
        "positions": e.positions,
        "solved": solved_line(e),
        "devices": [_on_device(run, d) for d in e.devices],
        "loss_note": what_loss_is(e),
        "identities": [(s.name, identity_line(s, devices)) for s in e.positions if s.best_block is not None],
        "pareto": list(pareto_charts(folder / PARETO_FOLDER / "pareto.json")),
    }


def _heats(run: FinishedRun, steps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    snapshots = [row["probabilities"] for row in steps if "probabilities" in row]
    if not snapshots:
        return
    final = run.searched.log_probabilities
    for at, position in enumerate(run.space.positions):
        if len(position.names) < 2:
            continue
        shares = np.array([snapshot[at] for snapshot in snapshots]).T
        names = [short_name(name) for name in position.names]
        yield {
            "position": position.name,
            "picture": heat_map(shares),  # a row a candidate, a column a snapshot
            "chosen": short_name(run.arch.choices[at]),
            "last": list(zip(names, np.exp(final[at]).tolist(), strict=True)),
        }


def _rivals(run: FinishedRun) -> Iterator[tuple[str, str, str]]:
    """Yield the networks of the comparison: a name, a key in search.json, and the accuracy's interval."""
    images = run.found.get("images", {}).get("test")
    for key, name in (
        ("derived", "derived"),
        ("macs_guided", "best by the same scores under a limit on MACs only"),
        ("largest", "most MACs within the limits"),
    ):
        entry = run.found.get(key)
        if entry and "latency_ms" in entry:
            interval = ""
            if images is not None:
                low, high = wilson(entry["accuracy"], images)
                interval = f"{100 * low:.1f}\N{EN DASH}{high:.1%}"
            yield name, f"search.{key}", interval


def _random(run: FinishedRun) -> str:
    accuracies = [entry["accuracy"] for entry in run.found.get("random", [])]
    if not accuracies:
        return "no random networks of the same latency were drawn"
    drawn = mean_and_spread(accuracies).replace("+-", "\N{PLUS-MINUS SIGN}")
    return f"{len(accuracies)} random networks of the same latency: {drawn}, the best {max(accuracies):.1%}"


def _on_device(run: FinishedRun, d: OnDevice) -> dict[str, Any]:
    points = [(point.latency_ms, point.loss) for point in d.curve]
    limit, searched = next(each for each in run.limits if each.name == d.device), run.searched
    low, high = near_searched(searched.log_probabilities, limit, pressed=searched.pressed)
    near = Band(low, limit.most if high is None else high, "budgets near the searched one")
    several = len(run.limits) > 1  # another limit may have been the binding one
    curve = chart(
        [
            Series("least loss within a budget", points, 1, "step"),
            Series("", [(p.latency_ms, p.loss) for p in d.curve if p.far], 1, "rings"),
            Series("", [(p.latency_ms, p.loss) for p in d.curve if not p.far], 1, "dots"),
        ],
        title="Loss against latency, by the effects (hollow: far from the searched budget)",
        x_label=f"ms on {d.device}",
        y_label="nats, relative to this budget",
        levels=[Level(d.budget_ms, "the budget", "x")],
        bands=[] if several else [near],
    )
    return {
        "device": d.device,
        "price": list(price_lines(d)),
        "other_budgets": [other_budgets(flips, d.budget_ms) for flips in d.flips],
        "curve": curve,
        "blocks": {block.name: block for block in d.blocks},
    }
