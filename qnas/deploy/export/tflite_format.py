"""TFLite, by litert-torch: batch 1, images (1, H, W, C), float32 inputs and outputs in every precision.

A TFLite file holds its graph for one layout, the channels last. The classes and the preprocessing are in it
twice: as JSON in a metadata entry METADATA, and the classes as LABELS in a ZIP archive behind the graph, as
the TFLite metadata convention has them (`unzip model.tflite`).

The int8 files begin with a QUANTIZE and end with a DEQUANTIZE: with int8 inputs the caller would have to know
the scale of this file, and would save one operator on the smallest map.
"""

import importlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from onnxruntime.quantization.calibrate import CalibrationMethod, HistogramCollector
from torch import Tensor, nn

from qnas.common.errors import UsageError
from qnas.common.files import json_text
from qnas.common.text import escaped
from qnas.deploy.export.lowering import CHANNELS_LAST, LARGEST_DEPTHWISE, ConvolutionLayerNorm, Forms
from qnas.deploy.export.product import FilePrecision, Product, RealImages, Run, Variant
from qnas.deploy.export.quantisation import METHODS, check_quantised, precision_facts, quantise_within
from qnas.deploy.export.tracing import INPUT, OUTPUT, silence, told_as

METADATA, LABELS = "qnas", "labels.txt"
DEPTHWISE = "DEPTHWISE_CONV_2D"
WEIGHTED = ("CONV_2D", DEPTHWISE, "FULLY_CONNECTED")  # the operators with weights
_OLDEST = "min_runtime_version"  # the converter's metadata entry
_MODULES = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
_NORM = re.compile(rf"\b{ConvolutionLayerNorm.__name__}_")  # its convolution only computes a mean
_SAMPLE = 2**14  # values of a map of an image, for its histogram


def runtime(who: str = "format tflite") -> str:
    """Return `LiteRT 2.3.0`, without importing it. Raises UsageError if the extra is not installed."""
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise UsageError(f"{who}: {missing[0]} is not installed: pip install 'quadranet-nas[tflite]'")
    return f"LiteRT {version('ai-edge-litert')}"


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as a TFLite file. Raises ExportError, UsageError."""
    content, metadata = convert(product, where), dict(product.metadata)
    if variant.precision != "fp32":
        with told_as(f"{where}: ai-edge-quantizer cannot quantise this network"), _quiet():
            if variant.precision == "fp16":
                content = _half(content)
            else:
                assert product.calibration is not None, "int8 needs calibration images"
                graph = _Calibrated(content, product.calibration, variant)
                found, parity = quantise_within(graph, product.calibration, variant)
        if variant.precision != "fp16":
            check_quantised(found, parity, where)
            content, metadata = found.model, metadata | found.metadata()
    path.write_bytes(_described(content, product, metadata))


def load(path: Path) -> Run:
    """Return a TFLite file as a function, by XNNPACK on the CPU; images run one after another."""
    with _quiet():
        return _running(_interpreter(str(path)))


def _running(interpreter: Any) -> Run:
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: Tensor) -> Tensor:
        logits = []
        for image in images.permute(0, 2, 3, 1).numpy():
            interpreter.set_tensor(given["index"], image[None])
            interpreter.invoke()
            logits.append(interpreter.get_tensor(wanted["index"])[0])
        return torch.from_numpy(np.stack(logits))

    return run


def check(product: Product, variant: Variant, path: Path, images: RealImages, where: str) -> tuple[str, ...]:
    """Return the oldest runtime of a file, its operators, and its precision, a sentence each."""
    content = path.read_bytes()
    oldest = _metadata(content)[_OLDEST].rstrip(b"\0").decode()
    kinds = [each.kind for each in operators(content)]
    facts = [f"{len(kinds)} operators, in float32 of TFLite {oldest} or newer"]
    if variant.precision.startswith("int8"):
        facts += precision_facts(read_metadata(content))[:1]  # biases are in int32
        if DEPTHWISE in kinds:
            facts.append(
                f"depthwise convolutions of up to {LARGEST_DEPTHWISE}x{LARGEST_DEPTHWISE} in float32"
            )
    return tuple(facts)


def convert(product: Product, where: str) -> bytes:
    """Return a product in float32 as TFLite, without its metadata. Raises ExportError, UsageError."""
    runtime()
    network = _ChannelsLast(product.deployed(forms=forms_of(product)))
    channels, height, width = product.shape
    given = {INPUT: torch.zeros(1, height, width, channels)}
    with told_as(f"{where}: litert-torch cannot export this network"), _quiet():
        converter = importlib.import_module("litert_torch")  # slow
        content: bytes = converter.convert(network, sample_kwargs=given).model_content()
    return content


def forms_of(product: Product) -> Forms:
    """Return the forms of a file's operators: GPUs, which are no XNNPACK, run large kernels as they are."""
    return replace(CHANNELS_LAST, depthwise="whole") if product.on_gpu else CHANNELS_LAST


class _ChannelsLast(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, H, W, C) -> (B, classes)."""
        return {OUTPUT: self.network(images.permute(0, 3, 1, 2))}


@dataclass(frozen=True)
class Operator:
    """An operator of a TFLite file. Its name is that of its output, `source` that of its first input."""

    kind: str
    name: str
    source: str
    layer: str  # the module that it is from, as far as its weights say
    kernel: int  # height, of convolutions


def operators(content: bytes) -> list[Operator]:
    """Return the operators of a TFLite file in the order in which they run."""
    schema = _schema()
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    kinds = {number: name for name, number in vars(schema.BuiltinOperator).items()}
    (graph,) = model.subgraphs
    names = [tensor.name.decode() for tensor in graph.tensors]

    def read(operator: Any) -> Operator:
        kind = kinds[model.operatorCodes[operator.opcodeIndex].builtinCode]
        name, source = names[operator.outputs[0]], names[operator.inputs[0]]
        if kind not in WEIGHTED:
            return Operator(kind, name, source, "", 0)
        weights = operator.inputs[1]
        return Operator(kind, name, source, _layer(names[weights]), int(graph.tensors[weights].shape[1]))

    return [read(operator) for operator in graph.operators]


def _layer(name: str) -> str:
    """Return the module of a tensor, by the path that litert-torch names tensors after.

    >>> _layer("a.b._Wide/torch.nn.Sequential_network/a.Block_1_1/a._Mixer_mixer/torch.nn.Conv2d_conv_a;1")
    '1_1.mixer.conv_a'
    """
    parts = [part.rpartition(".")[2].lstrip("_").partition("_")[2] for part in name.split(";")[0].split("/")]
    return ".".join(filter(None, parts)).removeprefix("network.")


def changed(content: bytes, precision: FilePrecision) -> list[Operator]:
    """Return the operators of a float32 file whose weights a precision changes.

    Sums, products, activations and norms stay in float32. So do depthwise convolutions in int8: XNNPACK has
    none with a range for each image, and with a fixed range they lost time. But it has no code for kernels
    above 5x5 in any precision. Where these are not split (`lowering.SplitDepthwise`), TFLite's own loops take
    less than half the time in int8, with a range for each image (benchmarks/depthwise_forms.py).
    """
    int8 = precision != "fp16"
    return [
        each
        for each in operators(content)
        if each.kind in WEIGHTED
        and not _NORM.search(each.name)
        and not (int8 and each.kind == DEPTHWISE and each.kernel <= LARGEST_DEPTHWISE)
    ]


def _quantised(content: bytes, rules: Mapping[Operator, Any], ranges: Any = None) -> bytes:
    """Return a float32 file with the weights of these operators in other types, by ai-edge-quantizer."""
    quantizer = importlib.import_module("ai_edge_quantizer.quantizer").Quantizer(content)
    for each, (algorithm, config) in rules.items():
        quantizer.update_quantization_recipe(f"^{re.escape(each.name)};?$", each.kind, config, algorithm)
    return bytes(quantizer.quantize(ranges, enable_progress_report=False).quantized_model)


def _half(content: bytes) -> bytes:
    """Return a float32 file with weights in half precision, which the runtime widens when it loads them."""
    types = importlib.import_module("ai_edge_quantizer.qtyping")
    config = types.OpQuantizationConfig(
        weight_tensor_config=types.TensorQuantizationConfig(16, dtype=types.TensorDataType.FLOAT),
        compute_precision=types.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    return _quantised(content, dict.fromkeys(changed(content, "fp16"), ("float_casting", config)))


class _Calibrated:
    """A float32 file with the ranges of its maps, of which parts can be put into int8."""

    def __init__(self, model: bytes, images: RealImages, variant: Variant) -> None:
        self.model, self.variant = model, variant
        self.operators = {each.name: each for each in changed(model, variant.precision)}
        self.layers = {name: each.layer for name, each in self.operators.items()}
        self.ranges = {} if variant.precision == "int8-dynamic" else self._find_ranges(images)

    def in_int8(self, nodes: Collection[str]) -> bytes:
        """Return a file with these operators in int8, with a scale for each output channel of weights."""
        return _quantised(
            self.model, {self.operators[node]: self._rule(node) for node in nodes}, self.ranges or None
        )

    def running(self, model: bytes) -> Run:
        """Return a file as a function of images."""
        return _running(_interpreter(content=model))

    def _rule(self, node: str) -> tuple[str, Any]:
        types = importlib.import_module("ai_edge_quantizer.qtyping")
        is_fixed = self.variant.precision == "int8" and self.operators[node].kind != DEPTHWISE
        maps = types.TensorQuantizationConfig(8, symmetric=self.variant.symmetric) if is_fixed else None
        return "min_max_uniform_quantize", types.OpQuantizationConfig(
            activation_tensor_config=maps,
            weight_tensor_config=types.TensorQuantizationConfig(
                8, granularity=types.QuantGranularity.CHANNELWISE
            ),
            compute_precision=types.ComputePrecision.INTEGER,
            explicit_dequantize=False,
        )

    def _find_ranges(self, images: RealImages) -> dict[str, Any]:
        """Return the lowest and highest value of each map, by its name; of a large map, every n-th value."""
        interpreter = _interpreter(content=self.model, experimental_preserve_all_tensors=True)
        (given,) = interpreter.get_input_details()
        names = {name for each in self.operators.values() for name in (each.name, each.source)}
        maps = {m["name"]: m["index"] for m in interpreter.get_tensor_details() if m["name"] in names}
        limits = {name: (np.float32("inf"), np.float32("-inf")) for name in maps}
        method, settings = METHODS[self.variant.ranges]
        histograms = HistogramCollector(
            self.variant.ranges,
            self.variant.symmetric,
            settings.get("num_bins"),
            settings.get("num_quantized_bins"),
            settings.get("percentile"),
            None,
        )
        for place in range(len(images)):
            interpreter.set_tensor(given["index"], images.take([place]).permute(0, 2, 3, 1).numpy())
            interpreter.invoke()
            values = {name: interpreter.get_tensor(index).ravel() for name, index in maps.items()}
            if method == CalibrationMethod.MinMax:
                for name, (low, high) in limits.items():
                    limits[name] = min(low, values[name].min()), max(high, values[name].max())
            else:
                histograms.collect({name: v[:: len(v) // _SAMPLE + 1] for name, v in values.items()})
        if method != CalibrationMethod.MinMax:
            limits = histograms.compute_collection_result()
        return {
            name: {"min": np.reshape(ends[0], 1), "max": np.reshape(ends[1], 1)}
            for name, ends in limits.items()
        }


def _described(content: bytes, product: Product, metadata: Mapping[str, str]) -> bytes:
    """Return a TFLite file with metadata, and the classes in an archive behind it."""
    schema, flatbuffers = _schema(), importlib.import_module("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for weights in model.buffers:
        if weights.offset > 1:  # the quantiser puts those of a large file behind the graph
            weights.data = np.frombuffer(content, np.uint8, weights.size, weights.offset)
            weights.offset = weights.size = 0
    entry, buffer = schema.MetadataT(), schema.BufferT()
    entry.name, entry.buffer = METADATA, len(model.buffers)
    buffer.data = np.frombuffer(json_text(dict(metadata)).encode(), np.uint8)
    model.buffers.append(buffer)
    model.metadata.append(entry)
    model.description = product.name
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    file = BytesIO(bytes(builder.Output()))
    with ZipFile(file, "a") as archive:  # of a fixed date: the same weights give the same file
        archive.writestr(ZipInfo(LABELS), "".join(f"{escaped(name)}\n" for name in product.classes))
    return file.getvalue()


def read_metadata(content: bytes) -> dict[str, str]:
    """Return the metadata that a TFLite file was written with."""
    known: dict[str, str] = json.loads(_metadata(content)[METADATA])
    return known


def _metadata(content: bytes) -> dict[str, bytes]:
    model = _schema().ModelT.InitFromPackedBuf(content, 0)
    return {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata}


def _schema() -> Any:
    return importlib.import_module("ai_edge_litert.schema_py_generated")


def _interpreter(path: str | None = None, content: bytes | None = None, **options: Any) -> Any:
    module = importlib.import_module("ai_edge_litert.interpreter")
    found = module.Interpreter(path, content, num_threads=torch.get_num_threads(), **options)
    found.allocate_tensors()
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress all output, also that of compiled code, which writes to the descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        with silence():
            yield
    finally:
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)
        os.close(nowhere)
