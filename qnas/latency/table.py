"""The latency of every candidate at every position of a space, on one device.

A predicted latency is what `LatencyTable.latency_ms` says, everywhere: the fixed parts plus one cell
for each position. Searching, deriving and reporting read the same cells. A cell carries how much of
it is an estimate, so that every printed latency can say what share of it rests on measurements.

As CSV a table has one row for each position and candidate, and one for each fixed block.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources.abc import Traversable
from pathlib import Path

from qnas.common.errors import TableError
from qnas.common.files import write_text
from qnas.common.resources import stems
from qnas.latency.device import Device
from qnas.latency.kernels import Kernel, fuse
from qnas.spaces.layer import LayerSpec
from qnas.spaces.lower import BlockSpec, Slot, fill, skeleton
from qnas.spaces.space import Candidate, SearchSpace, load_space

COLUMNS = (
    "position",
    "stage",
    "c_in",
    "c_out",
    "stride",
    "resolution_px",
    "candidate",
    "latency_ms",
    "estimated_ms",
    "source",
    "layers",
)
RUNTIME = "runtime"  # the row of what every network takes besides its kernels
DECIMALS = 6  # of a millisecond: a nanosecond, so that a written table reads back to equal values


@dataclass(frozen=True)
class Cell:
    """What a block takes. `estimated_ms` is the part of `latency_ms` that no measurement backs."""

    latency_ms: float
    estimated_ms: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        assert 0 <= self.estimated_ms <= self.latency_ms < math.inf, self


@dataclass(frozen=True)
class LatencyTable:
    """What the networks of a space take on a device, in milliseconds."""

    device: str
    space: str
    space_digest: str
    fixed: tuple[tuple[str, Cell], ...]  # the runtime and the fixed blocks, by name, in order
    cells: tuple[tuple[Cell, ...], ...]  # by position and candidate, in the space's order
    margin: float = 0.0  # share of a prediction that a measurement may lie above it

    @cached_property
    def fixed_ms(self) -> float:
        """What every network of the space takes besides its candidates."""
        return math.fsum(cell.latency_ms for _, cell in self.fixed)

    @cached_property
    def fixed_estimated_ms(self) -> float:
        """The estimated part of `fixed_ms`."""
        return math.fsum(cell.estimated_ms for _, cell in self.fixed)

    @cached_property
    def ms(self) -> tuple[tuple[float, ...], ...]:
        """What each candidate of each position takes."""
        return tuple(tuple(cell.latency_ms for cell in row) for row in self.cells)

    @cached_property
    def estimated_ms(self) -> tuple[tuple[float, ...], ...]:
        """The estimated part of `ms`."""
        return tuple(tuple(cell.estimated_ms for cell in row) for row in self.cells)

    def latency_ms(self, arch_indices: Sequence[int]) -> float:
        """Return the predicted latency of the network with these candidates' numbers."""
        return math.fsum([self.fixed_ms, *_chosen(self.ms, arch_indices)])

    def coverage(self, arch_indices: Sequence[int]) -> float:
        """Return the share of a network's predicted latency that rests on measurements, 0 to 1."""
        total = self.latency_ms(arch_indices)
        estimated = math.fsum([self.fixed_estimated_ms, *_chosen(self.estimated_ms, arch_indices)])
        return 1.0 - estimated / total if total > 0 else 1.0

    def limit_ms(self, budget_ms: float) -> float:
        """Return what a prediction may be so that a measurement within the margin meets the budget."""
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
        """Identify the values of the table and what they are for."""
        fixed = [(name, cell.latency_ms, cell.estimated_ms) for name, cell in self.fixed]
        content = [self.device, self.space_digest, fixed, self.ms, self.estimated_ms, self.margin]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _chosen(rows: Sequence[Sequence[float]], indices: Sequence[int]) -> list[float]:
    return [row[i] for row, i in zip(rows, indices, strict=True)]


@dataclass(frozen=True)
class KernelRow:
    """A kernel of a network with its predicted latency; `kind` is measured, fitted or estimated."""

    block: str
    kernel: Kernel
    latency_ms: float
    kind: str


def predict_blocks(device: Device, blocks: Iterable[BlockSpec]) -> tuple[KernelRow, ...]:
    """Return what the kernels of these blocks take by the device's model, at whatever resolution.

    A network takes the sum of them and `device.network_ms`. Raises TableError where the model lacks
    a kind of kernel, or the device a model.
    """
    return tuple(
        KernelRow(block.name, kernel, device.kernel_ms(kernel), device.kernel_model(kernel).kind)
        for block in blocks
        for kernel in fuse(block.layers, device.fusion)
    )


def compute_table(device: Device, space: SearchSpace) -> LatencyTable:
    """Return the table of a space's deployed networks by the device's model.

    Raises TableError where the model lacks a kind of kernel, or the device a model.
    """
    fixed = [(RUNTIME, Cell(round(device.network_ms, DECIMALS), 0.0, _runtime_source(device)))]
    cells = []
    known: dict[tuple[int, int, int, int, Candidate], Cell] = {}  # positions of a stage are alike
    for part in skeleton(space):
        if isinstance(part, BlockSpec):
            fixed.append((part.name, _cell(device, part)))
            continue
        row = []
        for candidate in part.position.candidates:
            p = part.position
            key = (p.c_in, p.c_out, p.stride, part.resolution_px, candidate)
            if key not in known:
                known[key] = _cell(device, fill(space, part, candidate))
            row.append(known[key])
        cells.append(tuple(row))
    return LatencyTable(
        device.name, space.name, space.digest, tuple(fixed), tuple(cells), margin=device.margin
    )


def _cell(device: Device, block: BlockSpec) -> Cell:
    rows = predict_blocks(device, [block])
    latency = round(math.fsum(row.latency_ms for row in rows), DECIMALS)
    estimated = round(math.fsum(row.latency_ms for row in rows if row.kind == "estimated"), DECIMALS)
    return Cell(latency, min(estimated, latency), _source(rows))


def _source(rows: Sequence[KernelRow]) -> str:
    if not rows:
        return "no operator"
    by_kind: dict[str, list[str]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(row.kernel.kind)
    return "; ".join(
        f"{kind}: {' '.join(dict.fromkeys(by_kind[kind]))}" for kind in sorted(by_kind, reverse=True)
    )


def _runtime_source(device: Device) -> str:
    return f"{device.kind}: what every network takes besides its kernels"


@dataclass(frozen=True)
class _Expected:
    """What a row of a table must say of its block: everything but the latency."""

    position: str
    stage: str
    c_in: int | str  # the runtime has no shape: empty
    c_out: int | str
    stride: int | str
    resolution_px: int | str
    candidate: str
    layers: str

    @property
    def key(self) -> tuple[str, str]:
        return self.position, self.candidate

    @property
    def title(self) -> str:
        return f"{self.position} {self.candidate}".strip()


def _expected_rows(space: SearchSpace) -> list[_Expected]:
    """Return the rows of a space's table in the order in which they are written."""
    rows = [_Expected(RUNTIME, "", "", "", "", "", "", "")]
    for part in skeleton(space):
        if isinstance(part, Slot):
            p = part.position
            for candidate in p.candidates:
                layers = describe_layers(fill(space, part, candidate).layers)
                shape = (p.c_in, p.c_out, p.stride, part.resolution_px)
                rows.append(_Expected(p.name, str(p.stage + 1), *shape, candidate.name, layers))
        else:
            first, last = part.layers[0], part.layers[-1]
            stride = math.prod(layer.stride for layer in part.layers)
            shape = (first.c_in, last.c_out, stride, first.resolution_px)
            stage = part.name.partition(".")[0] if part.kind == "transition" else ""
            rows.append(_Expected(part.name, stage, *shape, "", describe_layers(part.layers)))
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
    by_key = {
        (position.name, name): cell
        for position, row in zip(space.positions, table.cells, strict=True)
        for name, cell in zip(position.names, row, strict=True)
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in _expected_rows(space):
        cell = by_key[row.key] if row.candidate else fixed[row.position]
        values = {
            **vars(row),
            "latency_ms": f"{cell.latency_ms:.{DECIMALS}f}",
            "estimated_ms": f"{cell.estimated_ms:.{DECIMALS}f}",
            "source": cell.source,
        }
        writer.writerow([values[column] for column in COLUMNS])
    return text.getvalue()


def read_table(path: Path, space: SearchSpace, *, device: str | None = None) -> LatencyTable:
    """Read a table of this space from CSV. `device` is its device's name, else that of the folder.

    Raises TableError with every problem in one line: rows that are missing, there twice, of another
    shape or unknown, and values that are no latency.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise TableError(f"{path}: no such file, expected the latency table of space {space.name}") from None
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not a text file in UTF-8") from error
    return parse_table(text, space, where=str(path), device=device or path.parent.name)


def parse_table(text: str, space: SearchSpace, *, where: str, device: str) -> LatencyTable:
    """Read a table of this space from CSV text. Raises TableError as `read_table` does."""
    reader = csv.DictReader(io.StringIO(text))
    header = tuple(reader.fieldnames or ())
    lacking = [column for column in COLUMNS if column not in header]
    if lacking:
        raise TableError(f"{where}: columns missing: {', '.join(lacking)}; expected {','.join(COLUMNS)}")
    expected = {row.key: row for row in _expected_rows(space)}
    found: dict[tuple[str, str], Cell] = {}
    problems = []
    for values in reader:
        line = f"line {reader.line_num}"
        key = (values["position"] or "", values["candidate"] or "")
        if key not in expected:
            problems.append(f"{line}: {' '.join(key).strip()!r} is not in space {space.name}")
        elif key in found:
            problems.append(f"{line}: {expected[key].title} is there twice")
        else:
            problems += [f"{line}: {problem}" for problem in _mismatches(values, expected[key])]
            cell = _read_cell(values)
            if isinstance(cell, str):
                problems.append(f"{line}: {expected[key].title}: {cell}")
            found[key] = cell if isinstance(cell, Cell) else Cell(0.0)
    missing = [row.title for key, row in expected.items() if key not in found]
    if missing:
        problems.insert(0, f"{len(missing)} of {len(expected)} rows missing: {_abbreviate(missing)}")
    if problems:
        raise TableError(f"{where}: not a latency table of space {space.name}: {_abbreviate(problems, '; ')}")
    fixed = tuple((row.position, found[key]) for key, row in expected.items() if not row.candidate)
    cells = tuple(tuple(found[p.name, name] for name in p.names) for p in space.positions)
    return LatencyTable(device, space.name, space.digest, fixed, cells)


def _abbreviate(items: Sequence[str], between: str = ", ", limit: int = 5) -> str:
    more = f"{between}and {len(items) - limit} more" if len(items) > limit else ""
    return between.join(items[:limit]) + more


def _mismatches(values: dict[str, str | None], expected: _Expected) -> list[str]:
    """Return how a row's shape differs from that of the space, `stage` apart, which says nothing new."""
    problems = []
    for column in ("c_in", "c_out", "stride", "resolution_px", "layers"):
        want, got = str(getattr(expected, column)), (values[column] or "").strip()
        if got != want:
            problems.append(f"{expected.title}: {column} {got or 'empty'}, expected {want or 'empty'}")
    return problems


def _read_cell(values: dict[str, str | None]) -> Cell | str:
    """Return the row's cell, or what is wrong with its numbers."""
    numbers = []
    for column in ("latency_ms", "estimated_ms"):
        try:
            number = float(values[column] or "")
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            return f"{column} {values[column] or 'empty'!r}, expected milliseconds at or above 0"
        numbers.append(number)
    latency, estimated = numbers
    if estimated > latency:
        return f"estimated_ms {estimated:g} is above latency_ms {latency:g}"
    return Cell(latency, estimated, values["source"] or "")


def load_table(device: Device, space: SearchSpace) -> LatencyTable:
    """Return the table of a space on a device: from its CSV, else from the device's model.

    A shipped table is for the shipped space of its name; for another space of that name it is
    passed over. A table beside a device of one's own must fit the space. Raises TableError where it
    does not, and where there is neither table nor model.
    """
    file = _table_file(device, space)
    if file is not None:
        text = file.read_text(encoding="utf-8")
        return _calibrated(parse_table(text, space, where=str(file), device=device.name), device)
    if not device.model:
        where = f" ({device.tables}/{space.name}.csv)" if device.tables is not None else ""
        raise TableError(
            f"device {device.name} has no latency table for space {space.name}{where} and no model to "
            "compute one: measure the space on the device, or add a model to its file"
        )
    return compute_table(device, space)


def _calibrated(table: LatencyTable, device: Device) -> LatencyTable:
    """Apply the device's calibration to a table as it was measured."""
    if device.calibration is None:
        return table

    def cell(raw: Cell, *, offset: bool = False) -> Cell:
        latency_ms = device.calibrated(raw.latency_ms, offset=offset)
        if latency_ms < 0:
            raise TableError(
                f"device {device.name}: calibration: the offset puts a network without kernels below zero"
            )
        estimated_ms = min(device.calibrated(raw.estimated_ms), latency_ms)
        return Cell(latency_ms, estimated_ms, f"{raw.source}, calibrated".lstrip(", "))

    return replace(
        table,
        fixed=tuple((name, cell(raw, offset=name == RUNTIME)) for name, raw in table.fixed),
        cells=tuple(tuple(map(cell, row)) for row in table.cells),
        margin=device.margin,
    )


def _table_file(device: Device, space: SearchSpace) -> Traversable | None:
    if device.tables is None:
        return None
    if device.is_shipped and (
        space.name not in stems("search_spaces", ".yaml") or load_space(space.name).digest != space.digest
    ):
        return None
    file = device.tables.joinpath(f"{space.name}.csv")
    return file if file.is_file() else None
