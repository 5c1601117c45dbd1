"""The public models of timm and torchvision as operators that latency models know.

A model is built without weights, on torch's meta device, where tensors have shapes only. torch.export records
its operators, which are read as those of a .pt2 file. Nothing is downloaded.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from qnas.common.errors import ArchError, QnasWarning, UsageError, nearest, one_line
from qnas.deploy.export.tracing import silence, told_as
from qnas.latency.onnx.networks import OnnxNetwork, read_onnx
from qnas.latency.public_networks import public_networks

CHANNELS, USUAL_PX = 3, 224


@dataclass(frozen=True)
class _Model:
    """A model of a library that is not built yet."""

    build: Callable[[], nn.Module]
    resolution_px: int  # of its published weights


def read_public_model(target: str, *, resolution_px: int | None = None) -> OnnxNetwork:
    """Return the operators of a model for one image: of its own resolution, unless another is given.

    `target` is `timm:NAME` or `torchvision:NAME`. Without timm, a model of `qnas rivals` has its operators as
    they ship, with a warning. Raises UsageError where timm is missing, ArchError for an unknown name or for
    operators that are not known, ExportError where torch cannot record the model at this resolution.
    """
    library, _, name = target.partition(":")
    try:
        model = _LIBRARIES[library](name)
    except ImportError:
        return _as_shipped(target, name, resolution_px)
    return _recorded(model, target, resolution_px or model.resolution_px)


def _timm(name: str) -> _Model:
    import timm  # an extra, and heavy

    if not timm.is_model(name):
        raise ArchError(f"timm has no model {one_line(name, 60)!r}: {nearest(name, timm.list_models())}")
    about = timm.get_pretrained_cfg(name)
    size = about.input_size if about is not None else (CHANNELS, USUAL_PX, USUAL_PX)
    return _Model(lambda: timm.create_model(name, pretrained=False), size[-1])


def _torchvision(name: str) -> _Model:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise ArchError(f"torchvision has no classifier {one_line(name, 60)!r}: {nearest(name, names)}")
    (px,) = models.get_model_weights(name).DEFAULT.transforms().crop_size
    return _Model(lambda: models.get_model(name, weights=None), px)


_LIBRARIES: Mapping[str, Callable[[str], _Model]] = {"timm": _timm, "torchvision": _torchvision}


def _recorded(model: _Model, target: str, resolution_px: int) -> OnnxNetwork:
    """Record the operators of a model on one image of this size."""
    with TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.pt2"
        with told_as(f"{target} at {resolution_px} px: torch cannot record its operators"), silence():
            image = torch.empty(1, CHANNELS, resolution_px, resolution_px, device="meta")
            torch.export.save(torch.export.export(_built(model), (image,), strict=False), path)
        try:
            return replace(read_onnx(path), path=Path(target))
        except ArchError as error:
            raise ArchError(str(error).replace(str(path), target)) from error


def _built(model: _Model) -> nn.Module:
    try:
        with torch.device("meta"):
            return model.build().eval()
    except (NotImplementedError, RuntimeError):  # it reads numbers while it is built, which meta tensors lack
        return model.build().eval().to("meta")


def _as_shipped(target: str, name: str, resolution_px: int | None) -> OnnxNetwork:
    """Return a model from the networks that ship with qnas, at the usual resolution if none is given."""
    public = public_networks()
    sizes = {n.resolution_px: i for i, n in enumerate(public.networks) if n.name == name}
    px = resolution_px or min(sizes, key=lambda size: (size != USUAL_PX, size), default=0)
    if px not in sizes:
        known = f"; known without it at {', '.join(map(str, sorted(sizes)))} px" if sizes else ""
        raise UsageError(f"{one_line(target, 60)}: needs timm: pip install 'quadranet-nas[timm]'{known}")
    told = f"{target}: timm is not installed: its operators are those that ship with qnas"
    warnings.warn(told, QnasWarning, stacklevel=2)
    return OnnxNetwork(Path(target), CHANNELS, px, px, (public.sequence(sizes[px]),))
