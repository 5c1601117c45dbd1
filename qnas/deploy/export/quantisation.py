"""int8: an ONNX graph with convolutions and linear layers in 8 bits, by onnxruntime's static quantisation.

What does not depend on ONNX is here for TFLite too: the search for layers that stay in float, and the ranges.

Ranges of maps come from calibration images, and weights are signed with a scale for each output channel.
Sums, products of maps, norms and activations stay in float32: with these in int8 too, the logits of a
quadratic network were two to three times as far off and nothing was faster. The operators are the standard
QuantizeLinear and DequantizeLinear, which OpenVINO and TensorRT read as well.

A layer that int8 spoils stays in float. How far the logits are off with this layer alone in int8 says which:
with all but one, two such layers hide each other.
"""

import copy
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from onnx import numpy_helper
from onnxruntime import quantization as ort
from onnxruntime.quantization.calibrate import create_calibrator
from torch import Tensor

from qnas.common.errors import ExportError, abbreviate
from qnas.deploy.export.onnx_runtime import running
from qnas.deploy.export.parity import Parity, measure, refusal, tolerance_of
from qnas.deploy.export.product import Ranges, RealImages, Run, Variant
from qnas.deploy.export.tracing import INPUT, silence, told_as

QUANTISED = ("Conv", "Gemm", "MatMul")  # the operators that int8 changes
METADATA = "int8"  # the key of a file's metadata
MOST_IN_FLOAT = 1 / 3  # of the layers
_EFFECT_IMAGES = 64  # on which the effect of each layer is measured
_BATCH_PIXELS = 32 * 64**2  # of calibration images, so that their maps fit into memory
# The bins of entropy's histograms: with onnxruntime's 128 it has a single range to choose from, and its
# time grows with their square.
METHODS: dict[Ranges, tuple[ort.CalibrationMethod, dict[str, Any]]] = {
    "minmax": (ort.CalibrationMethod.MinMax, {}),
    "percentile": (ort.CalibrationMethod.Percentile, {"num_bins": 2048, "percentile": 99.99}),
    "entropy": (ort.CalibrationMethod.Entropy, {"num_bins": 512, "num_quantized_bins": 128}),
}


@dataclass(frozen=True)
class Quantised:
    """A graph or file in int8; `in_float` are the layers that stayed in float, the most sensitive first."""

    model: Any
    layers: int
    in_float: tuple[str, ...]
    variant: Variant

    def metadata(self) -> dict[str, str]:
        """Return the same as metadata of a file."""
        known = {
            "layers": self.layers,
            "in_float": self.in_float,
            "ranges": "image" if self.variant.precision == "int8-dynamic" else self.variant.ranges,
            "symmetric": self.variant.symmetric,
        }
        return {METADATA: json.dumps(known)}


def precision_facts(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return what the metadata of a file say of its precision, a sentence each."""
    if METADATA not in metadata:
        return ()
    known = json.loads(metadata[METADATA])
    layers, in_float = known["layers"], known["in_float"]
    left = f"; left in float: {', '.join(in_float)}" if in_float else ""
    return (
        f"{layers - len(in_float)} of {layers} layers in int8, ranges by {known['ranges']}{left}",
        *(("all zero points are 0, and biases are in float",) if known["symmetric"] else ()),
    )


def quantise(model: onnx.ModelProto, calibration: RealImages, variant: Variant, where: str) -> Quantised:
    """Return a copy of a graph (batch free) with convolutions and linear layers in int8.

    Feature maps are unsigned with one scale: on x86 with VNNI that is several times as fast as signed maps.
    x86 processors without VNNI add pairs of such products in 16 bits, which can saturate (they are judged as
    if it did not: `onnx_runtime`). `symmetric` maps
    are signed, all zero points are 0, and biases stay in float: TensorRT refuses anything else.

    Where the int8 graph seems worse than the tolerance on the calibration images, the layers that disturb
    the logits most go back to float one after another, up to a third of them. Raises ExportError if the
    graph is certainly worse even so, or cannot be quantised.
    """
    with told_as(f"{where}: onnxruntime cannot quantise this network"), silence():
        graph = _Calibrated(model, calibration, variant.ranges, variant.symmetric)
        found, parity = quantise_within(graph, calibration, variant)
    check_quantised(found, parity, where)
    if variant.symmetric:
        _check_symmetric(found.model, where)
    return found


class Calibrated(Protocol):
    """A float model, of which parts can be put into int8."""

    @property
    def model(self) -> Any:
        """The float model."""

    @property
    def layers(self) -> Mapping[str, str]:
        """The names of its layers as people read them, by those of their operators."""

    def in_int8(self, nodes: Collection[str]) -> Any:
        """Return a copy with these operators in int8."""

    def running(self, model: Any) -> Run:
        """Return a model as a function of images."""


def quantise_within(
    graph: Calibrated, images: RealImages, variant: Variant
) -> tuple[Quantised, Parity | None]:
    """Return a model with as few layers in float as the tolerance needs, and its parity on images.

    A variant with `every_layer` has none, and no parity: it may be of a block, whose outputs are no logits.
    """
    if variant.every_layer:
        return Quantised(graph.in_int8(graph.layers.keys()), len(graph.layers), (), variant), None
    tolerance = tolerance_of(variant)
    expected = _logits(graph, graph.model, images, len(images))
    order: list[str] = []
    for in_float in range(int(MOST_IN_FLOAT * len(graph.layers)) + 1):
        if in_float == 1:
            order = _by_effect(graph, images, expected)
        model = graph.in_int8(graph.layers.keys() - order[:in_float])
        parity = measure(_logits(graph, model, images, len(images)), expected, images)
        if parity.seems_within(tolerance):
            break
    names = tuple(graph.layers[node] for node in order[:in_float])
    return Quantised(model, len(graph.layers), names, variant), parity


def check_quantised(found: Quantised, parity: Parity | None, where: str) -> None:
    """Raise ExportError if a model in int8 is certainly worse than its tolerance on calibration images."""
    if parity is None:
        return
    if reason := refusal(parity, tolerance_of(found.variant)):
        some = f"{len(found.in_float)} of {found.layers} layers in float"
        names = abbreviate(found.in_float, most=2)
        raise ExportError(f"{where}: not written: even with {some} ({names}), on calibration images {reason}")


class _Calibrated:
    """A float graph with the ranges of its maps, of which parts can be put into int8."""

    def __init__(self, model: onnx.ModelProto, images: RealImages, ranges: Ranges, symmetric: bool) -> None:
        self.model, self.symmetric = model, symmetric
        constants = {tensor.name for tensor in model.graph.initializer}
        self.layers = {  # the name of a node: that of its layer
            node.name: node.input[1].removesuffix(".weight")
            for node in model.graph.node
            if node.op_type in QUANTISED and node.input[1] in constants
        }
        method, options = METHODS[ranges]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "float.onnx"
            source.write_bytes(model.SerializeToString())
            calibrator = create_calibrator(
                source,
                list(QUANTISED),
                str(Path(folder) / "calibrated.onnx"),
                calibrate_method=method,
                extra_options={"symmetric": symmetric, **options},
            )
            for batch in _batches(images, len(images)):  # each by itself: it keeps all maps of a batch
                calibrator.collect_data(_Reader(batch))
            self.ranges = calibrator.compute_data()

    def in_int8(self, nodes: Collection[str]) -> onnx.ModelProto:
        """Return a copy with these nodes in int8."""
        kind = ort.QuantType.QInt8 if self.symmetric else ort.QuantType.QUInt8
        quantizer = ort.QDQQuantizer(
            copy.deepcopy(self.model),
            True,  # a scale for each output channel
            False,
            ort.QuantType.QInt8,
            kind,
            self.ranges,
            list(nodes),
            [],
            list(QUANTISED),
            {"ActivationSymmetric": self.symmetric, "QuantizeBias": not self.symmetric},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        quantised: onnx.ModelProto = quantizer.model.model
        _read_floats(quantised, nodes)
        return quantised

    def running(self, model: onnx.ModelProto) -> Run:
        """Return a graph as a function of images."""
        return running(model.SerializeToString())


def _by_effect(graph: Calibrated, images: RealImages, expected: Tensor) -> list[str]:
    """Return the nodes by the change of the logits when each alone is in int8, largest first."""
    some = min(len(images), _EFFECT_IMAGES)

    def effect(node: str) -> float:
        change = _logits(graph, graph.in_int8([node]), images, some) - expected[:some]
        return float(change.square().mean().nan_to_num(float("inf")))

    return sorted(graph.layers, key=effect, reverse=True)


def _logits(graph: Calibrated, model: Any, images: RealImages, count: int) -> Tensor:
    run = graph.running(model)
    return torch.cat([run(batch) for batch in _batches(images, count)])


def _batches(images: RealImages, count: int) -> Iterator[Tensor]:
    """Yield the first images in batches, small ones of large images."""
    size = max(1, min(32, _BATCH_PIXELS // images.pixels.shape[-1] ** 2))
    return (images.take(range(start, min(start + size, count))) for start in range(0, count, size))


class _Reader(ort.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is without types
    def __init__(self, images: Tensor) -> None:
        self._inputs = iter([{INPUT: images.numpy()}])

    def get_next(self) -> dict[str, Any] | None:
        """Return the batch, None after it."""
        return next(self._inputs, None)


def _read_floats(model: onnx.ModelProto, int8: Collection[str]) -> None:
    """Let what stays in float read each map as it was before it was rounded, in place.

    The quantiser gives the rounded map to all who read it: to a residual sum, or to a layer in float. A map
    that a layer in int8 made exists in int8 alone.
    """
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.name in int8:
            continue
        for i, name in enumerate(node.input):
            rounded = made_by.get(name)
            if rounded is None or rounded.op_type != "DequantizeLinear":
                continue
            quantiser = made_by.get(rounded.input[0])  # None for a constant
            source = quantiser and quantiser.input[0]
            if source is not None and (source not in made_by or made_by[source].name not in int8):
                node.input[i] = source


def _check_symmetric(model: onnx.ModelProto, where: str) -> None:
    """Raise ExportError for what TensorRT refuses: a zero point that is not 0, a bias in int32."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(constants[node.input[2]])
            if zero.any() or zero.dtype != "int8":
                raise ExportError(f"{where}: not written: onnxruntime left {node.name} asymmetric")
