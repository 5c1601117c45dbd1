"""A latency table: the latency of every candidate at every position of a space, on one device; and its file.

`LatencyTable.latency_ms` is the predicted latency of a network everywhere: the fixed parts plus one cell
for each position. Search, derivation and reports read the same cells. A cell also holds the part of its
latency that is an estimate, so that each printed latency can say which share of it rests on measurements.

The file is a CSV with a row for each position and candidate, and one for each fixed block.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from qnas.common.arguments import quoted
from qnas.common.errors import TableError, abbreviate, one_line
from qnas.common.files import write_text
from qnas.common.reading import LINE_CHARACTERS, csv_rows, read_text
from qnas.common.units import MOST_MS, number_or_nan
from qnas.latency.device import Device
from qnas.latency.intervals import LEVEL, Interval, Uncertainty, known_errors
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import HEAD, all_blocks
from qnas.spaces.space import MOST_CLASSES, SearchSpace

RUNTIME = "runtime"  # the row for the latency of every network besides its kernels
TABLE_BYTES = 16_000_000  # of a file: twice that of the largest space
DECIMALS = 6  # of a millisecond: a nanosecond, so that a written table reads back to equal values


@dataclass(frozen=True)
class Cell:
    """The latency of a block. `estimated_ms` is the part of `latency_ms` that no measurement backs."""

    latency_ms: float
    estimated_ms: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        assert 0 <= self.estimated_ms <= self.latency_ms < math.inf, self


@dataclass(frozen=True)
class LatencyTable:
    """The latencies of a space's networks on a device, in milliseconds."""

    device: str
    space: str
    space_digest: str
    fixed: tuple[tuple[str, Cell], ...]  # the runtime and the fixed blocks, by name, in order
    cells: tuple[tuple[Cell, ...], ...]  # by position and candidate, in the space's order
    margin: float = 0.0  # share by which a measurement may exceed a prediction
    uncertainty: Uncertainty | None = field(default=None, compare=False)  # None: unknown
    # the device that the table was computed from; None where it was read from a run's folder
    origin: Device | None = field(default=None, compare=False, repr=False)

    @cached_property
    def fixed_ms(self) -> float:
        """The latency that every network of the space has besides its candidates."""
        return math.fsum(cell.latency_ms for _, cell in self.fixed)

    @cached_property
    def fixed_estimated_ms(self) -> float:
        """The estimated part of `fixed_ms`."""
        return math.fsum(cell.estimated_ms for _, cell in self.fixed)

    @cached_property
    def ms(self) -> tuple[tuple[float, ...], ...]:
        """The latency of each candidate of each position."""
        return tuple(tuple(cell.latency_ms for cell in row) for row in self.cells)

    @cached_property
    def estimated_ms(self) -> tuple[tuple[float, ...], ...]:
        """The estimated part of `ms`."""
        return tuple(tuple(cell.estimated_ms for cell in row) for row in self.cells)

    def latency_ms(self, arch_indices: Sequence[int]) -> float:
        """Return the predicted latency of the network with these candidate numbers."""
        return math.fsum([self.fixed_ms, *_chosen(self.ms, arch_indices)])

    def coverage(self, arch_indices: Sequence[int]) -> float:
        """Return the share of a network's predicted latency that rests on measurements, 0 to 1."""
        total = self.latency_ms(arch_indices)
        estimated = math.fsum([self.fixed_estimated_ms, *_chosen(self.estimated_ms, arch_indices)])
        return 1.0 - estimated / total if total > 0 else 1.0

    def interval(self, arch_indices: Sequence[int], level: float = LEVEL) -> Interval | None:
        """Return the interval of a network's latency as `Uncertainty.widest` does; None: unknown."""
        if self.uncertainty is None:
            return None
        estimated = math.fsum([self.fixed_estimated_ms, *_chosen(self.estimated_ms, arch_indices)])
        return self.uncertainty.widest(self.latency_ms(arch_indices), estimated, level)

    def upper_ends(self, level: float) -> tuple[float, tuple[tuple[float, ...], ...]]:
        """Return the upper ends of the fixed parts and of each cell; they add up to that of a network.

        Raises TableError without an uncertainty, UsageError where its levels end below this one.
        """
        known = known_errors(self.uncertainty, self.device, level)
        high = known.at(level).high
        rows = (
            tuple(known.end_ms(cell.latency_ms, cell.estimated_ms, high) for cell in row)
            for row in self.cells
        )
        return known.end_ms(self.fixed_ms, self.fixed_estimated_ms, high), tuple(rows)

    def limit_ms(self, budget_ms: float) -> float:
        """Return the highest prediction for which a measurement within the margin meets the budget."""
        return budget_ms / (1.0 + self.margin)

    @property
    def fastest_ms(self) -> float:
        """The latency of the fastest network of the space."""
        return math.fsum([self.fixed_ms, *map(min, self.ms)])

    @property
    def slowest_ms(self) -> float:
        """The latency of the slowest network of the space."""
        return math.fsum([self.fixed_ms, *map(max, self.ms)])

    @cached_property
    def digest(self) -> str:
        """The identity of the table: its values, device and space."""
        fixed = [(name, cell.latency_ms, cell.estimated_ms) for name, cell in self.fixed]
        content = [self.device, self.space_digest, fixed, self.ms, self.estimated_ms, self.margin]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @cached_property
    def copy_digest(self) -> str:
        """The digest of this table as its file reads back: rounded to DECIMALS."""

        def written(cell: Cell) -> Cell:
            return Cell(round(cell.latency_ms, DECIMALS), round(cell.estimated_ms, DECIMALS))

        fixed = tuple((name, written(cell)) for name, cell in self.fixed)
        return replace(self, fixed=fixed, cells=tuple(tuple(map(written, row)) for row in self.cells)).digest


def _chosen(rows: Sequence[Sequence[float]], indices: Sequence[int]) -> list[float]:
    return [row[i] for row, i in zip(rows, indices, strict=True)]


# ---- the file


class _Expected(NamedTuple):
    """A row of a table without its latency: the position, candidate and shape of a block."""

    position: str
    stage: str = ""
    c_in: int | str = ""  # the runtime has no shape: empty
    c_out: int | str = ""
    stride: int | str = ""
    resolution_px: int | str = ""
    candidate: str = ""
    layers: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.position, self.candidate

    @property
    def title(self) -> str:
        return f"{self.position} {self.candidate}".strip()


COLUMNS = (*_Expected._fields[:-1], "latency_ms", "estimated_ms", "source", "layers")


def _expected_rows(space: SearchSpace) -> list[_Expected]:
    """Return the rows of a space's table in the order in which they are written."""
    rows = [_Expected(RUNTIME)]
    for block, candidate in all_blocks(space):
        if block.place is not None:
            shape = (block.place.c_in, block.place.c_out, block.place.stride, block.place.resolution_px)
        else:
            first, last = block.layers[0], block.layers[-1]
            stride = math.prod(layer.stride for layer in block.layers)
            shape = (first.c_in, last.c_out, stride, first.resolution_px)
        stage = block.name.partition(".")[0] if "." in block.name else ""
        name = candidate.name if candidate is not None else ""
        rows.append(_Expected(block.name, stage, *shape, name, describe_layers(block.layers)))
    return rows


def describe_layers(layers: Iterable[LayerSpec]) -> str:
    """Write layers in one line: operator, kernel, stride, and channels where they change.

    >>> describe_layers([LayerSpec("a", "conv", 56, 24, 40, 2, 2), LayerSpec("b", "gelu", 28, 40, 40)])
    'conv-k2-s2-c40 gelu'
    """
    words = []
    for s in layers:
        kernel = f"-k{s.kernel}" if s.kernel > 1 else ""
        stride = f"-s{s.stride}" if s.stride > 1 else ""
        channels = f"-c{s.c_out}" if s.c_out != s.c_in else ""
        words.append(f"{s.op}{kernel}{stride}{channels}")
    return " ".join(words)


def write_table(table: LatencyTable, space: SearchSpace, path: Path) -> None:
    """Write a table as CSV, all of it or nothing."""
    assert table.space_digest == space.digest, (table.space, space.name)
    write_text(path, table_text(table, space))


def table_text(table: LatencyTable, space: SearchSpace) -> str:
    """Return a table as CSV."""
    fixed = dict(table.fixed)
    cells = chain.from_iterable(table.cells)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in _expected_rows(space):
        cell = next(cells) if row.candidate else fixed[row.position]
        latency_ms, estimated_ms = (f"{ms:.{DECIMALS}f}" for ms in (cell.latency_ms, cell.estimated_ms))
        figures = {"latency_ms": latency_ms, "estimated_ms": estimated_ms, "source": cell.source}
        writer.writerow(row._asdict() | figures)
    return text.getvalue()


def read_table(path: Path, space: SearchSpace, *, device: str | None = None) -> LatencyTable:
    """Read a table of this space from CSV. `device` is its device's name, by default the folder's.

    Raises TableError with every problem in one line: rows that are missing, duplicate, unknown or of
    another shape, and values that are no latency.
    """
    text = read_text(path, TableError, f"the latency table of space {space.name}", limit=TABLE_BYTES)
    return parse_table(text, space, where=str(path), device=device or path.parent.name)


def read_own_table(path: Path, space: SearchSpace, *, device: str) -> LatencyTable:
    """Read a table, perhaps of the same space with more classes. Raises TableError as `read_table` does."""
    text = read_text(path, TableError, f"the latency table of space {space.name}", limit=TABLE_BYTES)
    rows = csv_rows(text, str(path), TableError, COLUMNS)
    classes = next((values["c_out"] or "" for _, values in rows if values["position"] == HEAD), "")
    has_more = classes.isdecimal() and space.head.classes < int(classes) <= MOST_CLASSES
    measured = space.with_classes(int(classes)) if has_more else space
    table = parse_table(text, measured, where=str(path), device=device)
    return with_fewer_classes(table, measured, space) or table


def with_fewer_classes(table: LatencyTable, measured: SearchSpace, space: SearchSpace) -> LatencyTable | None:
    """Return the table of a space by that of the same space with at least as many classes; else None.

    The head's latency is kept: it is an upper bound.
    """
    classes = space.head.classes
    if measured.head.classes < classes or measured.with_classes(classes).digest != space.digest:
        return None
    if measured.head.classes == classes:
        return table

    def cell(name: str, given: Cell) -> Cell:
        more = f"{given.source}, with {measured.head.classes} classes".lstrip(", ")
        return replace(given, source=more) if name == HEAD else given

    fixed = tuple((name, cell(name, given)) for name, given in table.fixed)
    return replace(table, fixed=fixed, space_digest=space.digest)


def parse_table(text: str, space: SearchSpace, *, where: str, device: str) -> LatencyTable:
    """Read a table of this space from CSV text. Raises TableError as `read_table` does."""
    rows = csv_rows(text, where, TableError, COLUMNS)
    lines = ((f"line {number}", values) for number, values in rows)
    return table_from_rows(lines, space, where=where, device=device)


def table_from_rows(
    rows: Iterable[tuple[str, Mapping[str, str | None]]],
    space: SearchSpace,
    *,
    where: str,
    device: str,
    default: Mapping[str, Cell] = MappingProxyType({}),
) -> LatencyTable:
    """Return the table of a space from rows, each with its name in messages and its text by column.

    Columns that a row lacks are not checked, except `position`, `candidate` and `latency_ms`. A missing row
    takes its cell from `default`, by the `layers` of its block: "runtime" for the runtime, empty for
    identity. Raises TableError as `read_table` does.
    """
    expected = {row.key: row for row in _expected_rows(space)}
    found: dict[tuple[str, str], Cell] = {}
    problems: list[str] = []
    for number, (line, values) in enumerate(rows):
        key = (values["position"] or "", values["candidate"] or "")
        if number > 2 * len(expected):
            problems.insert(0, f"more than {number} rows, expected {len(expected)}")
            break
        if key not in expected:
            problems.append(f"{line}: {one_line(' '.join(key).strip(), 60)!r} is not in space {space.name}")
        elif key in found:
            problems.append(f"{line}: {expected[key].title} is there twice")
        else:
            problems += [f"{line}: {problem}" for problem in _mismatches(values, expected[key])]
            cell = _read_cell(values)
            if isinstance(cell, str):
                problems.append(f"{line}: {expected[key].title}: {cell}")
            found[key] = cell if isinstance(cell, Cell) else Cell(0.0)
    for key, row in expected.items():
        what = RUNTIME if row.position == RUNTIME else row.layers
        if key not in found and what in default:
            found[key] = default[what]
    missing = [row.title for key, row in expected.items() if key not in found]
    if missing:
        problems.insert(0, f"{len(missing)} of {len(expected)} rows missing: {abbreviate(missing)}")
    if problems:
        raise _refusal(where, space, problems)
    fixed = tuple((row.position, found[key]) for key, row in expected.items() if not row.candidate)
    cells = tuple(tuple(found[p.name, name] for name in p.names) for p in space.positions)
    return LatencyTable(device, space.name, space.digest, fixed, cells)


def _refusal(where: str, space: SearchSpace, problems: Sequence[str]) -> TableError:
    problem = f"not a latency table of space {space.name}: {abbreviate(problems, '; ')}"
    return TableError(f"{where}: {one_line(problem, LINE_CHARACTERS - 2)}")


def _mismatches(values: Mapping[str, str | None], expected: _Expected) -> list[str]:
    """Return how a row's shape differs from the space's, except `stage`, which follows from the position."""
    problems = []
    for column in (c for c in ("c_in", "c_out", "stride", "resolution_px", "layers") if c in values):
        want, got = str(getattr(expected, column)), (values[column] or "").strip()
        if got != want:
            found = one_line(got, 40) if got else "empty"
            problems.append(f"{expected.title}: {column} {found}, expected {want or 'empty'}")
    return problems


def _read_cell(values: Mapping[str, str | None]) -> Cell | str:
    """Return the row's cell, or the problem of its numbers."""
    numbers = []
    for column in (c for c in ("latency_ms", "estimated_ms") if c in values):
        number = number_or_nan(values[column])
        if not 0 <= number <= MOST_MS:
            return f"{column} {quoted(values[column] or 'empty')}, expected milliseconds, 0 to {MOST_MS:g}"
        numbers.append(number)
    latency, estimated = numbers if len(numbers) > 1 else (*numbers, 0.0)
    if estimated > latency:
        return f"estimated_ms {estimated:g} is above latency_ms {latency:g}"
    return Cell(latency, estimated, values.get("source") or "")
