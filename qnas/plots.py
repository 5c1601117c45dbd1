"""What a run's figures look like, as PNG files; matplotlib is imported when one is drawn."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qnas.files import naming, write_bytes
from qnas.watch import UNSETTLED

OF_LIMIT = "of_limit_"  # the start of the keys that hold an expected amount over its limit


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl that an architecture step wrote."""
    with naming(metrics), metrics.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if "multiplier" in row]


def draw_budget(rows: Sequence[dict[str, Any]], path: Path, *, multiplier_bound: float) -> None:
    """Draw how the expected amounts came to their limits, over the steps, as a PNG.

    Three panels: each expected amount over its limit, with the band of the watch's tolerance; the
    multiplier with its bounds; the temperature. Nothing is drawn where there are no rows.
    """
    if not rows:
        return
    # not pyplot, which keeps state and looks for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    canvas = FigureCanvasAgg(figure)
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
    image = io.BytesIO()
    canvas.print_png(image)  # type: ignore[no-untyped-call]  # matplotlib leaves it untyped
    write_bytes(path, image.getvalue())
