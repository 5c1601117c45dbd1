"""The calibration of a device by some measured networks: scale, offset, and a margin with a guarantee.

The networks are split at random. On one part scale and offset are fitted (non-negative least squares
on the relative error), on the other the errors of the corrected predictions are measured; the margin
is their conformal quantile (split conformal prediction, Lei et al., JASA 2018). For a new network that
is exchangeable with those measured, the probability that it takes at most (1 + margin) times its
prediction is at least the level, for any model, any distribution of errors and any number of
networks. That holds on average over calibrations. A network that a search chose is not quite
exchangeable with a sample: measure it too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from qnas.common.errors import CheckpointError, TableError
from qnas.common.files import write_text
from qnas.latency.device import Calibration, Device, Figures, parse_device
from qnas.latency.evaluation import figures
from qnas.latency.intervals import Uncertainty, of_sample

CALIBRATED = "calibrated"  # the key in a device's accuracy

LEAST_FITTED = 8  # networks for scale and offset
SEED = 0
MOST_MARGIN = 1.0  # more would halve every budget: not a correction of this device, but another device


@dataclass(frozen=True)
class Calibrated:
    """A calibration, the intervals after it, and the accuracy before and after it.

    Intervals and accuracy are of the networks that gave the margin.
    """

    calibration: Calibration
    uncertainty: Uncertainty | None
    before: Figures
    after: Figures


def margin_networks(level: float) -> int:
    """Return the least number of networks whose largest error is a margin of this level.

    The quantile is the k-th smallest of n errors, k = ceil((n + 1) level), so k <= n must hold.

    >>> margin_networks(0.9), margin_networks(0.95)
    (9, 19)
    """
    n = max(1, math.ceil(level / (1.0 - level)) - 1)
    while _rank(n, level) > n:
        n += 1
    return n


def _rank(n: int, level: float) -> int:
    # minus a little, so that 0.9 of 10 is 9, although the float 0.9 is more than nine tenths
    return math.ceil((n + 1) * level - 1e-9)


def conformal_margin(errors: NDArray[np.float64], level: float) -> float:
    """Return a bound that a new error keeps with a probability of at least `level`; at least 0.

    errors: measured / predicted - 1, for at least `margin_networks` networks left out of the fit.
    """
    rank = _rank(len(errors), level)
    assert rank <= len(errors), f"{len(errors)} errors cannot give a level of {level}"
    return max(0.0, float(np.sort(errors)[rank - 1]))


def calibrate(
    predicted_ms: Sequence[float],
    measured_ms: Sequence[float],
    level: float,
    *,
    fixed_ms: float,
    source: str,
    where: str,
    day: date,
) -> Calibrated:
    """Fit scale, offset and margin to networks, each with a prediction and a measurement in ms.

    `fixed_ms` is the part of every prediction that belongs to no kernel; the offset never lowers this
    part, once scaled, below zero. `source` is for the file, `where` names the networks in messages.
    Raises TableError where the networks are too few for the level, or times do not grow with predictions.
    """
    assert 0 < level < 1, level
    predicted, measured = np.array(predicted_ms), np.array(measured_ms)
    assert len(predicted) == len(measured)
    assert (predicted > 0).all()
    assert (measured > 0).all()
    needed = margin_networks(level) + LEAST_FITTED
    if len(measured) < needed:
        raise TableError(
            f"{where}: {len(measured)} networks are too few for a level of {level:g}: measure at least "
            f"{needed} ({LEAST_FITTED} for scale and offset, {needed - LEAST_FITTED} for the margin), or "
            "give a lower `level`"
        )
    order = np.random.default_rng(SEED).permutation(len(measured))
    last = order[-max(margin_networks(level), len(measured) // 2) :]
    first = order[: len(measured) - len(last)]
    scale, offset_ms = _fit_line(predicted[first], measured[first], fixed_ms)
    if scale <= 0:
        raise TableError(
            f"{where}: measured latencies do not grow with the predicted ones: check that each time "
            "stands in its network's row, and that the device is the one that was measured"
        )
    corrected = scale * predicted[last] + offset_ms
    errors = measured[last] / corrected - 1.0
    margin = conformal_margin(errors, level)
    calibration = Calibration(
        scale=scale,
        offset_ms=offset_ms,
        margin=float(f"{margin:.6g}"),
        level=level,
        n=len(measured),
        date=day.isoformat(),
        source=source,
    )
    return Calibrated(
        calibration,
        of_sample(errors, source=source),
        figures(predicted[last], measured[last]),
        figures(corrected, measured[last]),
    )


def check_margin(calibration: Calibration, where: str) -> None:
    """Raise TableError where the margin is too large for measurements of the predicted networks."""
    if calibration.margin > MOST_MARGIN:
        raise TableError(
            f"{where}: measured latencies are up to {calibration.margin:.0%} above the corrected "
            "predictions, so they are not of what was predicted: check that each time stands in its "
            "network's row, in milliseconds"
        )


def write_calibrated(
    device: Device, found: Calibrated, path: Path, *, name: str, force: bool = False
) -> None:
    """Write a copy of a device with this calibration, under another name.

    Measured tables are copied unchanged into the folder beside the file: the calibration is applied when
    they are read. Other tables come from the model. Raises CheckpointError where a table exists already,
    TableError for a name that is not allowed.
    """
    tables = _measured_tables(device)
    folder = path.with_suffix("")
    in_the_way = [folder / table.name for table in tables if (folder / table.name).exists()]
    if in_the_way and not force:
        raise CheckpointError(
            f"{in_the_way[0]}: exists already: `force=True` replaces it, or give another `out`"
        )
    changes = {
        "name": name,
        "aliases": (),
        "title": f"{device.title}, calibrated",
        "accuracy": {**device.accuracy, CALIBRATED: {"all": found.after}},
        "calibration": found.calibration,
        "uncertainty": found.uncertainty,
    }
    text = parse_device(device.model_copy(update=changes).to_json(), str(path)).to_json()
    for table in tables:
        write_text(folder / table.name, table.read_text(encoding="utf-8"))
    write_text(path, text)


def _measured_tables(device: Device) -> list[Traversable]:
    """Return the tables of a device that its model cannot compute: all tables of your own device."""
    if device.tables is None or not device.tables.is_dir() or (device.is_shipped and device.model):
        return []
    return sorted(
        (table for table in device.tables.iterdir() if table.name.endswith(".csv")), key=lambda t: t.name
    )


def _fit_line(
    predicted: NDArray[np.float64], measured: NDArray[np.float64], fixed_ms: float
) -> tuple[float, float]:
    """Return scale >= 0 and offset >= -scale * fixed_ms with the least squared relative error."""
    # as scale * (predicted - fixed) + rest, with rest = scale * fixed + offset
    rows = np.stack([(predicted - fixed_ms) / measured, 1.0 / measured], axis=1)
    size = np.linalg.norm(rows, axis=0)
    size[size == 0] = 1.0
    found, _ = nnls(rows / size, np.ones(len(rows)))
    scale, rest = (float(f"{value:.6g}") for value in found / size)
    # rounding must not put it below zero again
    return scale, max(rest - scale * fixed_ms, -scale * fixed_ms)
