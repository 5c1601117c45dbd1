"""The format of numbers on the page, and the rows of a run's metrics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qnas.common.files import naming
from qnas.common.units import format_count, format_ms

FORMS: dict[str, Callable[[Any], str]] = {
    "ms": format_ms,
    "ms up": lambda value: format_ms(value, round_up=True),
    "percent": lambda value: f"{value:.1%}",
    "percent2": lambda value: f"{value:.2%}",
    "count": format_count,
    "whole": lambda value: f"{value:,}",
    "nats": lambda value: f"{value:.3f}",
    "text": str,
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all whole rows of a metrics.jsonl, which may be written to; none where there is no such file."""
    if not path.is_file():
        return []
    with naming(path), path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
