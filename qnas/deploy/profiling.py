"""A device file from measurements on this machine: every distinct block of a space is timed.

A block whose output has the shape of its input is timed as a chain of COPIES blocks, each with its own
weights, and costs the same share of the chain. A single block run repeatedly would find its weights in the
nearest cache, which the preceding blocks of a network fill: on a server CPU the difference is a tenth of
a small network's latency. Weights are random, norms and biases too: a runtime drops scales of one and
shifts of zero, and would be faster than with a trained network.

The runtime's overhead per call is not part of a block. It is measured with an empty graph, subtracted
from each measurement, and counted once, in the table's row `runtime`.

Blocks are measured, but adding them up is an assumption. A few whole networks are therefore timed in the
same rounds, and the device file records how far the sums are from them. The cells are not adjusted:
calibration does that. A larger block that is faster than a smaller one is reported as an outlier.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qnas import __version__
from qnas.common import host
from qnas.common.errors import CheckpointError
from qnas.common.files import write_text
from qnas.deploy.runtimes import Runtime, Shape
from qnas.deploy.timed_files import draw_norms
from qnas.deploy.timing import TOLERANCE, Maker, Timing, noisy, time_all
from qnas.latency.device import SCHEMA, Device, load_device, parse_device
from qnas.latency.device_table import build_table
from qnas.latency.evaluation import figures
from qnas.latency.table import DECIMALS, RUNTIME, Cell, LatencyTable, write_table
from qnas.nn.blocks import build_block
from qnas.nn.subnet import build_network
from qnas.solver.solve import CandidateIndices
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import BlockSpec, Slot, all_blocks, fill, lower, skeleton
from qnas.spaces.space import SearchSpace

COPIES = 4  # blocks per chain
LOADS = 3  # per chain
REPEATS = 150  # visits per chain, over all loads
NETWORKS = 8  # whole networks to compare with
_OUTLIER = 3.0  # standard errors by which an outlier is faster than a smaller block


@dataclass(frozen=True)
class DistinctBlock:
    """A distinct block, and the number of its copies in a timed chain."""

    name: str  # of its first place in the space: "2.1 quadra_k3_e2"
    block: BlockSpec
    copies: int

    @property
    def shape(self) -> Shape:
        """The shape of its input."""
        first = self.block.layers[0]
        return first.c_in, first.resolution_px, first.resolution_px

    def build(self) -> nn.Module:
        """Build the chain, with weights drawn from torch's generator."""
        return draw_norms(nn.Sequential(*(build_block(self.block) for _ in range(self.copies))))


def distinct_blocks(space: SearchSpace) -> dict[BlockSpec, DistinctBlock]:
    """Return the blocks of a space that differ in more than their name, by `BlockSpec.unnamed`."""
    parts: dict[BlockSpec, DistinctBlock] = {}
    for block, candidate in all_blocks(space):
        key = block.unnamed
        if block.layers and key not in parts:
            name = f"{block.name} {candidate.name}" if candidate else block.name
            first, last = block.layers[0], block.layers[-1]
            fits_itself = (first.c_in, first.resolution_px) == (last.c_out, last.out_px)
            parts[key] = DistinctBlock(name, block, COPIES if fits_itself else 1)
    return parts


@dataclass(frozen=True)
class Profile:
    """A measured space on a device."""

    device: Device
    table: LatencyTable
    parts: tuple[DistinctBlock, ...]
    timings: dict[str, Timing]  # of the chains and whole networks, and of the empty graph as "runtime"
    networks: tuple[tuple[float, float], ...]  # whole networks: milliseconds as a sum, and as measured
    noisy: tuple[str, ...]  # names of timings that stayed noisy
    outliers: tuple[str, ...]  # larger blocks that are faster, in words
    device_file: Path
    table_file: Path

    @property
    def bias(self) -> float:
        """The mean share by which sums of blocks exceed the latency of whole networks."""
        return float(np.mean([total / whole for total, whole in self.networks])) - 1.0


def profile_space(
    space: SearchSpace,
    runtime: Runtime,
    *,
    name: str,
    folder: Path,
    repeats: int = REPEATS,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> Profile:
    """Measure a space and write `folder/name.json` and `folder/name/SPACE.csv`.

    An existing file of the same device, written for another space, is extended. Raises CheckpointError
    if a measurement would be replaced without `force`, if the file is of another device, or if the samples
    to resume are missing or of another request; Interrupted after Ctrl-C or SIGTERM, once the samples so
    far are saved.
    """
    file, table_file = folder / f"{name}.json", folder / name / f"{space.name}.csv"
    state_file = table_file.with_suffix(".samples.json")
    device = _this_device(runtime, name, repeats)  # a bad name is refused before anything is measured
    former = _former_device(device, file, table_file, force=force)
    if state_file.exists() and not (resume or force):
        raise CheckpointError(
            f"{state_file}: an interrupted measurement: `resume=True` continues it, `force=True` starts anew"
        )
    parts, networks = distinct_blocks(space), _some_networks(space)
    px = space.input.resolution_px
    image = (space.input.channels, px, px)
    makers = {
        RUNTIME: _maker(runtime, nn.Identity, (1, 1, 1)),
        **{part.name: _maker(runtime, part.build, part.shape) for part in parts.values()},
        **{title: _maker(runtime, partial(_build, space, i), image) for title, i in networks.items()},
    }
    timings = time_all(
        makers,
        loads=LOADS,
        repeats=repeats,
        tolerance=TOLERANCE,
        stopwatch=runtime.stopwatch,
        state_file=state_file,
        request={
            "space_digest": space.digest,
            "device": name,
            "machine": device.title,
            "runtime": device.runtime,
            "copies": COPIES,
        },
        resume=resume,
        quiet=quiet,
    )
    still_noisy = noisy(timings)
    table = _measured_table(device, space, parts, timings, still_noisy)
    whole = tuple((table.latency_ms(i), timings[title].median_ms) for title, i in networks.items())
    device = _completed(device, former, space, whole, keeps_calibration=not table_file.exists())
    write_table(table, space, table_file)
    write_text(file, device.to_json())
    return Profile(
        device=load_device(file),
        table=table,
        parts=tuple(parts.values()),
        timings=timings,
        networks=whole,
        noisy=still_noisy,
        outliers=_outliers(space, parts, timings),
        device_file=file,
        table_file=table_file,
    )


def _this_device(runtime: Runtime, name: str, repeats: int) -> Device:
    """Return this machine with this runtime as a device. Raises TableError for a bad name."""
    threads = f"{runtime.threads} thread{'s' if runtime.threads > 1 else ''}"
    clock = host.gpu_clock() if runtime.target == "cuda" else host.cpu_clock()
    content = {
        "schema": SCHEMA,
        "name": name,
        "title": f"{host.cpu_name()}, {threads}",
        "runtime": f"{runtime.version}, {runtime.settings}",
        "precision": "float32" if runtime.precision == "fp32" else "int8 layers; the rest in float32",
        "file_precision": runtime.precision,
        "batch": 1,
        "unit": "ms",
        "kind": "measured",
        "source": f"qnas profile {__version__}: chains of {COPIES} blocks, {LOADS} loads, medians "
        f"of {repeats} or more interleaved runs; {host.load()}, {clock}",
        "date": date.today().isoformat(),
    }
    return parse_device(json.dumps(content), f"device {name}")


def _former_device(device: Device, file: Path, table_file: Path, *, force: bool) -> Device | None:
    """Return the existing device of this file; None if there is none or `force` replaces another device."""
    former = load_device(file) if file.exists() else None
    if former is not None and (former.title, former.runtime) != (device.title, device.runtime):
        others = any(path != table_file for path in table_file.parent.glob("*.csv"))
        if others or not force:
            pairs = ((former.title, device.title), (former.runtime, device.runtime))
            differs = [f"{old}, this one is {new}" for old, new in pairs if old != new]
            raise CheckpointError(
                f"{file}: describes another device: {'; '.join(differs)}: "
                f"give {'another' if others else '`force=True` or another'} `device_name`"
            )
        former = None
    if table_file.exists() and not force:
        raise CheckpointError(
            f"{table_file}: exists already: `force=True` measures again, or give another `device_name`"
        )
    return former


def _completed(
    device: Device,
    former: Device | None,
    space: SearchSpace,
    whole: Sequence[tuple[float, float]],
    *,
    keeps_calibration: bool,
) -> Device:
    """Return the device, merged with the former one, with the accuracy of sums of this space's blocks.

    A calibration is dropped when the table that it was made for is replaced.
    """
    base = former or device
    accuracy = dict(base.accuracy)
    if len(whole) > 1:
        accuracy[f"whole networks of {space.name}"] = {"all": figures(*np.array(whole).T)}
    calibration = base.calibration if keeps_calibration else None
    known = {"date": device.date, "source": device.source}
    return base.model_copy(update={**known, "accuracy": accuracy, "calibration": calibration})


def _some_networks(space: SearchSpace) -> dict[str, CandidateIndices]:
    """Return different random networks of a space; all networks if there are few."""
    rng = np.random.default_rng(0)
    sizes = [len(position.candidates) for position in space.positions]
    possible = math.prod(sizes)
    found: dict[CandidateIndices, None] = {}
    for _ in range(100 * NETWORKS):
        if len(found) == min(NETWORKS, possible):
            break
        found[tuple(int(rng.integers(size)) for size in sizes)] = None
    return {f"network {i + 1}": indices for i, indices in enumerate(found)}


def _maker(runtime: Runtime, build: Callable[[], nn.Module], shape: Shape) -> Maker:
    """Return a maker of instances of a module, which is built and compiled for the first one."""

    @cache
    def compiled() -> Maker:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return runtime.compile(build(), shape)

    return lambda: compiled()()


def _build(space: SearchSpace, indices: CandidateIndices) -> nn.Module:
    return draw_norms(build_network(lower(space, arch_from_indices(space, indices))))


def _measured_table(
    device: Device,
    space: SearchSpace,
    parts: Mapping[BlockSpec, DistinctBlock],
    timings: Mapping[str, Timing],
    still_noisy: Sequence[str],
) -> LatencyTable:
    """Return the table of a space from the timings of its distinct blocks."""
    empty_ms = timings[RUNTIME].median_ms

    def cell(block: BlockSpec) -> Cell:
        if not block.layers:
            return Cell(0.0, 0.0, "no operator")
        part = parts[block.unnamed]
        timing = timings[part.name]
        latency_ms = (timing.median_ms - empty_ms) / part.copies
        source = f"measured{', noisy' if part.name in still_noisy else ''}: +-{timing.spread:.1%}"
        return Cell(max(round(latency_ms, DECIMALS), 10**-DECIMALS), 0.0, source)

    runtime = Cell(round(empty_ms, DECIMALS), 0.0, "measured: an empty graph")
    return build_table(device, space, runtime, cell)


def _outliers(
    space: SearchSpace, parts: Mapping[BlockSpec, DistinctBlock], timings: Mapping[str, Timing]
) -> tuple[str, ...]:
    """Describe blocks that are faster than one of smaller kernel and expansion, beyond the noise."""
    found: dict[str, None] = {}  # positions of a stage are alike
    for slot in (part for part in skeleton(space) if isinstance(part, Slot)):
        blocks = {c: fill(space, slot, c) for c in slot.position.candidates}
        for small, large in permutations((c for c, block in blocks.items() if block.layers), 2):
            if not small.is_within(large):
                continue
            low, high = (parts[blocks[c].unnamed] for c in (small, large))
            low_t, high_t = timings[low.name], timings[high.name]
            error_ms = math.hypot(*(t.spread * t.median_ms for t in (low_t, high_t)))
            if low_t.median_ms - high_t.median_ms > _OUTLIER * error_ms:
                share = 1 - high_t.median_ms / low_t.median_ms
                found[f"{high.name} takes {share:.1%} less than {small.name}"] = None
    return tuple(found)
