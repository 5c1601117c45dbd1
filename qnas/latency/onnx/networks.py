"""An ONNX network as chains of the operators that latency models know.

Exported graphs contain layout changes around a norm, a GELU as five operators, a bias as a sum. Their
treatment is decided in `tensors` (operators without cost), `compositions` (several nodes that are one
operator), `operators` and here:

- A layer norm over channels between two changes of layout is one `layernorm`. A transposition that
  moves data is a `transpose`, and the one of a channel shuffle a `shuffle`.
- Sums and products with one constant per channel directly after an operator that has its own scale and
  bias are absorbed by it, as batch normalisation is.
- An operator that none of the models knows is UNCOVERED if it passes over its tensors: one pass over the
  largest, of kind `elementwise`, named and counted. One that multiplies and adds is a stand-in, priced by
  its multiply-adds. With any other operator there is no total.

Kernels are square and for one image. A map of another shape counts as the smallest square with at least as
many pixels, and so do kernels and rows of tokens; the operator's `macs` are exact. A convolution with other
padding than ours has the resolution that gives its output size.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from qnas.common.errors import ArchError
from qnas.latency.onnx.compositions import Composition, compositions, splits
from qnas.latency.onnx.graph_file import read_graph
from qnas.latency.onnx.onnx_operator import OnnxOperator, Status, pass_over
from qnas.latency.onnx.operators import check_priced, is_per_channel, read_operator
from qnas.latency.onnx.tensors import Reader
from qnas.latency.onnx.values import Node


@dataclass(frozen=True)
class OnnxNetwork:
    """A network as chains of operators, in an order in which they can run.

    In a chain each operator is the only reader of the one before it, so it may fuse. What else it reads comes
    from chains before this one.
    """

    path: Path
    channels: int
    height_px: int
    width_px: int
    chains: tuple[tuple[OnnxOperator, ...], ...]
    changes_of_precision: int = 0  # nodes that quantise, dequantise or cast; not among the operators

    @cached_property
    def operators(self) -> tuple[OnnxOperator, ...]:
        """All operators, in an order in which they can run."""
        return tuple(operator for chain in self.chains for operator in chain)

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions, linear layers and matrix products for one image."""
        return sum(operator.macs for operator in self.operators)

    @property
    def uncovered(self) -> dict[str, int]:
        """The number of operators that no latency model knows, by name."""
        return self._count("uncovered")

    @property
    def stand_ins(self) -> dict[str, int]:
        """The number of operators that are priced as others with the same multiply-adds, by name."""
        return self._count("stand-in")

    def _count(self, status: Status) -> dict[str, int]:
        return dict(Counter(o.op for o in self.operators if o.status == status))


def read_onnx(path: Path, *, resolution_px: int | None = None) -> OnnxNetwork:
    """Read an ONNX file, an OpenVINO .xml, a .tflite or a .pt2 as operators for one image.

    Weights are not read. `resolution_px` is for files whose height and width are free. Raises ArchError where
    the file is none of its form, has other inputs than one batch of images, or has shapes that no
    resolution determines; and where nothing in it computes, or operators whose work is not known.
    """
    graph = read_graph(path, resolution_px=resolution_px)
    shape = graph.shapes[graph.input]
    height, width, channels = shape[1:] if graph.is_channels_last else (*shape[2:], shape[1])
    reader = Reader(graph)
    if not reader.nodes:
        raise ArchError(f"{path}: no layers that compute, expected a network of images")
    check_priced(reader)
    changes = sum(map(reader.changes_precision, graph.nodes))
    return OnnxNetwork(path, channels, height, width, _chains(reader), changes)


# Operators with their own scale and bias, which absorb those after them.
_AFFINE = ("conv", "dwconv", "linear", "layernorm", "batchnorm")
_MOST_ABSORBED = 16  # nodes by one operator


def _chains(reader: Reader) -> tuple[tuple[OnnxOperator, ...], ...]:
    """Return the operators of a graph as chains."""
    found = {**compositions(reader), **splits(reader)}
    inner = {i for at, composition in found.items() for i in composition.positions if i != at}
    chains: list[list[OnnxOperator]] = []
    tail: dict[str, int] = {}  # output of a chain's last operator -> the chain's place
    for position, node in enumerate(reader.nodes):
        if position in inner:
            continue
        composition = found.get(position)
        positions = composition.positions if composition else (position,)
        sources = {composition.source} if composition else reader.sources([node])
        place = _only_writer(reader, tail, sources, set(positions))
        chain = chains[place] if place is not None and len(sources) == 1 else None
        if chain is not None and composition is None and _is_absorbed(reader, node, chain[-1]):
            last = chain[-1]
            chain[-1] = replace(last, name=f"{last.name}+{node.name}", op=f"{last.op}+{node.op}")
        elif chain is not None and composition is None and _is_norm(reader, node, chain[-1]):
            last = chain[-1]
            kernel = replace(last.kernel, kind="batchnorm")
            chain[-1] = replace(
                last, name=f"{last.name}+{node.name}", op=f"{last.op}+{node.op}", kernel=kernel
            )
        else:
            if place is None:
                place = len(chains)
                chains.append([])
            chains[place].append(
                _composed(reader, composition) if composition else read_operator(reader, node)
            )
        assert place is not None
        tail[node.outputs[0]] = place
    return tuple(map(tuple, chains))


def _composed(reader: Reader, composition: Composition) -> OnnxOperator:
    nodes = [reader.nodes[i] for i in composition.positions]
    operator = pass_over(reader, nodes[-1], composition.kind, composition.view)
    return replace(operator, name="+".join(n.name for n in nodes), op="+".join(n.op for n in nodes))


def _only_writer(
    reader: Reader, tail: Mapping[str, int], sources: set[str], positions: set[int]
) -> int | None:
    """Return the place of the chain whose last output an operator reads, and no other; None without one.

    Of several inputs it is the one that is written last, if the chains of the others come before.
    """
    if not sources:
        return None
    source = max(sources, key=lambda name: reader.writer.get(name, -1))
    place = tail.get(source)
    is_only_reader = reader.readers[source] <= positions and source not in reader.outputs
    if place is None or not is_only_reader or any(tail.get(other, -1) > place for other in sources):
        return None
    return place


def _is_norm(reader: Reader, node: Node, before: OnnxOperator) -> bool:
    """Whether a node and the one before it are a batch norm that was not folded: Mul, Add, by channel."""
    if (before.op, node.op) != ("Mul", "Add"):
        return False
    (source,) = reader.sources([node])
    pair = (reader.nodes[reader.writer[source]], node)
    constants = [[name for name in each.inputs if name in reader.graph.constants] for each in pair]
    return all(
        len(names) == 1 and is_per_channel(reader, names[0], each.outputs[0])
        for each, names in zip(pair, constants, strict=True)
    )


def _is_absorbed(reader: Reader, node: Node, before: OnnxOperator) -> bool:
    """Whether a node scales or shifts each channel by a constant, after an operator that does so itself."""
    if node.op not in ("Add", "Sub", "Mul", "Div") or before.kernel.kind not in _AFFINE:
        return False
    if before.op.count("+") >= _MOST_ABSORBED:
        return False
    constants = [name for name in node.inputs if name in reader.graph.constants]
    if len(constants) != 1 or (node.op == "Div" and node.inputs[0] in constants):
        return False
    size = math.prod(reader.shapes[constants[0]])
    return size == 1 or is_per_channel(reader, constants[0], node.outputs[0])
