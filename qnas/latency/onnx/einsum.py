"""The equation of an einsum, such as `bld,de->ble`, for tensors of known shapes.

onnx's own reading of equations does not end for some of them, so that its inference is not used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Einsum:
    """An einsum by the sizes of its indices. Those that an ellipsis stands for are numbered from its end."""

    terms: tuple[tuple[str, ...], ...]  # the indices of each operand
    result: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(self.sizes[index] for index in self.result)

    @property
    def summed(self) -> int:
        """The number of terms in each sum."""
        return math.prod(size for index, size in self.sizes.items() if index not in self.result)

    @property
    def columns(self) -> int:
        """The number of results for each element of the first operand."""
        return math.prod(self.sizes[index] for index in self.result if index not in self.terms[0])


def parse_einsum(equation: str, shapes: Sequence[Sequence[int]]) -> Einsum:
    """Read an equation. Raises ValueError where it has another form or does not fit the shapes.

    >>> parse_einsum("...ij,jk", [(2, 3, 4), (4, 5)]).shape
    (2, 3, 5)
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(shapes):
        raise ValueError(f"{len(terms)} terms for {len(shapes)} inputs")
    sizes: dict[str, int] = {}
    operands = []
    for term, shape in zip(terms, shapes, strict=True):
        indices = _indices(term, len(shape))
        operands.append(indices)
        for index, size in zip(indices, shape, strict=True):
            known = sizes.get(index, 1)
            if 1 not in (size, known) and size != known:
                raise ValueError(f"{index} is {known} and {size}")
            sizes[index] = max(size, known)
    dots = [index for index in sizes if len(index) > 1]
    dots.sort(key=lambda index: -int(index[3:]))
    if arrow:
        letters = _indices(right, len(right.replace("...", "")) + ("..." in right) * len(dots))
    else:
        letters = (*dots, *sorted(i for i in sizes if len(i) == 1 and left.count(i) == 1))
    if len(set(letters)) < len(letters) or not sizes.keys() >= set(letters):
        raise ValueError(f"result {right}")
    return Einsum(tuple(operands), tuple(letters), sizes)


def _indices(term: str, rank: int) -> tuple[str, ...]:
    """Return the indices of a term for a tensor of so many dimensions.

    >>> _indices("b...c", 4)
    ('b', '...2', '...1', 'c')
    """
    before, dots, after = term.partition("...")
    if not all(letter.isascii() and letter.isalpha() for letter in before + after):
        raise ValueError(f"term {term}")
    inner = rank - len(before) - len(after)
    if inner < 0 or (inner and not dots):
        raise ValueError(f"term {term} for {rank} dimensions")
    return (*before, *(f"...{i}" for i in range(inner, 0, -1)), *after)
