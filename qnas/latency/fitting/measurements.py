"""Measured networks of a space: the CSV that `qnas sample` writes, to be filled with latencies.

A row is a network: its name, the candidate of every position, and its latency in milliseconds, empty
until it is measured. `p95_ms`, `runtime` (its name and version), and `format` and `precision` of the files
that were timed may stay empty or be left out; other columns are ignored.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from qnas.common.arguments import quoted
from qnas.common.errors import ArchError, TableError, UsageError, abbreviate, nearest
from qnas.common.files import write_text
from qnas.common.reading import csv_rows, read_text
from qnas.common.units import LEAST_MS, MOST_MS, number_or_nan
from qnas.latency.device import FilePrecision
from qnas.latency.table import TABLE_BYTES
from qnas.spaces.arch import Arch, make_arch
from qnas.spaces.space import SearchSpace

COLUMNS = ("name", "choices", "latency_ms", "p95_ms", "runtime", "format", "precision")
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
    format: str = ""  # of the file that was timed
    precision: str = ""


def write_measured(path: Path, networks: Iterable[Measured]) -> None:
    """Write networks as CSV, all of it or nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for network in networks:
        choices = " ".join(network.arch.choices)
        times = (network.latency_ms, network.p95_ms)
        shown = ("" if time is None else f"{time:.6g}" for time in times)
        told = (network.runtime, network.format, network.precision)
        writer.writerow([network.name, choices, *shown, *told])
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


Told = Literal["runtime", "format", "precision"]


def the_one(told: Told, networks: Iterable[Measured], where: Path) -> str:
    """Return what all rows say in a column, empty where they say nothing. Raises TableError for several."""
    named = {getattr(network, told) for network in networks}
    if len(named) > 1:
        words = " and ".join(quoted(name) for name in sorted(named)[:2])
        raise TableError(f"{where}, {told}: {words}: expected one for all networks, since times are compared")
    return named.pop() if named else ""


def file_precision(given: str | None, networks: Sequence[Measured], where: Path) -> FilePrecision:
    """Return the precision of the files that were timed: that of the rows, else the given one, else fp32.

    Raises UsageError for an unknown one, and where rows and `given` differ; TableError where rows differ.
    """
    if given is not None and given not in get_args(FilePrecision):
        raise UsageError(f"`precision={given!r}`: {nearest(given, get_args(FilePrecision))}")
    named = the_one("precision", networks, where)
    if given is not None and named not in ("", given):
        raise UsageError(f"`precision={given}`: {where} has times of files in {named}")
    return cast(FilePrecision, named or given or "fp32")


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
    if values["precision"] not in ("", *get_args(FilePrecision)):
        known = nearest(values["precision"], get_args(FilePrecision))
        problems.append(f"precision: {quoted(values['precision'])}: {known}")
    if problems or arch is None:
        return None, problems
    told = (values["runtime"], values["format"], values["precision"])
    return Measured(values["name"], arch, times["latency_ms"], times["p95_ms"], *told), []
