"""Latencies, budgets and counts as people write them: `30ms`, `800us`, `312M`."""

import math
import re
from typing import Any

from qnas.common.errors import UsageError

COUNT_OF_SUFFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
# No latency of a file is outside these, so that sums, products and ratios of latencies stay finite.
LEAST_MS, MOST_MS = 1e-9, 1e9
MS_PER_UNIT = {"us": 1e-3, "ms": 1.0, "s": 1e3}
MJ_PER_UNIT = {"uJ": 1e-3, "mJ": 1.0, "J": 1e3}
RATES = ("img/s", "images/s")
_FORM = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-zµμ/]*)\s*")


def is_rate(text: str) -> bool:
    """Return whether a budget is one of images per second: `5000img/s`."""
    match = _FORM.fullmatch(text)
    return match is not None and match[2] in RATES


def parse_latency(text: str) -> float:
    """Return the milliseconds of a latency with a unit, or those for an image at a rate of images per second.

    Raises UsageError, with the fix, when the unit is missing or unknown or the value not positive.

    >>> parse_latency("800us"), parse_latency("5000img/s")
    (0.8, 0.2)
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(f"budget {text!r}: expected a number with a unit, such as 30ms, 800us or 0.03s")
    number, unit = match.groups()
    if not unit:
        raise UsageError(f"budget {text!r} has no unit: write {number}ms, {number}us or {number}s")
    unit = unit.replace("µ", "u").replace("μ", "u")
    if unit not in (*MS_PER_UNIT, *RATES):
        raise UsageError(
            f"budget {text!r}: unknown unit {unit!r}, expected us, ms or s, or img/s of a throughput device"
        )
    if unit in MS_PER_UNIT:
        latency_ms = float(number) * MS_PER_UNIT[unit]
    else:
        latency_ms = 1e3 / float(number) if float(number) else math.inf
    if not math.isfinite(latency_ms) or latency_ms <= 0:
        raise UsageError(f"budget {text!r}: expected a latency above zero")
    return latency_ms


def parse_energy(text: str, name: str = "`max_energy`") -> float:
    """Return the millijoules of an energy with a unit; `name` says where it was given.

    Raises UsageError, with the fix, when the unit is missing or unknown or the value not positive.

    >>> parse_energy("0.03J")
    30.0
    """
    match = _FORM.fullmatch(text)
    number, unit = match.groups() if match else ("", "?")
    unit = unit.replace("µ", "u").replace("μ", "u")
    if unit not in MJ_PER_UNIT:
        raise UsageError(f"{name} {text!r}: expected an energy with its unit, such as 30mJ, 800uJ or 0.03J")
    energy_mj = float(number) * MJ_PER_UNIT[unit]
    if not math.isfinite(energy_mj) or energy_mj <= 0:
        raise UsageError(f"{name} {text!r}: expected an energy above zero")
    return energy_mj


def number_or_nan(value: Any) -> float:
    """Return a value or a text as a number; NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def parse_count(text: str, name: str) -> float:
    """Return the number of a count of parameters or MACs; `name` says where it was given.

    Raises UsageError, with the fix, unless it is a number above zero, alone or with K, M, G or B.

    >>> parse_count("2.5M", "`max_params`")
    2500000.0
    """
    match = _FORM.fullmatch(text)
    number, suffix = match.groups() if match else ("", "?")
    if suffix.upper() not in COUNT_OF_SUFFIX:
        raise UsageError(f"{name} {text!r}: expected a number, such as 2.5M, 300M or 1.2G")
    count = float(number) * COUNT_OF_SUFFIX[suffix.upper()]
    if not math.isfinite(count) or count <= 0:
        raise UsageError(f"{name} {text!r}: expected a count above zero")
    return count


def format_ms(latency_ms: float, *, round_up: bool = False) -> str:
    """Write milliseconds with four digits; with `round_up` never less than the value.

    >>> format_ms(29.98765), format_ms(0.8)
    ('29.99 ms', '0.8000 ms')
    """
    return f"{_four_digits(latency_ms, round_up)} ms"


def format_mj(energy_mj: float, *, round_up: bool = False) -> str:
    """Write millijoules with four digits; with `round_up` never less than the value.

    >>> format_mj(29.98765)
    '29.99 mJ'
    """
    return f"{_four_digits(energy_mj, round_up)} mJ"


def format_per_image(latency_ms: float, *, round_up: bool = False) -> str:
    """Write the milliseconds of an image, and the images per second that they are.

    >>> format_per_image(0.2)
    '0.2000 ms an image (5,000 img/s)'
    """
    return f"{format_ms(latency_ms, round_up=round_up)} an image ({format_rate(latency_ms)})"


def format_rate(latency_ms: float) -> str:
    """Write the images per second of an image's milliseconds.

    >>> format_rate(0.08), format_rate(30.0)
    ('12,500 img/s', '33.33 img/s')
    """
    rate = 1e3 / latency_ms if latency_ms else math.inf
    return f"{rate:,.0f} img/s" if rate >= 1000 else f"{rate:.4g} img/s"


def _four_digits(value: float, round_up: bool) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    scale = 10.0**digits
    text = f"{value:.{digits}f}"
    if round_up and float(text) < value:
        text = f"{float(text) + 1 / scale:.{digits}f}"
    return text


def format_count(count: float) -> str:
    """Write a number of parameters or MACs with three digits: `312M`.

    >>> format_count(2899631104), format_count(16255912), format_count(999)
    ('2.90G', '16.3M', '999')
    """
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= 0.9995 * scale:
            value = count / scale
            return f"{value:.{max(0, 2 - math.floor(math.log10(value) + 1e-9))}f}{suffix}"
    return f"{count:.0f}"
