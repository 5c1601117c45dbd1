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
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import Tensor, nn

from qnas.common.errors import UsageError
from qnas.common.files import json_text
from qnas.common.text import escaped
from qnas.deploy.export.lowering import CHANNELS_LAST, ConvolutionLayerNorm
from qnas.deploy.export.product import FilePrecision, Product, RealImages, Run, Variant
from qnas.deploy.export.tracing import INPUT, OUTPUT, silence, told_as

METADATA, LABELS = "qnas", "labels.txt"
SIGNATURE = "serving_default"
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")  # the operators with weights
# Operators whose weights a precision changes; the sums, products and norms between them stay in float32.
# XNNPACK has no depthwise convolution with a range for each image: it would fall back to a slow kernel.
CHANGED: dict[FilePrecision, tuple[str, ...]] = {
    "fp32": (),
    "fp16": WEIGHTED,
    "int8": WEIGHTED,
    "int8-dynamic": ("CONV_2D", "FULLY_CONNECTED"),
}
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
    content = quantised(convert(product, where), variant, product.calibration, where)
    path.write_bytes(_described(content, product))


def load(path: Path) -> Run:
    """Return a TFLite file as a function, by XNNPACK on the CPU; images run one after another."""
    with _quiet():
        interpreter = _interpreter(str(path))

    def run(images: Tensor) -> Tensor:
        (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
        logits = []
        for image in images.permute(0, 2, 3, 1).numpy():
            interpreter.set_tensor(given["index"], image[None])
            interpreter.invoke()
            logits.append(interpreter.get_tensor(wanted["index"])[0])
        return torch.from_numpy(np.stack(logits))

    return run


def convert(product: Product, where: str) -> bytes:
    """Return a product in float32 as TFLite, without its metadata. Raises ExportError, UsageError."""
    runtime()
    network = _ChannelsLast(product.deployed(forms=CHANNELS_LAST))
    channels, height, width = product.shape
    given = {INPUT: torch.zeros(1, height, width, channels)}
    with told_as(f"{where}: litert-torch cannot export this network"), _quiet():
        converter = importlib.import_module("litert_torch")  # slow
        content: bytes = converter.convert(network, sample_kwargs=given).model_content()
    return content


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
    """An operator of a TFLite file; maps and weights by name, the output's name is the operator's own."""

    kind: str
    name: str
    source: str


def operators(content: bytes) -> list[Operator]:
    """Return the operators of a TFLite file in the order in which they run."""
    schema = _schema()
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    kinds = {number: name for name, number in vars(schema.BuiltinOperator).items()}
    (graph,) = model.subgraphs
    names = [tensor.name.decode() for tensor in graph.tensors]
    return [
        Operator(
            kinds[model.operatorCodes[o.opcodeIndex].builtinCode], names[o.outputs[0]], names[o.inputs[0]]
        )
        for o in graph.operators
    ]


def quantised(
    content: bytes,
    variant: Variant,
    calibration: RealImages | None,
    where: str,
    floats: Collection[str] = (),
) -> bytes:
    """Return a float32 TFLite file in the precision of a variant, by ai-edge-quantizer.

    Weights have a scale for each output channel and no zero point. `floats` are operators that stay in
    float32, by name. Raises ExportError.
    """
    if variant.precision == "fp32":
        return content
    every = [each for each in operators(content) if each.kind in CHANGED[variant.precision]]
    changed = [each for each in every if each.name not in floats and not _NORM.search(each.name)]
    with told_as(f"{where}: ai-edge-quantizer cannot quantise this network"), _quiet():
        quantizer = importlib.import_module("ai_edge_quantizer.quantizer").Quantizer(content)
        algorithm, config = _rule(variant)
        for each in changed:
            quantizer.update_quantization_recipe(f"^{re.escape(each.name)};?$", each.kind, config, algorithm)
        ranges = None
        if variant.precision == "int8":
            assert calibration is not None, "int8 needs calibration images"
            ranges = _ranges(content, {n for o in changed for n in (o.name, o.source)}, calibration, variant)
        result = quantizer.quantize(ranges, enable_progress_report=False)
        return bytes(result.quantized_model)


def _rule(variant: Variant) -> tuple[str, Any]:
    """Return the algorithm and the configuration of an operator in ai-edge-quantizer."""
    types = importlib.import_module("ai_edge_quantizer.qtyping")
    if variant.precision == "fp16":
        half = types.TensorQuantizationConfig(16, dtype=types.TensorDataType.FLOAT)
        return "float_casting", types.OpQuantizationConfig(
            weight_tensor_config=half,
            compute_precision=types.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        )
    channels = types.TensorQuantizationConfig(8, granularity=types.QuantGranularity.CHANNELWISE)
    maps = types.TensorQuantizationConfig(8, symmetric=variant.symmetric)
    return "min_max_uniform_quantize", types.OpQuantizationConfig(
        activation_tensor_config=maps if variant.precision == "int8" else None,
        weight_tensor_config=channels,
        compute_precision=types.ComputePrecision.INTEGER,
        explicit_dequantize=False,
    )


def _ranges(
    content: bytes, names: Collection[str], calibration: RealImages, variant: Variant
) -> dict[str, dict[str, Any]]:
    """Return the lowest and highest value of maps on images, as ai-edge-quantizer wants them.

    The histograms are onnxruntime's, with its settings. Of a large map they have every n-th value.
    """
    interpreter = _interpreter(content=content, experimental_preserve_all_tensors=True)
    (given,) = interpreter.get_input_details()
    found = {
        each["name"]: each["index"] for each in interpreter.get_tensor_details() if each["name"] in names
    }
    lowest, highest = dict.fromkeys(found, np.inf), dict.fromkeys(found, -np.inf)
    bins = {"percentile": 2048, "entropy": 128}.get(variant.ranges, 1)
    collector = HistogramCollector(variant.ranges, variant.symmetric, bins, 128, 99.999, None)
    for place in range(len(calibration)):
        interpreter.set_tensor(given["index"], calibration.take([place]).permute(0, 2, 3, 1).numpy())
        interpreter.invoke()
        maps = {name: interpreter.get_tensor(index).ravel() for name, index in found.items()}
        if variant.ranges != "minmax":
            collector.collect({name: values[:: len(values) // _SAMPLE + 1] for name, values in maps.items()})
            continue
        for name, values in maps.items():
            lowest[name] = min(lowest[name], values.min())
            highest[name] = max(highest[name], values.max())
    if variant.ranges != "minmax":
        limits = collector.compute_collection_result()
        lowest, highest = ({name: limits[name][end] for name in found} for end in (0, 1))
    return {name: {"min": np.reshape(lowest[name], 1), "max": np.reshape(highest[name], 1)} for name in found}


def _described(content: bytes, product: Product) -> bytes:
    """Return a TFLite file with the product's metadata, and its classes in an archive behind it."""
    schema, flatbuffers = _schema(), importlib.import_module("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    entry, buffer = schema.MetadataT(), schema.BufferT()
    entry.name, entry.buffer = METADATA, len(model.buffers)
    buffer.data = np.frombuffer(json_text(dict(product.metadata)).encode(), np.uint8)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    model.description = product.name
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    file = BytesIO(bytes(builder.Output()))
    with ZipFile(file, "a") as archive:  # of a fixed date: the same weights give the same file
        archive.writestr(ZipInfo(LABELS), "".join(f"{escaped(name)}\n" for name in product.classes))
    return file.getvalue()


def read_metadata(content: bytes) -> dict[str, str]:
    """Return the metadata that a TFLite file was written with."""
    model = _schema().ModelT.InitFromPackedBuf(content, 0)
    found = {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata}
    known: dict[str, str] = json.loads(found[METADATA])
    return known


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


def check(*_: object) -> tuple[str, ...]:
    return ()
