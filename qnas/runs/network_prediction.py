"""The latency of any network: a run, an arch.json, a fixed space or a file of a network."""

from pathlib import Path

from qnas.common.errors import ArchError, UsageError
from qnas.latency.device import Device, load_device
from qnas.latency.onnx.graph_file import READERS
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.prediction import DEVICE, Prediction, predict_arch, predict_file
from qnas.runs.found_arch import find_network
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

Network = OnnxNetwork | tuple[SearchSpace, Arch]

# Libraries of public models, as in timm:NAME; `qnas.deploy.public_models` reads them, with torch.
LIBRARIES = ("timm", "torchvision")

# Files of networks that are not read, and what to give instead.
_UNREAD = {
    ".py": "a program, which is not run for a prediction: give the run's folder, or its model.onnx",
    ".blob": "compiled for a Myriad X, without its graph: give the .onnx or .xml that it was compiled from",
    ".pte": "compiled for ExecuTorch, without its graph: give the run's folder, or its model.onnx",
    ".bin": "the weights of an OpenVINO IR: give the .xml beside it",
}


def library_of(target: str | Path) -> str:
    """Return the library that a target such as `timm:NAME` is of; empty for any other target."""
    library, colon, _ = str(target).partition(":")
    return library if colon and library in LIBRARIES else ""


def read_network(
    target: str | Path, *, space: str | None = None, resolution_px: int | None = None
) -> Network:
    """Read the network of a file, a run's folder, an arch.json, or a fixed space by name or path.

    Files are an .onnx, an OpenVINO .xml, a .tflite and a .pt2. `space` is for an arch.json without a copy of
    its space, `resolution_px` for a file that leaves the image size open. Raises ArchError or SpaceError if
    there is no such network.
    """
    suffix = Path(target).suffix
    if suffix in _UNREAD:
        raise ArchError(f"{target}: {_UNREAD[suffix]}")
    if suffix in READERS:
        return read_onnx(Path(target), resolution_px=resolution_px)
    if resolution_px is not None:
        raise UsageError(f"`resolution_px={resolution_px}`: for files of networks only, not for {target}")
    found, arch = find_network(target, space)
    if arch is None:
        raise ArchError(f"space {found.name} has many networks: give a run's folder or an arch.json")
    return found, arch


def predict_network(
    network: Network | str | Path, device: Device | str | Path, *, latency: str = DEVICE
) -> Prediction:
    """Predict the latency of a network on a device, with the latency of each of its layers.

    `latency` is "device" or "nn-meter". A name or path is read by `read_network`. Raises TableError if the
    device is unknown or has no prediction for the network.

    >>> prediction = predict_network("quadranet25-xxs", "vpu")
    >>> f"{prediction.latency_ms:.1f} ms, {prediction.coverage:.0%} from measurements"
    '81.4 ms, 32% from measurements'
    """
    if isinstance(network, str | Path):
        network = read_network(network)
    known = load_device(device)
    if isinstance(network, OnnxNetwork):
        return predict_file(latency, known, network)
    return predict_arch(latency, known, *network)
