"""A float32 graph with its convolutions and linear layers in int8, by onnxruntime.

Post-training and static: ranges are those that calibration images reach. Weights are signed with a
scale for each output channel, maps unsigned with one scale: on x86 with VNNI that is several times as
fast as signed maps. x86 processors without VNNI add pairs of such products in 16 bits, which can
saturate there. Sums, products of maps, norms and activations stay in float32: with them in int8 too
the logits of a quadratic network were two to three times as far off and nothing was faster. The
operators are the standard QuantizeLinear and DequantizeLinear, which OpenVINO reads as well.
"""

import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization as ort

from qnas.deploy.export.product import RealImages
from qnas.deploy.export.tracing import INPUT, silence, told_as

QUANTISED = ("Conv", "Gemm", "MatMul")
_BATCH = 32


def quantise(model: onnx.ModelProto, calibration: RealImages, where: str) -> onnx.ModelProto:
    """Return a graph with a free batch size in int8; the one given stays. Raises ExportError."""
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
