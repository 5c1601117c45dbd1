"""The latency of any PyTorch module, from the operators that torch's ONNX exporter writes for it."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from qnas.common.errors import ArchError, UsageError
from qnas.deploy.export.tracing import trace_onnx
from qnas.latency.device import Device, load_device
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.prediction import DEVICE, Prediction, predict_file


def trace_module(module: nn.Module, example_input: Tensor) -> OnnxNetwork:
    """Return a module's operators for one image; `example_input` is a batch of images (B, C, H, W).

    A copy of the module is traced in evaluation mode on the CPU. Raises UsageError if the input is not a
    batch of images, ExportError if torch cannot export the module, ArchError if its operators have shapes
    that depend on data.
    """
    where = f"module {type(module).__name__}"
    if not isinstance(example_input, Tensor) or example_input.ndim != 4:
        got = f"shape {tuple(example_input.shape)}" if isinstance(example_input, Tensor) else example_input
        raise UsageError(f"{where}: expected a batch of images (B, C, H, W) as example input, got {got}")
    network = copy.deepcopy(module).cpu().float().eval()
    model = trace_onnx(network, tuple(example_input.shape[1:]), where, batch=1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "module.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            return read_onnx(path)
        except ArchError as error:
            raise ArchError(str(error).replace(str(path), where)) from error


def predict_module(
    module: nn.Module, example_input: Tensor, device: Device | str | Path, *, latency: str = DEVICE
) -> Prediction:
    """Predict the latency of a PyTorch module for one image.

    An operator that the device does not know is priced by its multiply-adds, or as one pass over its
    largest tensor if it has none; the prediction's `note` names and counts such operators. Raises the
    errors of `trace_module`, and TableError if the device has no kernel model.
    """
    return predict_file(latency, load_device(device), trace_module(module, example_input))
