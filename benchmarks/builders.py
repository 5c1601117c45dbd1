"""The networks of QuadraNet's table I with random weights, and the paper's figures for them.

QuadraNets come from the shipped spaces, HorNets from hornet.py. ConvNeXts and Swins come from a zoo, timm or
torchvision; both have the same parameters and multiply-adds, but not the same speed. Nothing is downloaded.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from hornet import hornet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qnas.nn.blocks import count_parameters
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import only_arch
from qnas.spaces.space import load_space

Builder = Callable[[], nn.Module]

CLASSES, RESOLUTION_PX = 1000, 224


class PaperRow(NamedTuple):
    """A row of table I: parameters, multiply-adds at 224 px, and images per second on an A100."""

    params_m: float
    macs_g: float
    images_per_s: float


# arXiv 2311.17956; the paper's DeiT, TNT, PVT and T2T-ViT are left out
TABLE_I = {
    "QuadraNet25-T": PaperRow(16.2, 2.9, 2433),
    "QuadraNet36-T": PaperRow(23.6, 4.1, 1971),
    "QuadraNet36-S": PaperRow(50.2, 8.9, 1117),
    "QuadraNet25-B": PaperRow(61.2, 11.1, 1138),
    "QuadraNet36-B": PaperRow(90.4, 15.8, 892),
    "ConvNeXt-T": PaperRow(28, 4.5, 1944),
    "ConvNeXt-S": PaperRow(50, 8.7, 1275),
    "ConvNeXt-B": PaperRow(89, 15.4, 969),
    "Swin-T": PaperRow(29, 4.5, 1321),
    "Swin-S": PaperRow(50, 8.7, 827),
    "Swin-B": PaperRow(88, 15.4, 662),
    "HorNet-T": PaperRow(22, 4.0, 1254),
    "HorNet-S": PaperRow(50, 8.8, 813),
    "HorNet-B": PaperRow(87, 15.6, 641),
}

SPACES = {
    f"QuadraNet{depth}-{size}": f"quadranet{depth}-{size.lower()}"
    for depth in (25, 36)
    for size in ("XXS", "XS", "T", "S", "B")
}
HORNETS = {"HorNet-T": 64, "HorNet-S": 96, "HorNet-B": 128}  # channels of the first stage
ZOOS = {
    "timm": {
        f"{family}-{size[0].upper()}": name.format(size)
        for family, name in (("ConvNeXt", "convnext_{}"), ("Swin", "swin_{}_patch4_window7_224"))
        for size in ("tiny", "small", "base")
    },
    "torchvision": {
        "ConvNeXt-T": "convnext_tiny",
        "ConvNeXt-S": "convnext_small",
        "ConvNeXt-B": "convnext_base",
        "Swin-T": "swin_t",
        "Swin-S": "swin_s",
        "Swin-B": "swin_b",
    },
}


def default_zoo() -> str:
    """Return timm where it is installed, as an extra of qnas; torchvision always is."""
    return "timm" if importlib.util.find_spec("timm") else "torchvision"


def network_builders(zoo: str) -> dict[str, Builder]:
    """Return functions that build the networks, QuadraNets first."""
    builders: dict[str, Builder] = {name: partial(quadranet, space) for name, space in SPACES.items()}
    builders |= {name: partial(zoo_network, zoo, entry) for name, entry in ZOOS[zoo].items()}
    return builders | {name: partial(hornet, width, CLASSES) for name, width in HORNETS.items()}


def quadranet(space_name: str) -> nn.Module:
    space = load_space(space_name)
    return build_subnet(space, only_arch(space), classes=CLASSES)


def zoo_network(zoo: str, name: str) -> nn.Module:
    if zoo == "timm":
        network: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False)
    else:
        network = getattr(importlib.import_module("torchvision.models"), name)(weights=None)
    return network


def count(build: Builder, px: int = RESOLUTION_PX) -> tuple[int, int]:
    """Return the parameters of a network, and its multiply-adds for one image (3, px, px).

    Nothing is computed. Products of matrices between features, as in attention, count too.
    """
    with torch.device("meta"):
        network, image = build().eval(), torch.empty(1, 3, px, px)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return count_parameters(network), counter.get_total_flops() // 2
