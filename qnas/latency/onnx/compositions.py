"""Operators that exporters write as several nodes: a GELU, a norm, a split.

A composition of elementwise operators (or of means) of one tensor is identified by its values: it is
evaluated on random numbers, and is a `gelu`, `swish`, `hswish`, `hsigmoid`, `sigmoid` or `layernorm` if it
agrees with that function. No other node reads the tensors inside it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from qnas.common.errors import ArchError
from qnas.latency.onnx.tensors import Reader
from qnas.latency.onnx.values import Array, Node, evaluate


@dataclass(frozen=True)
class Composition:
    """Nodes, by position, that together are one operator of one tensor."""

    kind: str
    positions: tuple[int, ...]
    source: str
    view: str  # of the source, in the shape in which the nodes read it


_COMPOSABLE = (
    *("Add", "Sub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Reciprocal", "Exp", "Min", "Max"),
    *("Erf", "Tanh", "Sigmoid", "HardSigmoid", "Clip", "Relu", "ReduceMean"),
)
_LONGEST = 16  # nodes in a composition, at most


_FUNCTIONS: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    # the form of a GELU with tanh agrees to 5e-4
    ("gelu", lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2),
    ("hswish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("hsigmoid", lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    ("hsigmoid", lambda x: np.clip(x / 6, 0, 1)),  # with its shift in the bias of the layer before
    ("swish", lambda x: x / (1 + np.exp(-x))),
    ("swish", lambda x: x / (1 + np.exp(-1.702 * x))),  # also called quick GELU; it costs the same
    ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
)
_AGREEMENT = 2e-3  # of values of order one; the functions differ by more than ten times that
# Each function above has at least one of these, and none has more than four.
_BENDS = ("Erf", "Tanh", "Sigmoid", "Exp", "HardSigmoid", "Clip", "Relu", "Min", "Max", "ReduceMean")
_MOST_BENDS = 4
_MOST_DIMENSIONS = 8  # of a tensor of which a composition is tried
_MOST_INPUTS = 3  # of a node
_MOST_EVALUATED = 50_000  # nodes; networks of a hundred layers have some hundreds


def compositions(reader: Reader) -> dict[int, Composition]:
    """Return the compositions of a graph by the position of their last node, the largest first.

    Raises ArchError where it would take too long.
    """
    found: dict[int, Composition] = {}
    taken: set[int] = set()
    evaluated = 0
    for end in reversed(range(len(reader.nodes))):
        if end not in taken and _is_composable(reader, reader.nodes[end]):
            composition, nodes = _largest(reader, end, taken)
            evaluated += nodes
            if evaluated > _MOST_EVALUATED:
                raise ArchError(
                    f"{reader.graph.path}: too many chains of elementwise operators to tell what they "
                    "compute, expected a network of images"
                )
            if composition is not None:
                found[end] = composition
                taken |= set(composition.positions)
    return found


def _largest(reader: Reader, end: int, taken: set[int]) -> tuple[Composition | None, int]:
    """Return the largest composition that ends at a node, without nodes that are taken.

    Returns the number of nodes that were evaluated too.
    """
    inside = {end}
    bends = int(reader.nodes[end].op in _BENDS)
    best, evaluated = None, 0
    while len(inside) <= _LONGEST and bends <= _MOST_BENDS:
        nodes = tuple(reader.nodes[i] for i in sorted(inside))
        outside = {s for s in reader.sources(nodes) if reader.writer.get(s) not in inside}
        if len(outside) == 1 and len(inside) > 1 and bends:
            (source,) = outside
            views = [n for node in nodes for n in reader.activations(node) if reader.root(n) == source]
            same = {reader.shapes[view] for view in views}
            kind = _kind(reader, nodes, views[0]) if len(same) == 1 else None
            evaluated += len(nodes)
            if kind is not None:
                best = Composition(kind, tuple(sorted(inside)), source, views[0])
        # all other tensors are computed from the source, so the one written last is not the source
        latest = max(reader.writer.get(s, -1) for s in outside)
        if latest < 0 or latest in taken or not _is_composable(reader, reader.nodes[latest]):
            break
        output = reader.nodes[latest].outputs[0]
        if not reader.readers[output] <= inside or output in reader.outputs:
            break
        inside.add(latest)
        bends += reader.nodes[latest].op in _BENDS
    return best, evaluated


def _is_composable(reader: Reader, node: Node) -> bool:
    """Whether a node applies arithmetic to tensors and scalars, or a mean."""
    if node.op not in _COMPOSABLE or len(node.inputs) > _MOST_INPUTS:
        return False
    values = [reader.graph.values.get(name) for name in node.inputs if name in reader.graph.constants]
    return all(v is not None and (v.size == 1 or node.op == "ReduceMean") for v in values)


@cache
def _sample(rank: int) -> tuple[Array, tuple[tuple[str, Array], ...]]:
    """Return random numbers, and what the functions give for them."""
    shape = (1, 7, 5, 6)[:rank] if rank <= 4 else (2,) * rank  # one image, as everywhere here
    sample = 4 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = sample.astype(np.float64)
    return np.asarray(sample), tuple((kind, np.asarray(of(x))) for kind, of in _FUNCTIONS)


def _kind(reader: Reader, nodes: Sequence[Node], view: str) -> str | None:
    """Return the function of a tensor that nodes compute, identified by random numbers."""
    rank = len(reader.shapes[view])
    if rank > _MOST_DIMENSIONS:
        return None
    sample, functions = _sample(rank)
    known = {reader.root(view): sample}
    for node in nodes:
        result = evaluate(node, [_operand(reader, name, known) for name in node.inputs])
        if result is None:
            return None
        known[node.outputs[0]] = result
    result = known[nodes[-1].outputs[0]]
    if result.shape != sample.shape:
        return None
    if any(node.op == "ReduceMean" for node in nodes):
        axis = reader.channel_axis(view)
        norm = (sample - sample.mean(axis, keepdims=True)) / sample.std(axis, keepdims=True)
        return "layernorm" if np.allclose(result, norm, atol=_AGREEMENT) else None
    return next((kind for kind, y in functions if np.abs(result - y).max() <= _AGREEMENT), None)


def _operand(reader: Reader, name: str, known: Mapping[str, Array]) -> Array | None:
    """Return the value of an input, constants in the sample's precision; None for one that is left out."""
    value = reader.graph.values.get(name)
    if value is None:
        return known[reader.root(name)] if name else None
    return value if value.dtype.kind in "biu" else value.astype(np.float32)


def splits(reader: Reader) -> dict[int, Composition]:
    """Return slices that together are a whole tensor, as exporters write a split."""
    by_source: dict[str, list[int]] = {}
    for position, node in enumerate(reader.nodes):
        if node.op == "Slice":
            by_source.setdefault(reader.root(node.inputs[0]), []).append(position)
    found = {}
    for source, positions in by_source.items():
        view = reader.nodes[positions[0]].inputs[0]
        parts = {reader.nodes[i].outputs[0] for i in positions}
        sizes = sum(math.prod(reader.shapes[part]) for part in parts)
        if len(positions) > 1 and sizes == math.prod(reader.shapes[source]):
            found[positions[0]] = Composition("split", tuple(positions), source, view)
    return found
