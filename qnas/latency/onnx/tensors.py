"""An ONNX graph without its free operators: the views of tensors, and their layouts.

FREE nodes and transpositions between (N, C, H, W) and (N, H, W, C) change only shapes and layouts:
TFLite and OpenVINO choose their own layout when they load a file, and PyTorch has both as views.
Changes of precision are free too, since a device's figures are for one precision and price the whole
network in it.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import onnx
from onnx import helper

from qnas.latency.onnx.graph_file import Graph
from qnas.latency.onnx.values import Array, Node, is_mean

# They rename or reshape a tensor and move no data.
FREE = ("Identity", "Dropout", "Flatten", "Reshape", "Squeeze", "Unsqueeze")

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class Reader:
    """A graph without free operators, with the writer and the readers of each tensor."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.shapes = graph.shapes
        self._same: dict[str, str] = {}  # output of a free node -> the tensor that it is a view of
        # for maps, whether channels are the last dimension; other tensors of four dimensions are no maps
        self._is_last: dict[str, bool] = {graph.input: graph.is_channels_last}
        self.nodes: list[Node] = []
        self.writer: dict[str, int] = {}  # tensor -> position of the node
        self.readers: dict[str, set[int]] = {}
        for node in itertools.chain.from_iterable(map(self._means, graph.nodes)):
            sources = self.activations(node)
            if self._is_free(node):
                self._same[node.outputs[0]] = self.root(sources[0])
            else:
                for source in sources:
                    self.readers.setdefault(self.root(source), set()).add(len(self.nodes))
                for output in node.outputs:
                    self.writer[output] = len(self.nodes)
                self.nodes.append(node)
            self._set_layout(node, sources)
        self.outputs = {self.root(output) for output in graph.outputs}

    def root(self, tensor: str) -> str:
        """Return the written tensor of which this one is a view."""
        return self._same.get(tensor, tensor)

    def activations(self, node: Node) -> list[str]:
        """Return a node's inputs that are not constants."""
        return [name for name in node.inputs if name and name not in self.graph.constants]

    def constant(self, node: Node, place: int) -> Array | None:
        """Return the value of a constant input, None where it is left out or unknown."""
        return self.graph.values.get(node.inputs[place]) if place < len(node.inputs) else None

    def sources(self, nodes: Iterable[Node]) -> set[str]:
        """Return the tensors that these nodes read."""
        return {self.root(name) for node in nodes for name in self.activations(node)}

    def is_last(self, tensor: str) -> bool:
        """Whether channels are the last dimension, as in rows of tokens and maps (1, H, W, C)."""
        return len(self.shapes[tensor]) < 4 or self._is_last.get(tensor, False)

    def channel_axis(self, tensor: str) -> int:
        """Return the dimension of a tensor's channels."""
        return -1 if self.is_last(tensor) else 1

    def map_of(self, tensor: str) -> tuple[int, int]:
        """Return pixels (or rows) and channels of a tensor."""
        shape = self.shapes[tensor]
        if not shape:
            return 1, 1
        if self.is_last(tensor):
            return max(1, math.prod(shape[:-1])), max(1, shape[-1])
        # the meaning of five dimensions is unknown: the last two are taken as a map, as in a channel shuffle
        pixels = shape[0] * math.prod(shape[-2:])
        return max(1, pixels), max(1, math.prod(shape[1:-2]))

    def changes_precision(self, node: Node) -> bool:
        """Whether a node only changes the precision of its input."""
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            return True
        if node.op != "Cast":
            return False
        before, after = (self.graph.types[name] for name in (node.inputs[0], node.outputs[0]))
        return before != after and before in _FLOATS and after in _FLOATS

    def _means(self, node: Node) -> Sequence[Node]:
        """Return a convolution that is a mean over channels, as some norms are written, as that mean."""
        weights = self.graph.values.get(node.inputs[1]) if node.op == "Conv" else None
        if weights is None or not is_mean(weights) or weights.shape[1] != self.shapes[node.inputs[0]][1]:
            return (node,)
        (x, _, *bias), (y,) = node.inputs, node.outputs
        mean = f"{y} without its bias" if bias else y
        proto = helper.make_node("ReduceMean", [x], [mean], name=node.name, axes=[1], keepdims=1)
        means = Node(node.name, "ReduceMean", (x,), (mean,), proto)
        if not bias:
            return (means,)
        self.shapes[mean] = self.shapes[y]
        proto = helper.make_node("Add", [mean, *bias], [y], name=node.name)
        return means, Node(node.name, "Add", (mean, *bias), (y,), proto)

    def _is_free(self, node: Node) -> bool:
        given = self.activations(node)
        if not given:
            return False
        if node.op == "Transpose":
            shape = self.shapes[given[0]]
            order = node.attribute("perm") or list(reversed(range(len(shape))))
            moved = [i for i in order if shape[i] > 1]
            layout = _LAYOUT_CHANGES.get(tuple(order))
            return moved == sorted(moved) or (layout is not None and self._is_last.get(given[0]) is layout)
        if self.changes_precision(node):
            return True
        if node.op == "Cast":
            return self.graph.types[given[0]] == self.graph.types[node.outputs[0]]
        # parts that are everything, and copies to the same size
        if node.op in ("Slice", "Expand", "Pad", "Concat", "Split") and len(given) == 1:
            return self.shapes[given[0]] == self.shapes[node.outputs[0]]
        return node.op in FREE

    def _set_layout(self, node: Node, sources: Sequence[str]) -> None:
        if not sources or any(len(self.shapes[output]) != 4 for output in node.outputs if output):
            return
        if node.op in _CHANNELS_FIRST:
            is_last: bool | None = False
        elif node.op == "Transpose":
            was_last = self._is_last.get(sources[0])
            is_free = node.outputs[0] in self._same
            is_last = not was_last if is_free and was_last is not None else None
        elif node.op == "Reshape":  # rows of tokens may become a map
            same = self.shapes[node.outputs[0]][-1:] == self.shapes[sources[0]][-1:]
            is_last = True if same and len(self.shapes[sources[0]]) == 3 else None
        else:
            known = [self._is_last[source] for source in sources if source in self._is_last]
            is_last = any(known) if known else None
        if is_last is not None:
            self._is_last.update(dict.fromkeys(node.outputs, is_last))


# Transpositions that change the layout of a map -> whether its channels were last before.
_LAYOUT_CHANGES = {(0, 2, 3, 1): False, (0, 3, 1, 2): True}
_CHANNELS_FIRST = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool")
