"""ONNX: one self-contained graph of standard operators, classes and preprocessing in its metadata."""

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime import quantization as ort
from torch import Tensor

from qnas.deploy.export.lowering import ARITHMETIC, OPERATORS, Forms
from qnas.deploy.export.opset import FIRST_OPSETS, TRACED_OPSET
from qnas.deploy.export.product import Product, RealImages, Run, Variant
from qnas.deploy.export.tracing import BATCH, INPUT, OUTPUT, check_form, silence, told_as, trace_onnx

QUANTISED = ("Conv", "Gemm", "MatMul")  # the operators that int8 changes
_BATCH = 32  # of calibration images


def graph_of(product: Product, variant: Variant, where: str, forms: Forms = OPERATORS) -> onnx.ModelProto:
    """Return a product as a checked graph, in these forms where the opset has them. Raises ExportError."""
    opset = variant.opset or TRACED_OPSET
    forms = _within(forms, opset)
    network = product.deployed(variant.precision, forms)
    model = trace_onnx(network, product.shape, where, forms=forms, opset=opset)
    if variant.precision == "int8":
        assert product.calibration is not None, "int8 needs calibration images"
        model = quantise(model, product.calibration, where)
    if product.batch is not None:
        _fix_batch(model, product.batch)
    onnx.helper.set_model_props(model, dict(product.metadata))
    check_form(model, where)
    return model


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as an ONNX file. Raises ExportError."""
    path.write_bytes(graph_of(product, variant, where).SerializeToString())


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
    """Return the runtime of the file, with its version."""
    return f"onnxruntime {onnxruntime.__version__}"


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


def quantise(model: onnx.ModelProto, calibration: RealImages, where: str) -> onnx.ModelProto:
    """Return a copy of a graph (batch free) with convolutions and linear layers in int8, by onnxruntime.

    Static post-training quantisation, with ranges from the calibration images. Weights are signed with a
    scale for each output channel, feature maps unsigned with one scale: on x86 with VNNI that is several
    times as fast as signed maps. x86 processors without VNNI add pairs of such products in 16 bits, which
    can saturate. Sums, products of maps, norms and activations stay in float32: with these in int8 too,
    the logits of a quadratic network were two to three times as far off and nothing was faster. The
    operators are the standard QuantizeLinear and DequantizeLinear, which OpenVINO reads as well.

    Raises ExportError.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model.SerializeToString())
        with told_as(f"{where}: onnxruntime cannot quantise this network"), silence():
            ort.quantize_static(
                str(source),
                str(target),
                _Calibration(calibration),
                quant_format=ort.QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                activation_type=ort.QuantType.QUInt8,
                weight_type=ort.QuantType.QInt8,
                calibrate_method=ort.CalibrationMethod.MinMax,
            )
        return onnx.load(target)


class _Calibration(ort.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is without types
    def __init__(self, images: RealImages) -> None:
        places = range(len(images))
        batches = (places[start : start + _BATCH] for start in places[::_BATCH])
        self._inputs = ({INPUT: images.take(batch).numpy()} for batch in batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None after the last."""
        return next(self._inputs, None)
