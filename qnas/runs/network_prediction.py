"""The latency of any network: a run, an arch.json, a fixed space or an ONNX file."""

from pathlib import Path

from qnas.common.errors import ArchError, UsageError
from qnas.latency.device import Device, load_device
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.prediction import DEVICE, Prediction, predict_arch, predict_file
from qnas.runs.found_arch import find_network
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

Network = OnnxNetwork | tuple[SearchSpace, Arch]


def read_network(
    target: str | Path, *, space: str | None = None, resolution_px: int | None = None
) -> Network:
    """Read the network of an ONNX file, a run's folder, an arch.json, or a fixed space by name or path.

    `space` is for an arch.json without a copy of its space, `resolution_px` for an ONNX file that leaves the
    image size open. Raises ArchError or SpaceError if there is no such network.
    """
    if Path(target).suffix == ".onnx":
        return read_onnx(Path(target), resolution_px=resolution_px)
    if resolution_px is not None:
        raise UsageError(f"`resolution_px={resolution_px}`: for ONNX files only, not for {target}")
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
    '76.5 ms, 34% from measurements'
    """
    if isinstance(network, str | Path):
        network = read_network(network)
    known = load_device(device)
    if isinstance(network, OnnxNetwork):
        return predict_file(latency, known, network)
    return predict_arch(latency, known, *network)
