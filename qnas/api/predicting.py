"""The latency of any network on any device, from Python."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnas.api.results import find_source
from qnas.common.arguments import check_arguments
from qnas.common.errors import UsageError
from qnas.latency.device import Device, load_device
from qnas.latency.prediction import DEVICE, Prediction, predict_arch
from qnas.runs.found_arch import FoundArch
from qnas.runs.network_prediction import Network as ReadNetwork
from qnas.runs.network_prediction import library_of, predict_network, read_network
from qnas.spaces.arch import Arch
from qnas.spaces.space import SearchSpace

if TYPE_CHECKING:
    from torch import Tensor, nn

    Network = FoundArch | tuple[SearchSpace, Arch] | nn.Module | str | Path


def predict(
    network: "Network",
    device: str | Path | Device,
    *,
    example_input: "Tensor | None" = None,
    resolution_px: int | None = None,
    latency: str = DEVICE,
) -> Prediction:
    """Predict the latency of a network for one image, with the latency of each of its layers.

    `network` is a result of qnas, a run's folder, an arch.json, a fixed space by name, a space with an
    architecture of it, a file (.onnx, OpenVINO's .xml, .tflite, .pt2), a public model (`timm:NAME`,
    `torchvision:NAME`), or a torch.nn.Module together with an `example_input` (B, C, H, W).
    Operators that the device does not know are priced by their multiply-adds, or without any as passes over
    their feature maps; the prediction's `note` names and counts them. `resolution_px` is for a file that
    leaves the image size open, and for a public model, which has its own by default. `latency` is "device" or
    "nn-meter".

    Raises TableError if the device is unknown or cannot price the network, ArchError, SpaceError or
    ExportError if the network cannot be read.

    >>> prediction = predict("quadranet25-xxs", "cpu")
    >>> f"{prediction.latency_ms:.1f} ms, {prediction.coverage:.0%} from measurements"
    '56.5 ms, 88% from measurements'
    """
    check_arguments(resolution_px=resolution_px)
    known = load_device(device)
    if resolution_px is not None and not isinstance(network, str | Path):
        raise UsageError(f"`resolution_px={resolution_px}`: for files and public models only")
    if isinstance(network, FoundArch | tuple):
        found = find_source(network)
        return predict_arch(latency, known, found.space, found.arch)
    if isinstance(network, str | Path):
        return predict_network(read_any(network, resolution_px=resolution_px), known, latency=latency)
    if not callable(network):
        check_arguments(network=network)
    from qnas.deploy.module_latency import predict_module

    shown: Any = example_input  # checked by predict_module
    return predict_module(network, shown, known, latency=latency)


def read_any(
    target: str | Path, *, space: str | None = None, resolution_px: int | None = None
) -> ReadNetwork:
    """Read a network as `read_network` does, or a public model: `timm:NAME`, `torchvision:NAME`.

    Raises the errors of `read_network`, and those of `qnas.deploy.public_models` for a model.
    """
    if not library_of(target):
        return read_network(target, space=space, resolution_px=resolution_px)
    from qnas.deploy.public_models import read_public_model

    return read_public_model(str(target), resolution_px=resolution_px)
