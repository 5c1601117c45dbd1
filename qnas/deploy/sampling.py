"""The choice of networks to time on a device where only whole networks can be timed.

Latencies of random paths cluster in the middle of the range and tell little about its ends. The range is
therefore divided into as many windows as there are networks to choose, and each window gives one. From the
networks drawn from a window, the one that adds most to the information on the costs of blocks is chosen (a
D-optimal design, built greedily). A block has one cost for all its positions, since it costs about the same
at every position of a stage, and a small cost of each position, which spreads the candidates over the
positions. The identity and the most expensive block are more frequent than others, because the fastest and
the slowest networks consist of them.
Windows come in random order, so the first half of the networks is a good sample too.

With 60 networks of quadranet-small and errors of one percent, block costs by least squares predict networks
over the whole range to 0.6%. Drawn from the windows at random, the networks give 0.8%; random paths give
4%, and 20% for the fastest networks (tests/deploy/test_sampling.py).
"""

import math
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qnas.common.errors import CheckpointError, UsageError
from qnas.common.files import write_json, write_text
from qnas.latency.fitting.measurements import Measured, write_measured
from qnas.latency.table import LatencyTable
from qnas.runs.names import SPACE_FILE
from qnas.solver.distributions import sample_near
from qnas.solver.solve import CandidateIndices
from qnas.spaces.arch import arch_document, arch_from_indices
from qnas.spaces.lower import BlockSpec, fill, skeleton
from qnas.spaces.space import SearchSpace, load_space

if TYPE_CHECKING:
    from qnas.deploy.timed_files import FileKind

CSV_FILE = "latencies.csv"

_POOL = 24  # networks drawn per window
_OWN = 0.3  # share of a block's cost that may depend on its position
_ROUNDS = 20  # over the whole range, for windows without a new network

Array = NDArray[np.float64]


def choose_networks(space: SearchSpace, table: LatencyTable, n: int, seed: int) -> list[CandidateIndices]:
    """Return n networks of a space, all different, spread over the latencies of the table.

    The same seed gives the same result. Raises UsageError if the space has fewer networks.
    """
    possible = math.prod(len(p.candidates) for p in space.positions)
    if n > possible:
        raise UsageError(f"`networks={n}`: space {space.name} has only {possible} networks")
    rng = np.random.default_rng(seed)
    columns = _columns(space)
    width = 1 + columns[0][0].size if columns else 1
    precision = np.eye(width) / n  # prior precision of the costs, about that of one network
    chosen: dict[CandidateIndices, None] = {}

    def add_one(low_ms: float, high_ms: float) -> None:
        nonlocal precision
        pool = [i for i in sample_near(table, low_ms, high_ms, _POOL, rng) if i not in chosen]
        if not pool:
            return
        rows = np.array([_row(columns, indices) for indices in pool])
        gain = np.einsum("ij,ji->i", rows, np.linalg.solve(precision, rows.T))
        best = int(np.argmax(gain))
        precision = precision + np.outer(rows[best], rows[best])
        chosen[pool[best]] = None

    edges = np.linspace(table.fastest_ms, table.slowest_ms, n + 1)
    # sums in another order may miss the ends by a rounding error
    edges[0], edges[-1] = edges[0] * (1 - 1e-9), edges[-1] * (1 + 1e-9)
    for i in rng.permutation(n):
        add_one(edges[i], edges[i + 1])
    for _ in range(_ROUNDS * n):
        if len(chosen) == n:
            break
        add_one(edges[0], edges[-1])
    if len(chosen) < n:
        raise UsageError(
            f"`networks={n}`: found only {len(chosen)} networks of space {space.name}: give a smaller number"
        )
    return list(chosen)


def _columns(space: SearchSpace) -> list[list[Array]]:
    """Return what each candidate of each position adds to a network's row of the design."""
    slots = [part for part in skeleton(space) if not isinstance(part, BlockSpec)]
    blocks = [[fill(space, slot, c).layers for c in slot.position.candidates] for slot in slots]
    shared = dict.fromkeys(filter(None, chain(*blocks)))  # layers that cost the same at each position
    units = np.eye(len(shared) + sum(map(len, blocks)))
    of_shared, own = dict(zip(shared, units, strict=False)), iter(_OWN * units[len(shared) :])
    return [[of_shared.get(layers, 0.0) + next(own) for layers in row] for row in blocks]


def _row(columns: list[list[Array]], indices: CandidateIndices) -> Array:
    return np.concatenate([[1.0], sum(row[i] for row, i in zip(columns, indices, strict=True))])


def write_sample(
    space: SearchSpace,
    networks: list[CandidateIndices],
    folder: Path,
    *,
    kind: "FileKind | None",
    seed: int,
    force: bool = False,
    quiet: bool = False,
) -> Path:
    """Write networks as NAME.json, with a kind also as files of it, the space, and a CSV to fill in.

    The CSV is written last, so its presence means that the sample is complete. Returns its path. Raises
    CheckpointError if it exists already and `force` is not set.
    """
    path = folder / CSV_FILE
    if path.exists() and not force:
        raise CheckpointError(
            f"{path}: exists already, perhaps with times: `force=True` replaces it, or another `out`"
        )
    rows = [
        Measured(f"{space.name}-{i + 1:0{len(str(len(networks)))}}", arch_from_indices(space, indices))
        for i, indices in enumerate(networks)
    ]
    write_text(folder / SPACE_FILE, space.to_yaml())
    for row in rows:
        write_json(folder / f"{row.name}.json", arch_document(space, row.arch, {"name": row.name}))
    if kind is not None:
        from qnas.deploy.timed_files import write_timed  # loads torch

        write_timed(space, rows, folder, kind, seed, quiet)
    write_measured(path, rows)
    return path


def open_sample(csv: Path, space: str | Path | None) -> tuple[Path, SearchSpace]:
    """Return a sample's CSV, given by its path or folder, and its space: the one named, else the copy there.

    Raises UsageError if one of the two is missing.
    """
    file = csv / CSV_FILE if csv.is_dir() else csv
    if not file.is_file():
        raise UsageError(f"{file}: no such file, expected the CSV that qnas sample writes")
    beside = file.with_name(SPACE_FILE)
    if space is None and not beside.is_file():
        raise UsageError(f"{file}: no {SPACE_FILE} beside it: name the space of the networks with `space`")
    return file, load_space(space or beside)
