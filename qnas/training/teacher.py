"""The teacher of a distillation: the largest network of a supernet, a trained network, or a model of timm.

It sees the same augmented and mixed images as the student, but normalised as it expects.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from qnas.common.errors import UsageError, first_line, one_line
from qnas.data.image_data import ImageData
from qnas.nn.pretrained.hub import hub_problem, only_cached
from qnas.nn.subnet import build_subnet
from qnas.runs.found_arch import FoundArch, find_arch, read_result, trained_folder
from qnas.runs.names import SUPERNET_FILE
from qnas.spaces.lower import smallest_and_largest
from qnas.training.optimizer import Teacher
from qnas.training.processes import digest
from qnas.training.scoring import recalibrate_on
from qnas.training.supernet_weights import build_trained, load_inherited, supernet_file, supernet_state

SUPERNET_LARGEST = "supernet-largest"
TIMM = "timm:"


class Renormalised(nn.Module):
    """A network that expects images of another mean and standard deviation than those of its input.

    Grey images become three equal channels where the network expects three.
    """

    def __init__(
        self,
        network: nn.Module,
        given: tuple[Sequence[float], Sequence[float]],
        expected: tuple[Sequence[float], Sequence[float]],
        size_px: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.size_px = size_px  # the only size that the network accepts
        names = ("given_mean", "given_std", "expected_mean", "expected_std")
        for name, values in zip(names, (*given, *expected), strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        given_mean, given_std, mean, std = self.buffers(recurse=False)
        x = (x * given_std + given_mean - mean) / std
        if self.size_px is not None and x.shape[-1] != self.size_px:
            x = nn.functional.interpolate(x, (self.size_px, self.size_px), mode="bilinear", antialias=True)
        logits: Tensor = self.network(x)
        return logits


def load_teacher(
    spec: str,
    source: FoundArch,
    data: ImageData,
    *,
    weight: float,
    temperature: float,
    device: torch.device | str = "cpu",
) -> tuple[Teacher, str]:
    """Return the requested teacher, and a digest of its weights.

    `spec` is `supernet-largest` (of the architecture's run), `timm:NAME` (its pretrained weights) or the
    folder of a trained network. Raises UsageError or CheckpointError if it is missing or has other classes.
    """
    if spec == SUPERNET_LARGEST:
        network = _largest(source, data, device)
    elif spec.startswith(TIMM):
        network = _from_timm(spec.removeprefix(TIMM), data)
    else:
        network = _from_run(Path(spec), data)
    network = network.to(device).eval().requires_grad_(False)
    return Teacher(network, weight, temperature), digest(network.state_dict())[:16]


def _largest(source: FoundArch, data: ImageData, device: torch.device | str) -> nn.Module:
    file = supernet_file(source)
    if not file.is_file():
        raise UsageError(f"`teacher='{SUPERNET_LARGEST}'`: no {SUPERNET_FILE} in {source.folder}, name a run")
    arch = smallest_and_largest(source.space)[1]
    network = build_subnet(source.space, arch, len(data.classes))
    load_inherited(network, supernet_state(source), source.space, arch, file)
    # the supernet's batch-norm statistics were gathered while other paths ran
    network = network.to(device).eval()
    recalibrate_on(network, data.train, device)
    return network


def _from_run(folder: Path, data: ImageData) -> nn.Module:
    trained, asked = trained_folder(folder), f"`teacher='{folder}'`"
    if trained is None:
        raise UsageError(f"{asked}: expected {SUPERNET_LARGEST}, {TIMM}NAME or a trained network's folder")
    found = find_arch(trained)
    result = read_result(trained, found)
    if tuple(result["classes"]) != data.classes:
        raise UsageError(f"{asked}: its classes are not those of the data")
    if (channels := found.space.input.channels) != data.channels:
        raise UsageError(f"{asked}: takes images of {channels} channels, not {data.channels}")
    network = build_trained(found, len(data.classes))
    return Renormalised(network, (data.mean, data.std), (result["mean"], result["std"]))


def _from_timm(name: str, data: ImageData) -> nn.Module:
    asked = f"`teacher='{TIMM}{one_line(name, 60)}'`"
    try:
        import timm  # an extra, and heavy
    except ImportError:
        raise UsageError(f"{asked}: needs timm: pip install 'quadranet-nas[timm]'") from None
    if data.channels not in (1, 3):
        raise UsageError(f"{asked}: takes images of 3 channels, not {data.channels}")
    on_hub = timm.is_model(name) or name.startswith(("hf-hub:", "hf_hub:"))
    problem = hub_problem() if on_hub else ""
    try:
        with only_cached() if problem else nullcontext():
            network: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # an unknown name, missing weights, no connection to the hub: almost anything
        if problem and isinstance(error, OSError):  # no weights here; an unknown name is another error
            remedy = "once with a connection, or copy a cache to HF_HOME, or name a trained network's folder"
            raise UsageError(
                f"{asked}: {problem}, and the weights are not in its cache: run it {remedy}"
            ) from None
        raise UsageError(f"{asked}: {first_line(error)}") from error
    classes: int = network.num_classes  # type: ignore[assignment]  # timm's attribute
    if classes != len(data.classes):
        raise UsageError(f"{asked}: knows {classes} classes, the data have {len(data.classes)}")
    about = network.pretrained_cfg
    assert isinstance(about, dict)
    size_px = int(about["input_size"][-1]) if about.get("fixed_input_size") else None
    return Renormalised(network, (data.mean, data.std), (about["mean"], about["std"]), size_px)
