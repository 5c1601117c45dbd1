"""Somebody's ONNX network as the operators that latency models know, and what they take on a device.

An exporter writes what it was given: layout changes around a norm, a GELU as five operators, a bias
as a sum. What runtimes make of those is decided in `onnx_tensors` (what is free), `onnx_compositions`
(what several operators are together) and here:

- A layer norm over channels between two changes of layout is one `layernorm`. A transposition that
  moves data is a `transpose`, and the one of a channel shuffle a `shuffle`.
- Sums and products with one constant a channel directly behind an operator that has a scale and a
  bias of its own go into those, as batch normalisation does.
- An operator that none of the models knows is UNCOVERED: a pass over its largest tensor, of kind
  `elementwise`, named and counted.

Kernels are square and for one image. A map of another form is taken as the smallest square that holds
as many pixels, and so are kernels and rows of tokens; the operator's `note` says so, and its `macs` are
exact. The resolution of a convolution without our padding is the one that gives its output size.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from qnas.common.errors import TableError
from qnas.latency.device import Device
from qnas.latency.kernels import Kernel, fuse_operators
from qnas.latency.onnx.compositions import Composition, compositions, splits
from qnas.latency.onnx.graph_file import Node, read_graph
from qnas.latency.onnx.tensors import Reader

# direct: an operator that the models know; stand-in: priced as another one with the same
# multiply-adds; uncovered: none of both
Status = Literal["direct", "stand-in", "uncovered"]

UNCOVERED = "elementwise"


@dataclass(frozen=True)
class OnnxOperator:
    """One operator, or a composition that is one."""

    name: str  # of its nodes, joined by "+"
    op: str  # their ONNX operators, joined by "+"
    kernel: Kernel
    macs: int = 0  # for one image
    status: Status = "direct"
    note: str = ""


@dataclass(frozen=True)
class OnnxNetwork:
    """A network as chains of operators.

    Chains stand in an order in which they can run. Within one, each operator is the only reader of
    the one before it and reads nothing else: fusion happens inside chains only.
    """

    path: Path
    channels: int
    height_px: int
    width_px: int
    chains: tuple[tuple[OnnxOperator, ...], ...]
    changes_of_precision: int = 0  # nodes that quantise, dequantise or cast; none of the operators

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
        """How often each ONNX operator occurs that none of our kinds stands for."""
        return dict(Counter(o.op for o in self.operators if o.status == "uncovered"))


@dataclass(frozen=True)
class OnnxRow:
    """A kernel of the network with its predicted latency.

    `kind` is measured, fitted or estimated, or uncovered where the device does not know the kernel:
    it is priced as a pass over its map, as `add`.
    """

    name: str  # of the nodes that it runs
    op: str
    kernel: Kernel
    latency_ms: float
    kind: str


def read_onnx(path: Path, *, resolution_px: int | None = None) -> OnnxNetwork:
    """Read an ONNX file as operators for one image; weights are not read.

    `resolution_px` is for files whose height and width are free. Raises ArchError where the file is
    no ONNX, has not one batch of images as its only input, or shapes that follow from no resolution.
    """
    graph = read_graph(path, resolution_px=resolution_px)
    shape = graph.shapes[graph.input]
    height, width, channels = shape[1:] if graph.is_channels_last else (*shape[2:], shape[1])
    reader = Reader(graph)
    changes = sum(map(reader.changes_precision, graph.nodes))
    return OnnxNetwork(path, channels, height, width, _chains(reader), changes)


def predict_onnx(device: Device, network: OnnxNetwork) -> tuple[OnnxRow, ...]:
    """Return what the kernels of a network take by the device's model.

    The network takes the sum of them and what every network takes on that device. Raises TableError
    where the device has no model, or lacks what uncovered operators are priced by.
    """
    return tuple(
        _price(device, part, kernel)
        for chain in network.chains
        for part, kernel in _fused(chain, device.fusion)
    )


def coverage(rows: Iterable[OnnxRow], *, runtime_ms: float = 0.0) -> float:
    """Return the share of a latency that rests on measured or fitted models, 0 to 1.

    `runtime_ms` is what every network takes besides its kernels; it counts as covered.
    """
    known = list(rows)
    total = math.fsum([runtime_ms, *(row.latency_ms for row in known)])
    covered = math.fsum(
        [runtime_ms, *(row.latency_ms for row in known if row.kind in ("measured", "fitted"))]
    )
    return covered / total if total > 0 else 1.0


def _fused(chain: Sequence[OnnxOperator], fusion: str) -> Iterator[tuple[tuple[OnnxOperator, ...], Kernel]]:
    """Yield the kernels of a chain, each with the operators that it stands for."""
    start = 0
    while start < len(chain):
        for stop in range(len(chain), start, -1):
            kernels = fuse_operators([o.kernel for o in chain[start:stop]], fusion)
            if len(kernels) == 1:  # the longest sequence that is one kernel, as `fuse_operators` takes it
                yield tuple(chain[start:stop]), kernels[0]
                start = stop
                break


# What a kind is priced by where a device does not know it: the same multiply-adds or the same pass.
_STAND_INS = {"matmul": ("conv1x1", "linear")}
_PASSES = ("elementwise", "add")


def _price(device: Device, part: Sequence[OnnxOperator], kernel: Kernel) -> OnnxRow:
    name, op = "+".join(o.name for o in part), "+".join(o.op for o in part)
    kind = _known(device, kernel)
    if kind is not None and part[0].status != "uncovered":
        kind = "estimated" if part[0].status == "stand-in" else kind
        return OnnxRow(name, op, kernel, device.kernel_ms(kernel), kind)
    for other in _STAND_INS.get(kernel.kind, ()):
        stand_in = replace(kernel, kind=other)
        if _known(device, stand_in) is not None:
            return OnnxRow(name, op, kernel, device.kernel_ms(stand_in), "estimated")
    passes = [replace(kernel, kind=other, kernel=1, stride=1) for other in _PASSES]
    chosen = next((k for k in passes if _known(device, k) is not None), passes[-1])
    return OnnxRow(name, op, kernel, device.kernel_ms(chosen), "uncovered")


def _known(device: Device, kernel: Kernel) -> str | None:
    try:
        return device.kernel_source(kernel)
    except TableError:
        return None


def _side(area: int) -> int:
    """Return the side of the smallest square that holds so many.

    >>> _side(49), _side(50)
    (7, 8)
    """
    return math.isqrt(max(1, area) - 1) + 1


def _square_note(*areas: Sequence[int]) -> str:
    """Say which sizes are not square."""
    odd = [area for area in areas if math.prod(area) != _side(math.prod(area)) ** 2]
    sides = [_side(math.prod(area)) for area in odd]
    return "; ".join(
        f"{' x '.join(map(str, area))} taken as {side} x {side}"
        for area, side in zip(odd, sides, strict=True)
    )


def _whole(reader: Reader, node: Node, kind: str, tensor: str, status: Status = "direct") -> OnnxOperator:
    """Return an operator that passes over a tensor and keeps its size."""
    pixels, channels = reader.map_of(tensor)
    kernel = Kernel(kind, _side(pixels), channels, channels)
    return OnnxOperator(node.name, node.op, kernel, 0, status, _square_note([pixels]))


def _uncovered(reader: Reader, node: Node) -> OnnxOperator:
    tensors = [*reader.activations(node), *filter(None, node.outputs)]
    largest = max(tensors, key=lambda name: math.prod(reader.shapes[name]))
    return _whole(reader, node, UNCOVERED, largest, "uncovered")


def _window(kernel: Kernel, out_px: int) -> Kernel:
    """Return a kernel with the resolution that gives its output, whatever the padding was."""
    return kernel if kernel.out_px == out_px else replace(kernel, resolution_px=out_px * kernel.stride)


def _strides(node: Node, rank: int) -> int:
    strides: list[int] = node.attribute("strides") or [1] * rank
    return max(1, round(float(math.prod(strides) ** (1 / rank))))


def _convolution(reader: Reader, node: Node) -> OnnxOperator:
    """Return a convolution; one in groups as one of as many input channels as a group has.

    Its multiply-adds and weights are those of the groups together, and it is launched once; that it
    reads all input channels is not seen, so it counts as a stand-in.
    """
    x, weight, y = (reader.shapes[name] for name in (node.inputs[0], node.inputs[1], node.outputs[0]))
    groups = node.attribute("group", 1)
    is_depthwise = groups == x[1] > 1
    stride = _strides(node, len(x) - 2)
    dilations = node.attribute("dilations") or [1]
    kernel = Kernel(
        "dwconv" if is_depthwise else "conv",
        _side(math.prod(x[2:])),
        x[1] if is_depthwise else weight[1],
        y[1],
        _side(math.prod(weight[2:])),
        stride,
        max(1, x[0]),
    )
    is_direct = (groups == 1 or is_depthwise) and len(x) == 4 and set(dilations) == {1}
    return OnnxOperator(
        node.name,
        node.op,
        _window(kernel, _side(math.prod(y[2:]))),
        math.prod(y) * math.prod(weight[1:]),
        "direct" if is_direct else "stand-in",
        _square_note(x[2:], weight[2:]),
    )


def _transposed_convolution(reader: Reader, node: Node) -> OnnxOperator:
    """Return a transposed convolution as a convolution with the same multiply-adds."""
    x, weight, y = (reader.shapes[name] for name in (node.inputs[0], node.inputs[1], node.outputs[0]))
    groups = node.attribute("group", 1)
    size = _side(math.prod(weight[2:]))
    kernel = Kernel("conv", _side(math.prod(x[2:])), x[1] // groups, y[1], size, 1, max(1, x[0]))
    macs = math.prod(x) * math.prod(weight[1:])
    return OnnxOperator(node.name, node.op, kernel, macs, "stand-in", _square_note(x[2:], weight[2:]))


def _product(reader: Reader, node: Node) -> OnnxOperator:
    """Return a matrix product: `linear` for one row, a pointwise convolution for many.

    Without weights it is a `matmul`, with a row of the first matrix for a pixel.
    """
    a, y = reader.shapes[node.inputs[0]], reader.shapes[node.outputs[0]]
    weights = [place for place in (0, 1) if node.inputs[place] in reader.graph.constants]
    fan_in = a[-2] if node.attribute("transA", 0) else a[-1]
    macs = math.prod(y) * fan_in
    # a column is what a row is where the weights stand first
    c_out = max(1, (y[-2] if weights == [0] else y[-1]) if len(y) > 1 else math.prod(y))
    rows = max(1, math.prod(y) // c_out)
    if weights:
        kernel = Kernel("linear" if rows == 1 else "conv", _side(rows), fan_in, c_out)
        return OnnxOperator(node.name, node.op, kernel, macs, "direct", _square_note([rows]))
    kernel = Kernel("matmul", _side(rows), fan_in, c_out)
    return OnnxOperator(node.name, node.op, kernel, macs, "stand-in", _square_note([rows]))


def _pool(kind: str) -> Callable[[Reader, Node], OnnxOperator]:
    def read(reader: Reader, node: Node) -> OnnxOperator:
        x, y = reader.shapes[node.inputs[0]], reader.shapes[node.outputs[0]]
        window = node.attribute("kernel_shape")
        if kind == "avgpool" and tuple(window) == x[2:] and math.prod(y[2:]) == 1:
            return _global_pool(reader, node)
        size, stride = _side(math.prod(window)), _strides(node, len(window))
        kernel = Kernel(kind, _side(math.prod(x[2:])), x[1], y[1], size, stride, max(1, x[0]))
        note = _square_note(x[2:], window)
        return OnnxOperator(node.name, node.op, _window(kernel, _side(math.prod(y[2:]))), 0, "direct", note)

    return read


def _global_pool(reader: Reader, node: Node) -> OnnxOperator:
    return _whole(reader, node, "gap", node.inputs[0])


def _mean(reader: Reader, node: Node) -> OnnxOperator:
    """Return a mean over all pixels; another one is uncovered."""
    tensor = node.inputs[0]
    shape = reader.shapes[tensor]
    given = node.attribute("axes")
    values = reader.constant(node, 1)
    axes = list(given) if given is not None else values.tolist() if values is not None else []
    reduced = {axis % len(shape) for axis in axes}
    places = set(range(1, len(shape))) - {reader.channel_axis(tensor) % len(shape)}
    return _global_pool(reader, node) if len(shape) >= 3 and reduced == places else _uncovered(reader, node)


def _layer_norm(reader: Reader, node: Node) -> OnnxOperator:
    shape = reader.shapes[node.inputs[0]]
    axis = node.attribute("axis", -1) % len(shape)
    channels, rows = math.prod(shape[axis:]), math.prod(shape[:axis])
    kernel = Kernel("layernorm", _side(rows), channels, channels)
    return OnnxOperator(node.name, node.op, kernel, 0, "direct", _square_note([rows]))


def _clip(reader: Reader, node: Node) -> OnnxOperator:
    given = reader.constant(node, 1)
    low = node.attribute("min") if given is None else float(given.reshape(-1)[0])
    return _whole(reader, node, "relu6" if low == 0 else "clip", node.inputs[0])


def _sum_or_product(maps: str, scalar: str) -> Callable[[Reader, Node], OnnxOperator]:
    """Return the reader of an operator of two tensors, one of which may be one value, or one a channel."""

    def read(reader: Reader, node: Node) -> OnnxOperator:
        y = node.outputs[0]
        smaller = min(node.inputs[:2], key=lambda name: math.prod(reader.shapes[name]))
        size = math.prod(reader.shapes[smaller])
        kind = maps
        if smaller in reader.graph.constants and size == 1:
            kind = scalar
        elif _is_per_channel(reader, smaller, y) and reader.map_of(y)[0] > 1:
            constant = smaller in reader.graph.constants
            kind = "scale" if maps in ("mul", UNCOVERED) else scalar if constant else maps
        if kind == UNCOVERED:
            return _uncovered(reader, node)
        return _whole(reader, node, kind, y)

    return read


def _product_of_two(reader: Reader, node: Node) -> OnnxOperator:
    """Return a product, of a map with itself a `square`."""
    if reader.root(node.inputs[0]) == reader.root(node.inputs[1]):
        return _whole(reader, node, "square", node.outputs[0])
    return _PRODUCT(reader, node)


def _power(reader: Reader, node: Node) -> OnnxOperator:
    exponent = reader.constant(node, 1)
    is_square = exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2
    return _whole(reader, node, "square", node.inputs[0]) if is_square else _uncovered(reader, node)


def _is_per_channel(reader: Reader, tensor: str, of: str) -> bool:
    """Whether a tensor has one value for each channel of another one."""
    whole, part = reader.shapes[of], reader.shapes[tensor]
    aligned = (1,) * (len(whole) - len(part)) + part
    axis = reader.channel_axis(of) % len(whole) if whole else 0
    return bool(whole) and all(n == (whole[i] if i == axis else 1) for i, n in enumerate(aligned))


def _transposition(reader: Reader, node: Node) -> OnnxOperator:
    """Return a transposition; that of two groups of channels is a shuffle.

    As in the measured networks a shuffle's outputs are the channels of one group.
    """
    shape = reader.shapes[node.inputs[0]]
    order = node.attribute("perm")
    if order == [0, 2, 1, 3, 4]:
        kernel = Kernel("shuffle", _side(math.prod(shape[3:])), shape[1] * shape[2], shape[2])
        return OnnxOperator(node.name, node.op, kernel, 0, "direct", _square_note(shape[3:]))
    if order == [0, 1, 2, 4, 3]:
        kernel = Kernel("shuffle", _side(shape[1] * shape[2]), shape[3] * shape[4], shape[4])
        return OnnxOperator(node.name, node.op, kernel, 0, "direct", _square_note(shape[1:3]))
    return _whole(reader, node, "transpose", node.inputs[0])


def _of_input(kind: str) -> Callable[[Reader, Node], OnnxOperator]:
    return lambda reader, node: _whole(reader, node, kind, reader.activations(node)[0])


def _of_output(kind: str) -> Callable[[Reader, Node], OnnxOperator]:
    return lambda reader, node: _whole(reader, node, kind, node.outputs[0])


_PRODUCT = _sum_or_product("mul", "mul_scalar")

# ONNX operator -> how it is read. Whatever is neither here nor free is uncovered.
OPERATORS: dict[str, Callable[[Reader, Node], OnnxOperator]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Gemm": _product,
    "MatMul": _product,
    "BatchNormalization": _of_input("batchnorm"),
    "LayerNormalization": _layer_norm,
    "Relu": _of_input("relu"),
    "Clip": _clip,
    "Gelu": _of_input("gelu"),
    "HardSwish": _of_input("hswish"),
    "HardSigmoid": _of_input("hsigmoid"),
    "Swish": _of_input("swish"),
    "Sigmoid": _of_input("sigmoid"),
    "Add": _sum_or_product("add", "add_scalar"),
    "Sub": _sum_or_product("sub", "add_scalar"),
    "Mul": _product_of_two,
    "Pow": _power,
    "Div": _sum_or_product(UNCOVERED, "mul_scalar"),
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _mean,
    "AveragePool": _pool("avgpool"),
    "MaxPool": _pool("maxpool"),
    "Concat": _of_output("concat"),
    "Split": _of_input("split"),
    "Slice": _of_output("slice"),
    "Gather": _of_output("slice"),
    "Transpose": _transposition,
}

# Operators with a scale and a bias of their own, into which those behind them go.
_AFFINE = ("conv", "dwconv", "linear", "layernorm", "batchnorm")


@dataclass
class _Item:
    """An operator in the making, and the tensor that it hands on."""

    operator: OnnxOperator
    output: str


def _chains(reader: Reader) -> tuple[tuple[OnnxOperator, ...], ...]:
    """Return the operators of a graph as chains."""
    found = {**compositions(reader), **splits(reader)}
    inner = {i for at, composition in found.items() for i in composition.positions if i != at}
    chains: list[list[_Item]] = []
    tail: dict[str, list[_Item]] = {}  # the tensor that a chain's last operator hands on -> the chain
    for position, node in enumerate(reader.nodes):
        if position in inner:
            continue
        composition = found.get(position)
        positions = composition.positions if composition else (position,)
        sources = {composition.source} if composition else reader.sources([node])
        chain = _only_writer(reader, tail, sources, set(positions))
        if chain is not None and composition is None and _is_absorbed(reader, node, chain[-1].operator):
            item = chain[-1]
            parts = replace(
                item.operator,
                name=f"{item.operator.name}+{node.name}",
                op=f"{item.operator.op}+{node.op}",
            )
            chain[-1] = _Item(parts, node.outputs[0])
        else:
            operator = _composed(reader, composition) if composition else _read(reader, node)
            if chain is None:
                chain = []
                chains.append(chain)
            chain.append(_Item(operator, node.outputs[0]))
        tail[node.outputs[0]] = chain
    return tuple(tuple(item.operator for item in chain) for chain in chains)


def _read(reader: Reader, node: Node) -> OnnxOperator:
    return OPERATORS.get(node.op, _uncovered)(reader, node)


def _composed(reader: Reader, composition: Composition) -> OnnxOperator:
    nodes = [reader.nodes[i] for i in composition.positions]
    operator = _whole(reader, nodes[-1], composition.kind, composition.view)
    return replace(operator, name="+".join(n.name for n in nodes), op="+".join(n.op for n in nodes))


def _only_writer(
    reader: Reader, tail: dict[str, list[_Item]], sources: set[str], positions: set[int]
) -> list[_Item] | None:
    """Return the chain whose last output is all that an operator reads, and read by it alone."""
    if len(sources) != 1:
        return None
    (source,) = sources
    is_only_reader = reader.readers[source] <= positions and source not in reader.outputs
    return tail.get(source) if is_only_reader else None


def _is_absorbed(reader: Reader, node: Node, before: OnnxOperator) -> bool:
    """Whether a node scales or shifts each channel by a constant, behind an operator that does so itself."""
    if node.op not in ("Add", "Sub", "Mul", "Div") or before.kernel.kind not in _AFFINE:
        return False
    constants = [name for name in node.inputs if name in reader.graph.constants]
    if len(constants) != 1 or (node.op == "Div" and node.inputs[0] in constants):
        return False
    size = math.prod(reader.shapes[constants[0]])
    return size == 1 or _is_per_channel(reader, constants[0], node.outputs[0])
