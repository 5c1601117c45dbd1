"""The section of a page about a search: its course, its result and an explanation."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from qnas.common.errors import CheckpointError
from qnas.common.intervals import wilson
from qnas.common.units import format_ms
from qnas.runs.documents import ParetoDocument, read_document
from qnas.runs.explain import OnDevice, explain
from qnas.runs.family_text import chosen_layout, proof_text, shown_layouts
from qnas.runs.finalists_text import by_rung, chosen_line, corrections_text, latency_text
from qnas.runs.finished_run import FinishedRun, read_finished_run
from qnas.runs.metrics import OF_LIMIT, read_metrics
from qnas.runs.names import METRICS_FILE, PARETO_FOLDER
from qnas.runs.plots import UNSETTLED
from qnas.runs.public_front import point_title, rivals_of, table_of
from qnas.runs.report.charts import Band, Level, Mark, Series, chart, heat_map, thin
from qnas.runs.report.commands import search_command
from qnas.runs.rivals_text import NOT_YOUR_DATA, interval_header
from qnas.runs.run_text import identity_line, other_budgets, price_lines, solved_line, what_loss_is
from qnas.runs.text import mean_and_spread, never_text, short_name
from qnas.solver.limits import near_searched
from qnas.spaces.space import SearchSpace

Rows = Sequence[Mapping[str, Any]]


def search_section(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section's content for the template; `document` is the run's arch.json."""
    run = read_finished_run(folder, document)
    rows = read_metrics(folder / METRICS_FILE)
    steps = [row for row in rows if "multiplier" in row]
    e = explain(run)
    devices = [d.device for d in e.devices]
    return {
        "command": search_command(run.config),
        "warnings": [(row["step"], text) for row in rows for text in row.get("warnings", ())],
        "charts": list(_step_charts(rows, steps)),
        "heats": list(_heats(run, steps)),
        "accuracies": list(_rival_charts(run)),
        "rivals": list(_rivals(run)),
        "random": _random(run),
        "never": never_text(
            run.found["derived"].get("never_predicted", ()), len(run.found.get("classes", ()))
        ),
        "positions": e.positions,
        "solved": solved_line(e),
        "devices": [_on_device(run, d) for d in e.devices],
        "loss_note": what_loss_is(e),
        "identities": [(s.name, identity_line(s, devices)) for s in e.positions if s.best_block is not None],
        "pareto": list(_pareto_charts(folder / PARETO_FOLDER / "pareto.json", run.space)),
        "public": _public(run),
        "finalists": _finalists(run),
        "layouts": _layouts(run),
    }


def _heats(run: FinishedRun, steps: Rows) -> Iterator[dict[str, Any]]:
    known = [row for row in steps if "probabilities" in row]
    sizes = [len(position.names) for position in run.space.positions]
    for row in known:
        if [len(shares) for shares in row["probabilities"]] != sizes:
            raise CheckpointError(
                f"{run.folder / METRICS_FILE}: step {row['step']}: probabilities: "
                f"not one for each candidate of space {run.space.name}"
            )
    if not known:
        return
    snapshots = [row["probabilities"] for row in known]
    final = run.searched.log_probabilities
    for at, position in enumerate(run.space.positions):
        if len(position.names) < 2:
            continue
        shares = np.array([snapshot[at] for snapshot in snapshots]).T
        names = [short_name(name) for name in position.names]
        yield {
            "position": position.name,
            "picture": heat_map(shares),  # one row per candidate, one column per snapshot
            "chosen": short_name(run.arch.choices[at]),
            "last": list(zip(names, np.exp(final[at]).tolist(), strict=True)),
        }


def _rivals(run: FinishedRun) -> Iterator[tuple[str, str, str]]:
    """Yield each network of the comparison: name, key in search.json, and interval of the accuracy."""
    images = run.found["images"].get("test")
    for key, name in (
        ("derived", "derived"),
        ("macs_guided", "best by the same scores under a limit on MACs only"),
        ("largest", "most MACs within the limits"),
    ):
        entry = run.found[key]
        if entry is not None:
            interval = ""
            if images:
                low, high = wilson(entry["accuracy"], images)
                interval = f"{100 * low:.1f}\N{EN DASH}{high:.1%}"
            yield name, f"search.{key}", interval


def _public(run: FinishedRun) -> dict[str, Any]:
    """Return the table of the public networks within the run's limits, or why there is none."""
    rivals, why = rivals_of(run)
    if rivals is None:
        return {"rows": [], "why": why}
    return {
        "rows": list(table_of(rivals)),
        "within": len(rivals.networks),
        "known": rivals.known,
        "devices": [budget.device.name for budget in rivals.budgets],
        "levels": [interval_header(latency) for latency in rivals.networks[0].latencies],
        "meaning": NOT_YOUR_DATA,
        "source": rivals.source,
    }


def _finalists(run: FinishedRun) -> dict[str, Any]:
    """Return the table of the finalists; nothing without any."""
    found = run.found.get("finalists")
    if found is None:
        return {}
    return {
        "chosen": chosen_line(found),
        "corrected": corrections_text(found),
        "rows": [
            {
                "key": f"search.finalists.networks.{at}",
                "latency": latency_text(entry, run.limits, run.space, run.family),
                "epochs": [epochs for epochs, _ in by_rung(found, entry)],
                "choices": " ".join(map(short_name, entry["choices"])),
                "is_winner": entry["number"] == found["winner"],
            }
            for at, entry in enumerate(found["networks"])
        ],
    }


def _layouts(run: FinishedRun) -> dict[str, Any]:
    """Return the table of the layouts of a family; nothing without one."""
    if run.family is None:
        return {}
    return {
        "chosen": chosen_layout(run.family),
        "proof": proof_text(run.family),
        "rows": [
            (f"family.spaces.{at}", entry["space"] == run.space.name, "-".join(map(str, entry["channels"])))
            for at in shown_layouts(run.family)
            for entry in [run.family.document["spaces"][at]]
        ],
        "has_widths": run.family.family.has_widths,
    }


def _random(run: FinishedRun) -> str:
    accuracies = [entry["accuracy"] for entry in run.found["random"]]
    if not accuracies:
        return "no random networks of the same latency were drawn"
    drawn = mean_and_spread(accuracies).replace("+-", "\N{PLUS-MINUS SIGN}")
    return f"{len(accuracies)} random networks of the same latency: {drawn}, the best {max(accuracies):.1%}"


def _on_device(run: FinishedRun, d: OnDevice) -> dict[str, Any]:
    points = [(point.latency_ms, point.loss) for point in d.curve]
    limit, searched = next(each for each in run.limits if each.name == d.device), run.searched
    low, high = near_searched(searched.log_probabilities, limit, pressed=searched.pressed)
    near = Band(low, limit.most if high is None else high, "budgets near the searched one")
    several = len(run.limits) > 1  # another limit may be the binding one
    curve = chart(
        [
            Series("least loss within a budget", points, 1, "step"),
            Series("", [(p.latency_ms, p.loss) for p in d.curve if p.far], 1, "rings"),
            Series("", [(p.latency_ms, p.loss) for p in d.curve if not p.far], 1, "dots"),
        ],
        title="Loss against latency, by the effects (hollow: far from the searched budget)",
        x_label=f"ms on {d.device} at {run.space.input.resolution_px} px",
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


def _step_charts(rows: Rows, steps: Rows) -> Iterator[Markup]:
    """Draw the course of a search; `steps` are the rows of architecture steps."""
    amounts = [key for row in steps[-1:] for key in row if key.startswith(OF_LIMIT)]
    yield _over_steps(
        "Expected amount against its limit",
        "of the limit",
        [_by_step(key.removeprefix(OF_LIMIT), steps, key, i) for i, key in enumerate(amounts, 1)],
        levels=[Level(1, "the limit")],
        bands=[Band(1 - UNSETTLED, 1 + UNSETTLED, f"within {UNSETTLED:.0%}", of="y")],
        percent=True,
    )
    multiplier = _by_step("multiplier", steps, "multiplier", 3)
    title = "Multiplier: the pressure of the limit"
    yield _over_steps(title, "multiplier", [multiplier], levels=[Level(0, "")])
    temperature = _by_step("temperature", steps, "temperature", 4)
    yield _over_steps("Temperature of the probabilities", "temperature", [temperature], y_ends=(0, 1))
    weights = _by_step("weights, training images", rows, "loss", 1)
    architecture = _by_step("architecture, held-out images", steps, "arch_loss", 2)
    yield _over_steps("Losses, as means over neighbouring steps", "nats", [weights, architecture])
    known = [step for step in steps if "arch_accuracy" in step]
    accuracies = [_by_step("held-out images, of the sampled paths", known, "arch_accuracy", 2)]
    if balanced := [step for step in steps if "arch_balanced_accuracy" in step]:  # not in older versions
        accuracies.append(_by_step("balanced over their classes", balanced, "arch_balanced_accuracy", 1))
    yield _over_steps("Accuracy, as means over neighbouring steps", "accuracy", accuracies, percent=True)
    entropy = _by_step("entropy of a position, nats", steps, "entropy", 1)
    identity = _by_step("share of identity", steps, "identity_share", 2)
    yield _over_steps("Entropy of the probabilities, on average", "", [entropy, identity], y_ends=(0, None))


def _over_steps(title: str, y_label: str, series: Sequence[Series], **options: Any) -> Markup:
    return chart(series, title=title, x_label="step", y_label=y_label, **options)


def _by_step(name: str, rows: Rows, key: str, colour: int) -> Series:
    return Series(name, thin([(row["step"], row[key]) for row in rows]), colour)


def _rival_charts(run: FinishedRun) -> Iterator[Markup]:
    """Draw the ranked networks by held-out accuracy, and the networks of the comparison by test accuracy."""
    found, limit = run.found, run.limits[0]
    upper = f", upper end of {limit.confidence:.4g} intervals" if limit.confidence else ""

    def cloud(name: str, entries: Rows, key: str, colour: int, mark: Mark) -> Series:
        points = [(entry["amounts"][0], entry[key]) for entry in entries]
        titles = [
            f"{format_ms(ms)}, {accuracy:.1%}: {' '.join(map(short_name, entry['choices']))}"
            for (ms, accuracy), entry in zip(points, entries, strict=True)
        ]
        return Series(name, points, colour, mark, titles)

    def draw(title: str, others: Sequence[Series], derived: str, accuracy: float) -> Markup:
        return chart(
            [*others, Series(derived, [(limit.amount(run.indices), accuracy)], 4, "star")],
            title=title,
            x_label=f"ms on {limit.name} at {run.space.input.resolution_px} px{upper}",
            y_label="accuracy",
            levels=[Level(limit.limit, "the limit", "x")],
            percent=True,
        )

    ranking, finalists = found["ranking"], found.get("finalists")
    rest, name = (ranking[1:], "derived: the first") if finalists is None else (ranking, "derived")
    others = cloud(f"the {len(ranking)} ranked networks", rest, "heldout_accuracy", 1, "dots")
    first = found["derived"]["heldout_accuracy"]
    yield draw("Held-out images, used for selection", [others], name, first)
    clouds = [cloud("random networks", found["random"], "accuracy", 1, "dots")]
    for key, name, colour in (("macs_guided", "best by a limit on MACs", 3), ("largest", "most MACs", 2)):
        if found[key] is not None:
            clouds.append(cloud(name, [found[key]], "accuracy", colour, "rings"))
    yield draw("Test images, not used for selection", clouds, "derived", found["derived"]["accuracy"])


def _pareto_charts(path: Path, space: SearchSpace) -> Iterator[Markup]:
    """Draw each device's front from the pareto.json of `qnas pareto`, if there is one."""
    if not path.is_file():
        return
    document = read_document(path, ParetoDocument)
    if document["space_digest"] != space.digest:
        raise CheckpointError(f"{path}: its space is not that of the run")
    ranked = document["ranked"]
    value = "heldout_accuracy" if ranked else "score"
    for front in document["devices"]:
        low, high = front["trusted_ms"]
        points = [(p["latency_ms"], p[value], p) for p in front["points"]]
        near = [(x, y) for x, y, p in points if not p["far"]]
        far = [(x, y) for x, y, p in points if p["far"]]
        own = [(front["own_latency_ms"], front["own_accuracy"])]
        budget = front["own_budget_ms"]
        yield chart(
            [
                Series("front", [(x, y) for x, y, p in points if p["on_front"]], 1, "step"),
                Series("best within a budget", near, 1, "dots"),
                Series("far from the searched budget", far, 1, "rings"),
                Series("derived", own if ranked and own[0][1] is not None else [], 4, "star"),
            ],
            title=front["device"],
            x_label="ms, each at its own resolution"
            if "family" in document
            else f"ms at {space.input.resolution_px} px",
            y_label="held-out accuracy" if ranked else "score",
            levels=[Level(budget, "the search's budget", "x")] if budget is not None else [],
            bands=[Band(low, front["slowest_ms"] if high is None else high, "near the searched budget")],
            log_x=True,
            percent=ranked,
        )
        yield _public_chart(front)


def _public_chart(front: Mapping[str, Any]) -> Markup:
    """Draw the public networks of a device, by their accuracy on ImageNet; nothing without any."""
    points = front.get("public") or []
    places = [(point["latency_ms"], point["imagenet_top1"]) for point in points]
    budget = front["own_budget_ms"]
    return chart(
        [
            Series("", places, 3, "step"),
            Series("public networks", places, 3, "dots", list(map(point_title, points))),
        ],
        title=f"{front['device']}: public networks, by accuracy on ImageNet, not on these images",
        x_label="ms, each at its own resolution",
        y_label="ImageNet top-1",
        levels=[Level(budget, "the search's budget", "x")] if budget is not None else [],
        log_x=True,
        percent=True,
    )
