"""A float32 graph with its convolutions and linear layers in int8, by onnxruntime.

Post-training and static: ranges are those that calibration images reach. Weights are signed with a
scale for each output channel, maps unsigned with one scale: on x86 with VNNI that is several times as
fast as signed maps. x86 processors without VNNI add pairs of such products in 16 bits, which can
saturate there. Sums, products of maps, norms and activations stay in float32: with them in int8 too
the logits of a quadratic network were two to three times as far off and nothing was faster. The
operators are the standard QuantizeLinear and DequantizeLinear, which OpenVINO reads as well.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from qnas.common.errors import ExportError
from qnas.deploy.export.product import RealImages
from qnas.deploy.export.tracing import INPUT, root_cause, silence

QUANTISED = ("Conv", "Gemm", "MatMul")
_BATCH = 32


def quantise(model: onnx.ModelProto, calibration: RealImages, where: str) -> onnx.ModelProto:
    """Return a graph with a free batch size in int8; the one given stays. Raises ExportError."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model.SerializeToString())
        try:
            with silence():
                quantize_static(
                    str(source),
                    str(target),
                    _Calibration(calibration),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(QUANTISED),
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=CalibrationMethod.MinMax,
                )
        except Exception as error:  # onnxruntime's quantiser raises many kinds
            raise ExportError(
                f"{where}: onnxruntime cannot quantise this network: {root_cause(error)}"
            ) from error
        return onnx.load(target)


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is without types
    def __init__(self, images: RealImages) -> None:
        self._batches = self._read(images)

    @staticmethod
    def _read(images: RealImages) -> Iterator[dict[str, Any]]:
        for start in range(0, len(images), _BATCH):
            yield {INPUT: images.take(range(start, min(start + _BATCH, len(images)))).numpy()}

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None after the last."""
        return next(self._batches, None)
