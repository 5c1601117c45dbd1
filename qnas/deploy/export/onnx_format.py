"""ONNX: one self-contained graph of standard operators, classes and preprocessing in its metadata."""

from pathlib import Path

import onnx

from qnas.deploy.export.lowering import ARITHMETIC, OPERATORS, Forms
from qnas.deploy.export.onnx_runtime import running
from qnas.deploy.export.opset import FIRST_OPSETS, TRACED_OPSET
from qnas.deploy.export.product import Product, RealImages, Run, Variant
from qnas.deploy.export.quantisation import precision_facts, quantise
from qnas.deploy.export.tracing import BATCH, check_form, trace_onnx


def graph_of(product: Product, variant: Variant, where: str, forms: Forms = OPERATORS) -> onnx.ModelProto:
    """Return a product as a checked graph, in these forms where the opset has them. Raises ExportError."""
    opset = variant.opset or TRACED_OPSET
    forms = _within(forms, opset)
    network = product.deployed(variant.precision, forms)
    model = trace_onnx(network, product.shape, where, forms=forms, opset=opset)
    metadata = dict(product.metadata)
    if variant.precision == "int8":
        assert product.calibration is not None, "int8 needs calibration images"
        quantised = quantise(model, product.calibration, variant, where)
        model, metadata = quantised.model, metadata | quantised.metadata()
    if product.batch is not None:
        _fix_batch(model, product.batch)
    onnx.helper.set_model_props(model, metadata)
    check_form(model, where)
    return model


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as an ONNX file. Raises ExportError."""
    path.write_bytes(graph_of(product, variant, where).SerializeToString())


def load(path: Path) -> Run:
    """Return an ONNX file as a function, in onnxruntime."""
    return running(str(path))


def check(product: Product, variant: Variant, path: Path, images: RealImages, where: str) -> tuple[str, ...]:
    """Return what a file says of its own precision, a sentence each."""
    return precision_facts(metadata_of(onnx.load(path)))


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return the metadata of a graph."""
    return {entry.key: entry.value for entry in model.metadata_props}


def forms_in(variant: Variant) -> Forms:
    """Return the forms of a file's operators."""
    return _within(OPERATORS, variant.opset or TRACED_OPSET)


def _within(forms: Forms, opset: int) -> Forms:
    """Return forms without operators that the opset does not have."""
    return Forms(
        forms.layer_norm if opset >= FIRST_OPSETS["LayerNormalization"] else ARITHMETIC.layer_norm,
        forms.gelu if opset >= FIRST_OPSETS["Gelu"] else ARITHMETIC.gelu,
        forms.hard_swish if opset >= FIRST_OPSETS["HardSwish"] else ARITHMETIC.hard_swish,
    )


def _fix_batch(model: onnx.ModelProto, batch: int) -> None:
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == BATCH:
                size.dim_value = batch
