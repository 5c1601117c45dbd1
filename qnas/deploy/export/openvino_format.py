"""OpenVINO IR: the graph in an .xml, its weights in a .bin, by OpenVINO's own ONNX converter."""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnas.common.errors import UsageError
from qnas.deploy.export import onnx_format
from qnas.deploy.export.lowering import OPERATORS, Forms
from qnas.deploy.export.product import Product, RealImages, Run, Variant
from qnas.deploy.export.quantisation import METADATA, precision_facts
from qnas.deploy.export.tracing import told_as

# On a CPU, quadranet-mobile takes 13% less time than with the norm as an operator between transpositions
# (OpenVINO 2026.4). In halves the squares could overflow, so that fp16 files, for GPUs, keep the operator.
CPU_FORMS = Forms(layer_norm="arithmetic")


def import_openvino(who: str) -> Any:
    """Return the module openvino, which is optional. Raises UsageError if it is not installed."""
    try:
        return importlib.import_module("openvino")  # without stubs
    except ImportError as error:
        raise UsageError(f"{who}: openvino is not installed ({error}): pip install openvino") from error


def version(who: str = "format openvino") -> str:
    """Return `OpenVINO 2026.4.1`. Raises UsageError if it is not installed."""
    return f"OpenVINO {import_openvino(who).__version__.partition('-')[0]}"


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as `path`, .xml, with the .bin beside it. Raises ExportError, UsageError.

    In fp16 the weights are stored in half precision; the device chooses the precision of computation.
    """
    openvino = import_openvino("format openvino")
    # a float32 graph: the converter turns its weights into fp16
    source = path.with_suffix(".float.onnx")
    in_floats = replace(variant, precision="fp32") if variant.precision == "fp16" else variant
    forms = CPU_FORMS if variant.precision == "fp32" else OPERATORS
    graph = onnx_format.graph_of(product, in_floats, where, forms)
    source.write_bytes(graph.SerializeToString())
    try:
        with told_as(f"{where}: OpenVINO cannot convert this network"):
            model = openvino.convert_model(str(source))
            describe(model, onnx_format.metadata_of(graph))
            openvino.save_model(model, str(path), compress_to_fp16=variant.precision == "fp16")
    finally:
        source.unlink(missing_ok=True)


def describe(model: Any, metadata: Mapping[str, str]) -> None:
    """Put metadata into an OpenVINO model, where an IR keeps them."""
    for key, value in metadata.items():
        model.set_rt_info(value, ["model_info", key])


def check(product: Product, variant: Variant, path: Path, images: RealImages, where: str) -> tuple[str, ...]:
    """Return what a file says of its own precision, a sentence each."""
    model = import_openvino("format openvino").Core().read_model(str(path))
    entry = ["model_info", METADATA]
    return precision_facts({METADATA: model.get_rt_info(entry).value} if model.has_rt_info(entry) else {})


def load(path: Path) -> Run:
    """Return an IR as a function, on the CPU in float32."""
    core = import_openvino("format openvino").Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return run
