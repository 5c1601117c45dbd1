"""The output of `pareto`, `explain`, `compare` and `train-subnet`, as wide as the output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from qnas.common.text import shown
from qnas.common.units import format_count, format_ms
from qnas.latency.device import device_names, load_device
from qnas.latency.intervals import Interval, describe_interval
from qnas.runs.compare import Comparison, Contestant, MeasuredAccuracy
from qnas.runs.explain import Change, Exchange, Explanation, Flip, OnDevice, PositionStory
from qnas.runs.latency_text import describe_budgets
from qnas.runs.names import LEFT_OUT_FILE
from qnas.runs.text import (
    BALANCING,
    NAME_SHOWN,
    ROOMY,
    balanced_text,
    columns,
    field,
    never_text,
    short_name,
    table_rows,
    wrapped,
)


def describe_fronts(document: Mapping[str, Any]) -> str:
    """Format the points of a pareto.json, one table per device, and explain their marks."""
    ranked, lines, used = document["ranked"], [], set()
    of_family = "family" in document  # each point is at its own resolution
    for front in document["devices"]:
        rows, level = [], next((p["level"] for p in front["points"] if p.get("level")), None)
        for point in front["points"]:
            marks = [m for m, key in (("b", "own_budget"), ("?", "far")) if point[key]]
            marks += [] if point["on_front"] else ["-"]
            used |= set(marks)
            accuracy = accuracy_text(*(point[f"heldout_{key}"] for key in ("accuracy", "low", "high")))
            counts = (format_count(point["macs"]), format_count(point["params"]))
            took, sure = format_ms(point["latency_ms"], round_up=True), _interval_of(point)
            ends = () if level is None else ("-" if sure is None else sure.ends,)
            at = (f"{point['resolution_px']} px",) if of_family else ()
            rows.append((format_ms(point["budget_ms"]), took, *ends, *at, accuracy, *counts, " ".join(marks)))
        range_ = f"{format_ms(front['fastest_ms'])} to {format_ms(front['slowest_ms'])}"
        expected = format_ms(front["expected_ms"])
        where = front["device"] + ("" if of_family else f" at {document['resolution_px']} px")
        title = f"{where}: networks take {range_}; the expected latency of the search is {expected}"
        if front.get("confidence"):
            title += f"; budgets are for the upper ends of {front['confidence']:.4g} intervals"
        sure_of = () if level is None else (f"{100 * level:g}%, ms",)
        inputs = ("input",) if of_family else ()
        header = ("budget", "latency", *sure_of, *inputs, "held-out (95%)", "MACs", "params", "")
        lines += [wrapped(title), table_rows(header, rows), ""]
    if not ranked:
        order = f"by the search's scores, without a ranking on images: {document['unranked']}"
        lines.append(field("order", order))
    meaning = {
        "b": "the best network within the searched budget",
        "?": "far from the searched budget: a search for that budget would probably find better",
        "-": "a faster network is as good",
    }
    lines += [field(mark, what) for mark, what in meaning.items() if mark in used]
    return "\n".join(lines).rstrip()


def _interval_of(point: Mapping[str, Any]) -> Interval | None:
    """Return the interval of a point of a pareto.json, None where it is unknown."""
    if point.get("high_ms") is None:
        return None
    return Interval(point["low_ms"], point["high_ms"], point["level"])


def describe_explanation(explanation: Explanation) -> str:
    """Format the cost of blocks and the price of latency on each device, and the reasons for the choices."""
    e = explanation
    lines = []
    for d in e.devices:
        lines += [
            wrapped(
                f"{d.device} at {e.resolution_px} px, within {format_ms(d.budget_ms)}: latency and loss of "
                "each block"
            ),
            table_rows(
                ("block", "choice", "latency", "share", "nats", "at other budgets, ms"),
                _block_rows(e, d),
                left=(0, 1, 5),
                keys=2,
            ),
            "",
            *(field(name, text) for name, text in price_lines(d)),
            "",
        ]
    lines += [field("nats", what_loss_is(e)), *([field("chosen", solved_line(e))] if solved_line(e) else [])]
    return "\n".join([*lines, "", *_identity_lines(e)]).rstrip()


def _block_rows(e: Explanation, d: OnDevice) -> Iterator[tuple[str, ...]]:
    stories = {story.name: (story, flips) for story, flips in zip(e.positions, d.flips, strict=True)}
    for block in d.blocks:
        nats, others = "", ""
        if block.name in stories:
            story, flips = stories[block.name]
            nats, others = f"{story.loss:+.3f}", other_budgets(flips, d.budget_ms)
        took = format_ms(block.latency_ms)
        yield block.name, short_name(block.choice), took, f"{block.share:.1%}", nats, others


def other_budgets(flips: Sequence[Flip], budget_ms: float) -> str:
    """Format the choices at a position just below and above a budget, in ms: `- < 2.2, k5 e4 > 3.5`."""
    at = max((i for i, flip in enumerate(flips) if flip.from_ms <= budget_ms), default=0)
    parts = []
    if at > 0:
        parts.append(f"{short_name(flips[at - 1].choice)} < {flips[at].from_ms:.3g}")
    if at + 1 < len(flips):
        following = flips[at + 1]
        parts.append(f"{short_name(following.choice)} > {following.from_ms:.3g}")
    return ", ".join(parts)


def what_loss_is(e: Explanation) -> str:
    """Describe the losses of an explanation."""
    if not e.measured:
        return (
            "are negative log probabilities of the choices, since the search measured no effects; they "
            "include the latency penalty"
        )
    explained = f", which explain {e.explained:.0%} of the variance between networks" if e.explained else ""
    return f"are of held-out images, by the effects of candidates measured near the budget{explained}"


def solved_line(e: Explanation) -> str:
    """Describe where the derived network differs from that of least loss; empty if it does not."""
    others = [f"{s.name} {short_name(s.solved)}" for s in e.positions if s.solved != s.choice]
    if not others:
        return ""
    return (
        "held-out images chose another network than the effects alone, which would have "
        f"{', '.join(others)}; other budgets are compared with that network"
    )


def price_lines(d: OnDevice) -> Iterator[tuple[str, str]]:
    """Yield the latency, the price of a millisecond, and the networks for slightly other budgets."""
    yield "latency", f"{format_ms(d.latency_ms, round_up=True)}, interval {describe_interval(d.interval)}"
    if d.confidence is not None:
        yield "", f"what follows, and other budgets, are of the upper ends of {d.confidence:.4g} intervals"
    step = f"{d.step_ms:.3g} ms"
    yield "price", f"{d.price:.3g} nats a millisecond, at this budget"
    if d.more is not None:
        yield "more", f"{step} more {exchange_line(d.more)}"
    elif d.next_better is None:
        yield "more", "no slower network has a lower loss"
    else:
        yield "more", f"{step} more changes nothing"
    if d.next_better is not None:
        took = format_ms(d.next_better.latency_ms, round_up=True)
        yield "", f"the next better network takes {took}: it {exchange_line(d.next_better)}"
    no_less = "changes nothing" if d.can_be_less else "leaves no network"
    yield "less", f"{step} less {exchange_line(d.less) if d.less is not None else no_less}"


def exchange_line(exchange: Exchange) -> str:
    """Describe how another network changes the loss and where it differs."""
    verb = "lowers" if exchange.loss < 0 else "raises"
    return f"{verb} the loss by {abs(exchange.loss):.3f} nats: {'; '.join(map(_change, exchange.changes))}"


def _change(change: Change) -> str:
    return (
        f"{change.position} {short_name(change.before)} > {short_name(change.after)} "
        f"({change.latency_ms:+.3g} ms, {change.loss:+.3f})"
    )


def _identity_lines(e: Explanation) -> Iterator[str]:
    devices = [d.device for d in e.devices]
    identities = [story for story in e.positions if story.best_block is not None]
    if identities:
        yield wrapped("positions without a block, each with the candidate closest to paying off:")
    for story in identities:
        yield field(f"  {story.name}", identity_line(story, devices))


def identity_line(story: PositionStory, devices: Sequence[str]) -> str:
    """Explain why a position is identity, with the latency of the best block on these devices."""
    assert story.best_block is not None
    verb = "lowers the loss by" if story.best_loss < 0 else "raises the loss by"
    took = [format_ms(latency_ms) for latency_ms in story.best_latencies_ms]
    if len(devices) > 1:
        took = [f"{ms} on {device}" for ms, device in zip(took, devices, strict=True)]
    return (
        f"{short_name(story.best_block)} {verb} {abs(story.best_loss):.3f} nats and takes "
        f"{' and '.join(took)}: {story.reason}"
    )


def describe_comparison(comparison: Comparison, strong: Callable[[str], str] = str) -> str:
    """Format runs side by side; `strong` highlights the lines of choices that differ."""
    c = comparison
    within = [f", within {describe_budgets(run.limits)}" if run.limits else "" for run in c.runs]
    lines = [
        field(run.label, f"{run.run}: {run.space}, {run.resolution_px} px{asked}")
        for run, asked in zip(c.runs, within, strict=True)
    ]
    lines += [field("", reason) for reason in dict.fromkeys(chain(*(run.unchecked for run in c.runs)))]
    for names in c.same_network:
        lines.append(field("", f"{' and '.join(names)} are the same network"))
    if not c.positions:
        lines += ["", "choices are not compared, since the runs are of different spaces"]
    if c.positions:
        lines += ["", _choice_tables(c, strong)]
    lines += ["", _latency_table(c.runs)]
    rows = [
        (
            run.label,
            *chain(*map(_accuracy_cells, (run.supernet, run.trained))),
            *map(format_count, (run.macs, run.params)),
        )
        for run in c.runs
    ]
    header = ("", "supernet accuracy", "balanced", "after training", "balanced", "MACs", "params")
    return "\n".join([*lines, "", table_rows(header, rows), "", field("accuracy", ACCURACY_NOTE)])


ACCURACY_NOTE = (
    "on test images, with 95% Wilson intervals for their number; the seed of the training adds to this. "
    "Balanced accuracy is the mean recall of the classes. Supernet accuracy is optimistic for networks that "
    "were selected with these weights"
)


def _accuracy_cells(measured: MeasuredAccuracy | None) -> tuple[str, str]:
    """Format an accuracy with its interval, and the balanced accuracy; dashes where there is none."""
    if measured is None:
        return "-", "-"
    balanced = "-" if measured.balanced is None else f"{measured.balanced:.1%}"
    return accuracy_text(measured.accuracy, measured.low, measured.high), balanced


def _choice_tables(c: Comparison, strong: Callable[[str], str]) -> str:
    rows = [
        ("*" if differs else "", name, *(short_name(run.choices[at]) for run in c.runs))
        for at, (name, differs) in enumerate(zip(c.positions, c.differ, strict=True))
    ]
    tables = table_rows(("", "position", *(run.label for run in c.runs)), rows, keys=2).split("\n\n")
    highlighted = (False, *c.differ)  # not the header
    return "\n\n".join(
        "\n".join(
            strong(line) if differs else line
            for line, differs in zip(table.split("\n"), highlighted, strict=True)
        )
        for table in tables
    )


def _latency_table(runs: Sequence[Contestant]) -> str:
    rows: list[tuple[str, ...]] = []
    for device in runs[0].latencies_ms:
        took = [run.latencies_ms[device] for run in runs]
        rows.append((device, *("-" if ms is None else f"{ms:.4g} ms" for ms in took)))
        intervals = [run.intervals.get(device) for run in runs]
        for level in sorted({interval.level for interval in intervals if interval is not None}):
            ends = (i.ends if i is not None and i.level == level else "-" for i in intervals)
            rows.append((f"  {100 * level:g}% interval", *ends))
    return table_rows(("latency", *(run.label for run in runs)), rows)


def accuracy_text(accuracy: float | None, low: float | None, high: float | None) -> str:
    """Format an accuracy with its interval: `86.9% (83.0-90.0)`; a dash if there is none."""
    if accuracy is None:
        return "-"
    interval = f" ({100 * low:.1f}-{100 * high:.1f})" if low is not None and high is not None else ""
    return f"{accuracy:.1%}{interval}"


def trained_elsewhere(trained_px: int, deployed_px: int) -> str:
    """Say that a network is trained at another size than its latencies hold for."""
    return (
        f"the network is trained at {trained_px} px, and its latency is certified at {deployed_px} px only: "
        f"qnas train-subnet --resolution {deployed_px} trains it there"
    )


CLASSES_SHOWN = 5  # those with the lowest accuracy


def _per_image(name: str) -> str:
    """Return what a shipped device of throughput adds to its milliseconds; empty for all others."""
    return load_device(name).per_image if name in device_names() else ""


def describe_training(learned: str, result: Mapping[str, Any], speed: Mapping[str, Any], files: str) -> str:
    """Format the result of a training: `learned`, a summary, then facts of result.json and speed.json."""

    def interval(found: Mapping[str, float]) -> str:
        return f"{found['low']:.2%} to {found['high']:.2%}"

    sure = f"{result['interval_level']:.0%} interval {interval(result['top1'])}"
    if top := result["top5"]:
        sure += f"; top-5 {top['value']:.2%} ({interval(top)})"
    deployed, px = result["deployed"], result["deployed"]["resolution_px"]
    counts = f"{format_count(deployed['macs'])} MACs, {format_count(deployed['params'])} parameters"
    latencies = ", ".join(
        f"{name} {format_ms(found['ms'], round_up=True)} {_per_image(name)}".rstrip()
        for name, found in deployed["latency"].items()
    )
    roomy = columns() >= ROOMY
    worst = sorted((row for row in result["per_class"] if row["images"]), key=lambda row: row["value"])
    rows = [
        [
            shown(row["class"], NAME_SHOWN if roomy else NAME_SHOWN // 2),
            str(row["images"]),
            *(f"{row[key]:.1%}" for key in ("value", "low", "high")),
        ]
        for row in worst[:CLASSES_SHOWN]
    ]
    header = ["class", "images", "accuracy", "from", "to"]
    speed_line = (
        f"{speed['images_per_second']:.0f} images/s here at {speed['resolution_px']} px: batch "
        f"{speed['batch_size']}, {speed['runtime']}, {speed['machine']}, threads {speed['threads']}"
    )
    lines = [field("accuracy", learned), field("", sure)]
    if balanced := balanced_text(result["test_accuracy"], result.get("test_balanced_accuracy")):
        lines.append(field("", balanced))
    if never := never_text(result.get("never_predicted", ()), len(result["classes"])):
        lines.append(field("warning", f"{never}; {BALANCING}"))
    if len(worst) > 1:
        listed = min(CLASSES_SHOWN, len(worst))
        lines.append(field("classes", f"the {listed} least accurate of {len(worst)}; all in result.json"))
        indent = 12 if roomy else 2
        table = table_rows(header, rows, width=columns() - indent)
        lines += [f"{'':{indent}}{line}".rstrip() for line in table.splitlines()]
    if broken := result.get("broken_images"):
        lines.append(field("broken", f"{broken} image{'s' * (broken > 1)} left out: broken.csv"))
    if left_out := result.get("left_out"):
        unused = sum(left_out.values())
        lines.append(field("left out", f"{unused} file{'s' * (unused > 1)}: {LEFT_OUT_FILE}"))
    lines += [
        field("size", f"{counts}, at {px} px"),
        *([field("latency", f"at {px} px: {latencies}")] if latencies else []),
        *(
            [field("warning", trained_elsewhere(result["resolution_px"], px))]
            * (result["resolution_px"] != px)
        ),
        field("speed", speed_line),
        field("files", files),
    ]
    return "\n".join(lines)
