"""ONNX graphs and files in onnxruntime, on the CPU."""

import onnxruntime
import torch
from torch import Tensor

from qnas.deploy.export.product import Run
from qnas.deploy.export.tracing import INPUT, OUTPUT


def running(source: str | bytes) -> Run:
    """Return a file, by its path, or a graph, by its bytes, as a function of images."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    # x86 processors without VNNI add pairs of int8 products in 16 bits, which saturate: not in this mode
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run


def runtime() -> str:
    """Return onnxruntime with its version."""
    return f"onnxruntime {onnxruntime.__version__}"
