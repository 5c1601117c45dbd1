"""ONNX: one self-contained graph of standard operators, classes and preprocessing in its metadata."""

from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor

from qnas.deploy.export.product import FilePrecision, Product, Run
from qnas.deploy.export.quantization import quantise
from qnas.deploy.export.tracing import BATCH, INPUT, OUTPUT, check_form, trace_onnx


def graph_of(product: Product, precision: FilePrecision, where: str) -> onnx.ModelProto:
    """Return a product as a checked graph. Raises ExportError."""
    model = trace_onnx(product.deployed(precision), product.shape, where)
    if precision == "int8":
        assert product.calibration is not None, "int8 needs calibration images"
        model = quantise(model, product.calibration, where)
    if product.batch is not None:
        _fix_batch(model, product.batch)
    onnx.helper.set_model_props(model, dict(product.metadata))
    check_form(model, where)
    return model


def write(product: Product, precision: FilePrecision, path: Path, where: str) -> None:
    """Write a product as an ONNX file. Raises ExportError."""
    path.write_bytes(graph_of(product, precision, where).SerializeToString())


def load(path: Path) -> Run:
    """Return an ONNX file as a function, in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run


def runtime() -> str:
    """Return what runs the file, with its version."""
    return f"onnxruntime {onnxruntime.__version__}"


def _fix_batch(model: onnx.ModelProto, batch: int) -> None:
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == BATCH:
                size.dim_value = batch
