"""The interval of a predicted latency: conformal, from families of networks that the fit never saw.

A device's model is fitted once without each family of networks, and predicts that family. An error is
(measured - predicted) / (fitted + weight * estimated), where `fitted` and `estimated` are the parts of the
prediction: a millisecond that no measurement backs moves the ends of the interval `weight` times as far.
A kernel outside the measured sizes counts as estimated. The ends are quantiles of these errors, each family
with the same weight, however many networks it has: the question is how far off a new family is, not one more
network of a family that was seen. (Conformal prediction pooled over groups: Dunn, Wasserman and Ramdas,
"Distribution-free prediction sets for two-layer hierarchical models", JASA 2022; residuals of fits without
the group, as in CV+: Barber et al., "Predictive inference with the jackknife+", Annals of Statistics 2021.)

Both ends are linear in the two parts, so the upper end of a network is a sum over its blocks, and a search
can keep it within a budget exactly. The level holds on average over families like those measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from qnas.common.documents import FilePart, to_tuples
from qnas.common.errors import TableError, UsageError

LEVEL = 0.9  # of an interval that is shown
LEVELS = (0.5, 0.8, 0.9, 0.95)  # that a device file has

Error = Annotated[float, Field(ge=-1, le=1e9, allow_inf_nan=False)]

UNKNOWN = "unknown"  # in the place of an interval


@dataclass(frozen=True)
class Interval:
    """The range of a network's latency in milliseconds; `level` is the share of networks within theirs."""

    low_ms: float  # 0 where only the upper end is known
    high_ms: float
    level: float

    def describe(self) -> str:
        """Write the interval with three digits, rounded outwards.

        >>> Interval(27.123, 33.001, 0.9).describe(), Interval(0.0, 0.8, 0.95).describe()
        ('27.1-33.1 ms 90%', 'up to 0.800 ms 95%')
        """
        return f"{self.ends} ms {100 * self.level:g}%"

    @property
    def ends(self) -> str:
        """The same without the unit and the level, for a table whose header has them."""
        digits = max(0, 2 - math.floor(math.log10(self.high_ms))) if self.high_ms > 0 else 0
        scale = 10.0**digits
        # minus a little, so that what is round already stays
        high = f"{math.ceil(self.high_ms * scale - 1e-6) / scale:.{digits}f}"
        if self.low_ms <= 0:
            return f"up to {high}"
        return f"{math.floor(self.low_ms * scale + 1e-6) / scale:.{digits}f}-{high}"


class Errors(FilePart):
    """The relative errors between which a share `level` of networks stays."""

    level: Annotated[float, Field(gt=0, lt=1)]
    low: Annotated[float, Field(ge=-1, le=0)]
    high: Annotated[Error, Field(ge=0)]


class Uncertainty(FilePart):
    """How far measurements of networks are from their predictions on a device, at some levels.

    `weight` says how many times as uncertain an estimated millisecond is as one that measurements back.
    """

    source: str
    networks: Annotated[int, Field(ge=1)]
    families: Annotated[int, Field(ge=1)] | None = None  # None: one sample of one space
    weight: Annotated[float, Field(ge=1, le=1e3)] = 1.0
    errors: Annotated[tuple[Errors, ...], BeforeValidator(to_tuples), Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for inner, outer in pairwise(self.errors):
            if not (inner.level < outer.level and inner.low >= outer.low and inner.high <= outer.high):
                raise ValueError("errors: expected rising levels, each at least as wide as the one before")
        return self

    def at(self, level: float) -> Errors:
        """Return the errors of the least level that is at least this one. Raises UsageError without one."""
        found = next((each for each in self.errors if each.level >= level - 1e-9), None)
        if found is None:
            raise UsageError(
                f"`confidence={level:g}`: the networks measured on this device give at most "
                f"{self.errors[-1].level:g}"
            )
        return found

    def interval(self, latency_ms: float, estimated_ms: float, level: float = LEVEL) -> Interval:
        """Return the interval of a prediction, of which `estimated_ms` are estimated.

        Its level is the device's least that is at least `level`. Raises UsageError where there is none.

        >>> errors = (Errors(level=0.9, low=-0.1, high=0.2),)
        >>> Uncertainty(source="", networks=99, weight=2, errors=errors).interval(10.0, 5.0)
        Interval(low_ms=8.5, high_ms=13.0, level=0.9)
        """
        errors = self.at(level)
        low_ms = self.end_ms(latency_ms, estimated_ms, errors.low)
        return Interval(max(0.0, low_ms), self.end_ms(latency_ms, estimated_ms, errors.high), errors.level)

    def widest(self, latency_ms: float, estimated_ms: float, level: float = LEVEL) -> Interval:
        """Return the interval at a level or, where the device's levels end below it, at its highest."""
        return self.interval(latency_ms, estimated_ms, min(level, self.errors[-1].level))

    def end_ms(self, latency_ms: float, estimated_ms: float, error: float) -> float:
        """Return the measurement that is off by this error: linear in both parts of the latency."""
        return latency_ms + error * (latency_ms + (self.weight - 1.0) * estimated_ms)


def relative_errors(
    measured_ms: NDArray[np.float64],
    latency_ms: NDArray[np.float64],
    estimated_ms: NDArray[np.float64],
    weight: float,
) -> NDArray[np.float64]:
    """Return the errors of predictions as `Uncertainty` counts them. All arrays are (networks,)."""
    return (measured_ms - latency_ms) / (latency_ms + (weight - 1.0) * estimated_ms)


def pooled(
    by_family: Mapping[str, NDArray[np.float64]],
    *,
    weight: float,
    source: str,
    levels: tuple[float, ...] = LEVELS,
) -> Uncertainty:
    """Return the uncertainty from the errors of each family by a fit without it, families weighted equally.

    A prediction always lies within its own interval: the lower error is at most 0, the upper at least 0.
    """
    families = [errors for errors in by_family.values() if len(errors)]
    assert families, "no family was measured"
    values = np.concatenate(families)
    shares = np.concatenate([np.full(len(errors), 1.0 / len(errors)) for errors in families])
    order = np.argsort(values, kind="stable")
    values, shares = values[order], shares[order] / len(families)
    below = np.cumsum(shares)  # the share of networks up to each error

    def quantile(share: float) -> float:
        return float(values[min(int(np.searchsorted(below, share - 1e-9)), len(values) - 1)])

    found = []
    for level in levels:
        low, high = quantile((1.0 - level) / 2.0), quantile((1.0 + level) / 2.0)
        found.append(
            Errors(level=level, low=_rounded(max(-1.0, min(0.0, low))), high=_rounded(max(0.0, high)))
        )
    return Uncertainty(
        source=source, networks=len(values), families=len(families), weight=weight, errors=tuple(found)
    )


def of_sample(errors: NDArray[np.float64], *, source: str) -> Uncertainty | None:
    """Return the uncertainty from the errors of networks of one space, by split conformal prediction.

    errors: measured / predicted - 1, of networks left out of the fit. For n of them, the k-th smallest and
    the k-th largest bound a new one with a probability of at least 1 - 2k / (n + 1). Levels that n is too
    small for are left out; None where it is for all.
    """
    values, n = np.sort(errors), len(errors)
    found = []
    for level in LEVELS:
        k = int((n + 1) * (1.0 - level) / 2.0 + 1e-9)
        if k >= 1:
            low, high = float(values[k - 1]), float(values[n - k])
            found.append(
                Errors(level=level, low=_rounded(max(-1.0, min(0.0, low))), high=_rounded(max(0.0, high)))
            )
    return Uncertainty(source=source, networks=n, errors=tuple(found)) if found else None


def known_errors(known: Uncertainty | None, device: str, level: float) -> Uncertainty:
    """Return the uncertainty of a device. Raises TableError where it has none, for intervals at a level."""
    if known is None:
        raise TableError(
            f"the errors of latencies on {device} are unknown, so `confidence={level:g}` cannot be kept: "
            "calibrate the device by measured networks, or ask without it"
        )
    return known


def describe_interval(interval: Interval | None) -> str:
    """Write an interval, or that there is none."""
    return UNKNOWN if interval is None else interval.describe()


def _rounded(error: float) -> float:
    return float(f"{error:.6g}")
