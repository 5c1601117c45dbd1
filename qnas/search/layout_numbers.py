"""What a layout of a family adds to a score or a loss: numbers for its resolution and its widths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qnas.spaces.family import Layout

RESOLUTION = -1  # the place of a resolution among the choices of a layout; widths have their stage's number
LayoutChoice = tuple[int, int]  # the place and the value


@dataclass(frozen=True)
class LayoutNumbers:
    """What the resolution of a layout and the width of each of its stages add; others add nothing."""

    resolutions: Mapping[int, float]
    widths: tuple[Mapping[int, float], ...]  # by stage

    def negated(self) -> "LayoutNumbers":
        """Return these numbers with the other sign."""
        widths = tuple({c: -number for c, number in row.items()} for row in self.widths)
        return LayoutNumbers({px: -number for px, number in self.resolutions.items()}, widths)


def open_choices(layouts: Sequence[Layout]) -> list[tuple[LayoutChoice, ...]]:
    """Return the choices that each layout is, without those that all of them share.

    >>> open_choices([Layout(32, (8, 16)), Layout(64, (8, 24))])
    [((-1, 32), (1, 16)), ((-1, 64), (1, 24))]
    """
    rows = [(of.resolution_px, *of.channels) for of in layouts]
    places = [at for at, values in enumerate(zip(*rows, strict=True)) if len(set(values)) > 1]
    return [tuple((RESOLUTION + at, row[at]) for at in places) for row in rows]


def numbers_of(by_choice: Mapping[LayoutChoice, float], stages: int) -> LayoutNumbers:
    """Return the numbers of choices by resolution, and by stage and width."""
    rows: dict[int, dict[int, float]] = {place: {} for place in range(RESOLUTION, stages)}
    for (place, value), number in sorted(by_choice.items()):
        rows[place][value] = number
    return LayoutNumbers(rows[RESOLUTION], tuple(rows[stage] for stage in range(stages)))


def fit_layout_numbers(values: Mapping[Layout, float]) -> LayoutNumbers:
    """Return the numbers whose sums are nearest to a value of each layout: of least squares, the smallest."""
    choices = open_choices(list(values))
    columns = {choice: at for at, choice in enumerate(dict.fromkeys(c for of in choices for c in of))}
    design = np.zeros((len(values), len(columns)))
    for row, of in zip(design, choices, strict=True):
        row[[columns[choice] for choice in of]] = 1
    found = np.linalg.lstsq(design, np.array(list(values.values())), rcond=None)[0] if columns else []
    by_choice = {choice: float(found[at]) for choice, at in columns.items()}
    return numbers_of(by_choice, len(next(iter(values)).channels))
