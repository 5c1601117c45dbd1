"""Measured networks of a space: the CSV that `qnas sample` writes, to be filled with latencies.

A row is a network: its name, the candidate of every position, and its latency in milliseconds, empty
until it is measured. `p95_ms` and `runtime` (its name and version) may stay empty or be left out;
other columns are ignored.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qnas.common.arguments import quoted
from qnas.common.errors import ArchError, TableError, abbreviate
from qnas.common.files import write_text
from qnas.common.reading import csv_rows, read_text
from qnas.common.units import LEAST_MS, MOST_MS, number_or_nan
from qnas.latency.table import TABLE_BYTES
from qnas.spaces.arch import Arch, make_arch
from qnas.spaces.space import SearchSpace

COLUMNS = ("name", "choices", "latency_ms", "p95_ms", "runtime")
MOST_PROBLEMS = 100  # after which a file is read no further
REQUIRED = ("name", "choices", "latency_ms")


@dataclass(frozen=True)
class Measured:
    """A network and its latency; None where it was not measured."""

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

    Raises TableError with every problem in one line: missing columns, duplicate names,
    choices that are not of the space, and times that are not above 0.
    """
    text = read_text(path, TableError, "the CSV that qnas sample writes", limit=TABLE_BYTES)
    found: dict[str, Measured] = {}
    problems: list[str] = []
    for line, row in csv_rows(text, str(path), TableError, REQUIRED, form=",".join(COLUMNS)):
        values = {key: row.get(key, "").strip() for key in COLUMNS}
        network, wrong = _read_row(values, space)
        if values["name"] in found:
            wrong.append(f"name: {quoted(values['name'])} is there twice")
        problems += [f"line {line}, {problem}" for problem in wrong]
        if len(problems) > MOST_PROBLEMS:
            break
        if network is not None:
            found[values["name"]] = network
    if not found and not problems:
        problems.append("no networks in it")
    if problems:
        raise TableError(f"{path}: {abbreviate(problems, '; ')}")
    return tuple(found.values())


def measured_only(networks: Sequence[Measured], where: Path) -> tuple[Measured, ...]:
    """Return the networks, all of which must be measured.

    Raises TableError where some are not: leaving out networks that were too slow to measure would bias
    the fit, so only the user deletes such rows.
    """
    missing = [network.name for network in networks if network.latency_ms is None]
    if missing:
        raise TableError(
            f"{where}, latency_ms: empty for {abbreviate(missing, most=3)}: fill in {len(missing)} of "
            f"{len(networks)} (qnas measure does it on this machine), or delete these rows"
        )
    return tuple(networks)


def one_runtime(networks: Iterable[Measured], where: Path) -> str:
    """Return the runtime of the networks, empty where none is given. Raises TableError for several."""
    named = {network.runtime for network in networks}
    if len(named) > 1:
        words = " and ".join(quoted(name) for name in sorted(named)[:2])
        raise TableError(
            f"{where}, runtime: {words}: expected one for all networks, since times are compared"
        )
    return named.pop() if named else ""


def _read_row(values: dict[str, str], space: SearchSpace) -> tuple[Measured | None, list[str]]:
    """Return a row's network, or its problems, each with its column first."""
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
        times[column] = time = number_or_nan(values[column]) if values[column] else None
        if time is not None and not LEAST_MS <= time <= MOST_MS:
            problems.append(f"{column}: {quoted(values[column])}, expected milliseconds above 0 or nothing")
    if problems or arch is None:
        return None, problems
    return Measured(values["name"], arch, **times, runtime=values["runtime"]), []
