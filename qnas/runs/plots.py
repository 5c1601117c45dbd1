"""Figures of a run as PNG files. matplotlib is imported when a figure is drawn."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnas.common.files import write_bytes
from qnas.runs.metrics import OF_LIMIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_APART = 1.3  # times the latency of the last public network that was named
UNSETTLED = 0.03  # share of the limit: at the end, an expected amount should not be further away


def draw_budget(rows: Sequence[dict[str, Any]], path: Path, *, multiplier_bound: float) -> None:
    """Draw how the expected amounts approach their limits over the steps, as a PNG.

    There are three panels: each expected amount divided by its limit, with the band of UNSETTLED; the
    multiplier with its bounds; and the temperature. Only rows of architecture steps are drawn. Without any,
    no file is written.
    """
    rows = [row for row in rows if "multiplier" in row]
    if not rows:
        return
    from matplotlib.figure import Figure  # not pyplot, which keeps state and looks for a display

    figure = Figure(figsize=(8, 7), layout="constrained")
    amounts, multiplier, temperature = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 1])
    steps = [row["step"] for row in rows]
    amounts.axhspan(1 - UNSETTLED, 1 + UNSETTLED, color="0.9", label=f"within {UNSETTLED:.0%}")
    for key in rows[-1]:
        if key.startswith(OF_LIMIT):
            amounts.plot(steps, [row[key] for row in rows], label=key.removeprefix(OF_LIMIT))
    amounts.axhline(1, color="0.5", linewidth=0.8)
    amounts.set_ylabel("expected amount / limit")
    amounts.legend()
    multiplier.plot(steps, [row["multiplier"] for row in rows], color="C3")
    for bound in (-multiplier_bound, multiplier_bound):
        multiplier.axhline(bound, color="0.5", linewidth=0.8, linestyle=":")
    multiplier.set_ylabel("multiplier")
    temperature.plot(steps, [row["temperature"] for row in rows], color="C2")
    temperature.set_ylabel("temperature")
    temperature.set_ylim(bottom=0)
    temperature.set_xlabel("step")
    _write_png(figure, path)


def draw_fronts(document: dict[str, Any], path: Path) -> None:
    """Draw the points of a pareto.json as a PNG, accuracy over latency, with one panel per device.

    Small points are not on the front; hollow points are far from what was searched for. If networks were not
    ranked on images, the score replaces the accuracy. Public networks have panels of their own below, since
    their accuracy is on ImageNet.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

    devices = document["devices"]
    rows = 2 if any(front.get("public") for front in devices) else 1
    figure = Figure(figsize=(2 + 3.8 * len(devices), 4.6 + 2.4 * (rows - 1)), layout="constrained")
    ranked = document["ranked"]
    panels = figure.subplots(rows, len(devices), squeeze=False, sharex="col", height_ratios=[3, 2][:rows])
    for axes, front in zip(panels[0], devices, strict=True):
        points = front["points"]
        value = "heldout_accuracy" if ranked else "score"
        low, high = front["trusted_ms"]
        ends = (front["fastest_ms"], front["slowest_ms"])
        band = min(max(low, ends[0]), ends[1]), ends[1] if high is None else max(min(high, ends[1]), ends[0])
        axes.axvspan(*band, color="0.93", label="budgets near the searched one")
        if front["own_budget_ms"] is not None:
            axes.axvline(front["own_budget_ms"], color="0.4", linestyle=":", label="the searched budget")
        best = [point for point in points if point["on_front"]]
        axes.step([p["latency_ms"] for p in best], [p[value] for p in best], where="post", color="C0", lw=1)
        for far, face in ((False, "C0"), (True, "none")):
            shown = [point for point in points if point["far"] is far]
            axes.scatter(
                [point["latency_ms"] for point in shown],
                [point[value] for point in shown],
                s=[36 if point["on_front"] else 12 for point in shown],
                facecolors=face,
                edgecolors="C0",
                zorder=3,
                label=("far from it" if far else "the best within a budget") if shown else None,
            )
        if ranked:
            if front["own_accuracy"] is not None:
                own = (front["own_latency_ms"], front["own_accuracy"])
                axes.scatter(*own, marker="*", s=110, color="C3", zorder=4, label="derived by the search")
            for point in points:
                error = (point["heldout_low"], point["heldout_high"])
                axes.plot([point["latency_ms"]] * 2, error, color="C0", lw=0.6, alpha=0.5)
        axes.set_xscale("log")
        round_ms = (1, 2, 5) if ends[1] > 5 * ends[0] else range(1, 10)
        axes.xaxis.set_major_locator(LogLocator(subs=tuple(round_ms)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        if ranked:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(front["device"])
    for axes, front in zip(panels[1] if rows > 1 else (), devices, strict=rows > 1):
        _draw_public(axes, front)
    for axes in panels[-1]:
        axes.set_xlabel("latency, ms")
    figure.axes[0].set_ylabel("accuracy on held-out images" if ranked else "score")
    handles = {
        label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize="small")
    _write_png(figure, path)


def _draw_public(axes: "Axes", front: dict[str, Any]) -> None:
    """Draw the public networks of a device, named where there is room."""
    from matplotlib.ticker import PercentFormatter

    points = front.get("public") or []
    ms, top1 = ([point[key] for point in points] for key in ("latency_ms", "imagenet_top1"))
    axes.step(ms, top1, where="post", color="C1", lw=1)
    axes.scatter(ms, top1, s=16, color="C1", label="public networks, on ImageNet" if points else None)
    if front["own_budget_ms"] is not None:
        axes.axvline(front["own_budget_ms"], color="0.4", linestyle=":")
    axes.margins(y=0.15)  # room for the names
    named_ms = 0.0
    for point in points:
        if point["latency_ms"] >= NAMED_APART * named_ms:
            named_ms = point["latency_ms"]
            is_left = named_ms**2 < front["fastest_ms"] * front["slowest_ms"]
            axes.annotate(
                point["name"],
                (named_ms, point["imagenet_top1"]),
                xytext=(5, -3) if is_left else (-5, 3),  # beside the steps, which rise to the right
                textcoords="offset points",
                fontsize=6,
                ha="left" if is_left else "right",
                va="top" if is_left else "bottom",
            )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("ImageNet top-1")


def _write_png(figure: "Figure", path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes(path, image.getvalue())
