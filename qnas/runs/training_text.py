"""The result of a training as text of at most 80 columns."""

from collections.abc import Mapping
from typing import Any

from qnas.common.units import format_count, format_ms
from qnas.runs.text import field, table_rows

CLASSES_SHOWN = 5  # those of least accuracy


def describe_training(learned: str, result: Mapping[str, Any], speed: Mapping[str, Any], files: str) -> str:
    """Show what a network came to: `learned` in a few words, then the facts of result.json, speed.json."""

    def interval(found: Mapping[str, float]) -> str:
        return f"{found['low']:.2%} to {found['high']:.2%}"

    sure = f"{result['interval_level']:.0%} interval {interval(result['top1'])}"
    if top := result["top5"]:
        sure += f"; top-5 {top['value']:.2%} ({interval(top)})"
    deployed = result["deployed"]
    counts = f"{format_count(deployed['macs'])} MACs, {format_count(deployed['params'])} parameters"
    latencies = ", ".join(
        f"{name} {format_ms(found['ms'], round_up=True)}" for name, found in deployed["latency"].items()
    )
    worst = sorted((row for row in result["per_class"] if row["images"]), key=lambda row: row["value"])
    rows = [
        [str(row["class"])[:30], str(row["images"]), *(f"{row[key]:.1%}" for key in ("value", "low", "high"))]
        for row in worst[:CLASSES_SHOWN]
    ]
    header = ["class", "images", "accuracy", "from", "to"]
    speed_line = (
        f"{speed['images_per_second']:.0f} images/s here at {speed['resolution_px']} px: batch "
        f"{speed['batch_size']}, {speed['runtime']}, {speed['machine']}, threads {speed['threads']}"
    )
    lines = [field("accuracy", learned), field("", sure)]
    if len(worst) > 1:
        shown = min(CLASSES_SHOWN, len(worst))
        lines.append(field("classes", f"the {shown} of {len(worst)} of least accuracy; all in result.json"))
        lines += [f"{'':12}{line}" for line in table_rows(header, rows).splitlines()]
    if broken := result.get("broken_images"):
        lines.append(field("broken", f"{broken} image{'s' * (broken > 1)} left out: broken.csv"))
    lines += [
        field("size", f"{counts}, at {deployed['resolution_px']} px"),
        *([field("latency", latencies)] if latencies else []),
        field("speed", speed_line),
        field("files", files),
    ]
    return "\n".join(lines)
