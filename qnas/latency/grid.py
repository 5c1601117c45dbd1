"""A latency interpolated on a grid of measurements of one operator at many shapes.

The axes are counts that never fall as a kernel grows. Between knots, the logarithm of the latency is
linear in the logarithms of the axes, so power laws are exact and the latency is continuous at knots.
Below the first knot of an axis, the latency stays constant: the floor of a launch. Above the last one,
products of axes (work and bytes) are added, each from the end of the grid:

    latency(x) = grid(clip(x)) + sum over terms of ms * (product(max(x, first)) - product(clip(x)))

The values never fall along an axis, and the difference of a product at a point and at its clipped
point never falls as any factor grows, so the latency never falls, inside the grid or outside it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, product
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from qnas.common.arguments import quoted
from qnas.common.documents import FilePart, to_tuples
from qnas.common.errors import abbreviate, nearest, one_line
from qnas.common.units import LEAST_MS, MOST_MS
from qnas.latency.kernels import Kernel

AXES: dict[str, Callable[[Kernel], float]] = {
    "rows": lambda k: k.rows,
    "fan_in": lambda k: k.kernel**2 * k.c_in,  # inputs summed into one output
    "channels": lambda k: k.c_out,
    "elements": lambda k: k.batch * k.resolution_px**2 * k.c_in,  # of one input map
    # blocks of 128 tiles of 4 by 4 output pixels and 128 output channels, the last ones partly full, into
    # which Winograd's F(4x4, 3x3) cuts a 3x3 convolution (Lavin and Gray, arXiv 1509.09308)
    "winograd_blocks": lambda k: (
        math.ceil(k.batch * math.ceil(k.out_px / 4) ** 2 / 128) * math.ceil(k.c_out / 128)
    ),
}

# of a millisecond: errors of log and exp must not make a flat part of a grid fall
_DECIMALS = 12

# in ranges where logarithms, ratios and products of several axes are finite
_Knot = Annotated[float, Field(ge=1e-9, le=1e18, allow_inf_nan=False)]
_Ms = Annotated[float, Field(ge=LEAST_MS, le=MOST_MS, allow_inf_nan=False)]


class Grid(FilePart):
    """A checked grid; a device file holds it as it is.

    `knots` has a list for each axis, of those in AXES. `ms` has a row for each combination of knots of
    all axes except the last, in C order, and in each row a value for every knot of the last axis.
    `beyond` gives milliseconds for each unit of a product of axes: `rows*fan_in*channels`.
    """

    knots: dict[str, Annotated[tuple[_Knot, ...], BeforeValidator(to_tuples)]]
    ms: Annotated[tuple[tuple[_Ms, ...], ...], BeforeValidator(to_tuples)]
    beyond: dict[str, Annotated[float, Field(ge=0, le=MOST_MS, allow_inf_nan=False)]] = Field(default={})

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [
            f"unknown axis {quoted(axis)}: {nearest(axis, AXES)}" for axis in self.knots if axis not in AXES
        ]
        problems += ["knots: expected one axis or more"] * (not self.knots)
        for axis, knots in self.knots.items():
            if len(knots) < 2 or any(b <= a for a, b in pairwise(knots)):
                problems.append(f"knots.{axis:.60}: expected two or more, each above the one before it")
        for term in self.beyond:
            factors = term.split("*")
            if len(set(factors)) < len(factors) or not set(factors) <= set(self.knots):
                axes = one_line("*".join(self.knots), 60)
                problems.append(f"beyond: expected a product of axes as {axes}, got {quoted(term)}")
        if not problems:
            problems = self._problems_of_values()
        if problems:
            raise ValueError(abbreviate(problems, "; "))
        return self

    def _problems_of_values(self) -> list[str]:
        *outer, last = self.shape
        if len(self.ms) != math.prod(outer) or any(len(row) != last for row in self.ms):
            lengths = sorted({len(row) for row in self.ms})
            return [
                f"ms: expected {math.prod(outer)} rows of {last} values, as there are knots, "
                f"got {len(self.ms)} rows of {' and '.join(map(str, lengths[:3])) or 'none'}"
            ]
        values = [value for row in self.ms for value in row]
        for axis, size, step in zip(self.knots, self.shape, self._steps, strict=True):
            for i, value in enumerate(values):
                if i // step % size < size - 1 and values[i + step] < value:
                    return [f"ms: falls along {axis}, from {value:g} to {values[i + step]:g}; no latency may"]
        return []

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of knots of each axis."""
        return tuple(map(len, self.knots.values()))

    @cached_property
    def _steps(self) -> tuple[int, ...]:
        """Return the distance of two neighbours of each axis in the flat list of values."""
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    @cached_property
    def _log_ms(self) -> tuple[float, ...]:
        return tuple(math.log(value) for row in self.ms for value in row)

    @property
    def floor_ms(self) -> float:
        """The smallest latency of any kernel."""
        return self.ms[0][0]

    def latency_ms(self, kernel: Kernel) -> float:
        """Return the latency of a kernel in milliseconds."""
        return self.at({axis: AXES[axis](kernel) for axis in self.knots})

    def at(self, point: Mapping[str, float]) -> float:
        """Return the latency at values of all axes, in milliseconds."""
        raised = {axis: max(point[axis], knots[0]) for axis, knots in self.knots.items()}
        clipped = {axis: min(raised[axis], knots[-1]) for axis, knots in self.knots.items()}
        cells = [locate(clipped[axis], knots) for axis, knots in self.knots.items()]
        log_ms = 0.0
        for corner in product((0, 1), repeat=len(cells)):
            share, index = 1.0, 0
            for (cell, fraction), upper, step in zip(cells, corner, self._steps, strict=True):
                share *= fraction if upper else 1 - fraction
                index += (cell + upper) * step
            if share:
                log_ms += share * self._log_ms[index]
        latency = math.exp(log_ms)
        for term, ms in self.beyond.items():
            factors = term.split("*")
            whole, inside = (math.prod(values[axis] for axis in factors) for values in (raised, clipped))
            latency += ms * (whole - inside)
        return round(latency, _DECIMALS)


def locate(value: float, knots: Sequence[float]) -> tuple[int, float]:
    """Return the cell of ascending knots that contains a value, and the place in it, 0 to 1 in logs.

    >>> locate(4.0, (1.0, 2.0, 8.0))
    (1, 0.5)
    """
    cell = min(bisect_right(knots, value), len(knots) - 1) - 1
    if value == knots[cell + 1]:  # exactly: a value of the grid is returned as it is
        return cell, 1.0
    return cell, math.log(value / knots[cell]) / math.log(knots[cell + 1] / knots[cell])
