"""Measured networks of a space: the CSV that `qnas sample` writes, to be filled with latencies.

A row is a network: its name, the candidate of every position, and its latency in milliseconds, empty
until it is measured. `p95_ms` and `runtime` (its name and version) may stay empty or be left out;
other columns are ignored.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qnas.common.errors import ArchError, TableError
from qnas.common.files import write_text
from qnas.spaces.arch import Arch, make_arch
from qnas.spaces.space import SearchSpace

COLUMNS = ("name", "choices", "latency_ms", "p95_ms", "runtime")
REQUIRED = ("name", "choices", "latency_ms")
_SHOWN = 5  # problems of a file that are told


@dataclass(frozen=True)
class Measured:
    """A network and what it took; None where it was not measured."""

    name: str
    arch: Arch
    latency_ms: float | None = None
    p95_ms: float | None = None
    runtime: str = ""


def write_measured(path: Path, networks: Iterable[Measured]) -> None:
    """Write networks as CSV, all of it or nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for network in networks:
        choices = " ".join(network.arch.choices)
        times = (network.latency_ms, network.p95_ms)
        shown = ("" if time is None else f"{time:.6g}" for time in times)
        writer.writerow([network.name, choices, *shown, network.runtime])
    write_text(path, text.getvalue())


def read_measured(path: Path, space: SearchSpace) -> tuple[Measured, ...]:
    """Read networks of a space from CSV.

    Raises TableError with every problem in one line: columns that are missing, names there twice,
    choices that are not of the space, and times that are no milliseconds above 0.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a mark before the first column
    except (FileNotFoundError, IsADirectoryError):
        raise TableError(f"{path}: no such file, expected the CSV that qnas sample writes") from None
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not a text file in UTF-8") from error
    reader = csv.DictReader(io.StringIO(text))
    lacking = [column for column in REQUIRED if column not in (reader.fieldnames or ())]
    if lacking:
        raise TableError(f"{path}: columns missing: {', '.join(lacking)}; expected {','.join(COLUMNS)}")
    found: dict[str, Measured] = {}
    problems = []
    for row in reader:
        values = {key: (row.get(key) or "").strip() for key in COLUMNS}
        read = _read_row(values, space)
        problems += [f"line {reader.line_num}, {problem}" for problem in read.problems]
        if values["name"] in found:
            problems.append(f"line {reader.line_num}, name: {values['name']!r} is there twice")
        if read.network is not None:
            found[values["name"]] = read.network
    if not found and not problems:
        problems.append("no networks in it")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise TableError(f"{path}: {'; '.join(problems[:_SHOWN])}{more}")
    return tuple(found.values())


def measured_only(networks: Sequence[Measured], where: Path) -> tuple[Measured, ...]:
    """Return the networks, all of which must be measured.

    Raises TableError where some are not: to leave out what was too slow to measure would bend the fit,
    so it is the user who deletes such rows.
    """
    missing = [network.name for network in networks if network.latency_ms is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise TableError(
            f"{where}, latency_ms: empty for {', '.join(missing[:3])}{more}: fill in {len(missing)} of "
            f"{len(networks)} (qnas measure does it on this machine), or delete these rows"
        )
    return tuple(networks)


def one_runtime(networks: Iterable[Measured], where: Path) -> str:
    """Return what ran the networks, empty where it is not said. Raises TableError where it was not one."""
    named = {network.runtime for network in networks}
    if len(named) > 1:
        words = " and ".join(repr(name) for name in sorted(named)[:2])
        raise TableError(
            f"{where}, runtime: {words}: expected one for all networks, since times are compared"
        )
    return named.pop() if named else ""


@dataclass(frozen=True)
class _Row:
    network: Measured | None
    problems: list[str]


def _read_row(values: dict[str, str], space: SearchSpace) -> _Row:
    """Return a row's network, or what is wrong with it, the column first."""
    problems = []
    if not values["name"]:
        problems.append("name: empty")
    arch = None
    try:
        arch = make_arch(space, tuple(values["choices"].split()), "choices")
    except ArchError as error:
        problems.append(str(error))
    times: dict[str, float | None] = {}
    for column in ("latency_ms", "p95_ms"):
        try:
            times[column] = float(values[column]) if values[column] else None
        except ValueError:
            times[column] = math.nan
        time = times[column]
        if time is not None and not 0 < time < math.inf:
            problems.append(f"{column}: {values[column]!r}, expected milliseconds above 0 or nothing")
    if problems or arch is None:
        return _Row(None, problems)
    return _Row(Measured(values["name"], arch, **times, runtime=values["runtime"]), [])
