"""A small network trained on digits at 8 px, for export, and a space of all neurons."""

import json
from dataclasses import replace
from functools import cache

import torch
from helpers.networks import all_candidates
from helpers.tiny import TINY_SPACE
from torch import nn
from torch.nn import functional as F

from qnas.data.image_data import sample_images
from qnas.data.loading import load_data
from qnas.data.sources import parse_data_spec
from qnas.deploy.export.product import Product, RealImages
from qnas.nn.blocks import LayerScale
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import Arch
from qnas.spaces.lower import lower
from qnas.spaces.neurons import NEURONS
from qnas.spaces.space import SearchSpace, parse_space

PX = 8
CHOICES = ("quadra_k3_e2", "identity", "quadra_k3_e2", "identity")
METADATA = {"classes": '["zero", "größe"]', "mean": "[0.5]", "latency_ms": "29.9"}


@cache
def digits(n: int, split: str = "test") -> RealImages:
    """Return digits from the test or training images."""
    data = load_data(parse_data_spec("digits"), resolution_px=PX)
    pixels, labels = sample_images(getattr(data, split), n)
    return RealImages(pixels, labels, data.mean, data.std, f"{n} digits")


@cache
def trained(norm: str = "layernorm") -> Product:
    """Return a network that classifies most digits correctly."""
    space = parse_space(TINY_SPACE.replace("norm: layernorm", f"norm: {norm}"), "tiny.yaml")
    return _trained(space, Arch(CHOICES))


@cache
def trained_wired() -> Product:
    """Return a network with each block that is no chain, which classifies most digits correctly."""
    space = wired_space()
    return _trained(space, every_candidate(space))


def _trained(space: SearchSpace, arch: Arch) -> Product:
    torch.manual_seed(0)
    network = build_subnet(space, arch, 10)
    data = digits(1000, "train")
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for step in range(60):
        places = [(100 * step + i) % len(data) for i in range(100)]
        loss = F.cross_entropy(network(data.take(places)), data.labels[places])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    for norm_layer in network.modules():
        if isinstance(norm_layer, nn.BatchNorm2d):
            assert norm_layer.running_mean is not None
            assert norm_layer.running_mean.abs().max() > 0  # so that to forget it shows
    return Product(
        "qnas_tiny",
        network.eval(),
        lower(space, arch, resolution_px=PX, classes=10),
        tuple(str(i) for i in range(10)),
        data.mean,
        data.std,
        3,
        PX,
        METADATA,
        calibration=digits(128, "train"),
    )


def neural_space(norm: str) -> SearchSpace:
    """Return a space whose positions may hold any neuron, and as many positions as neurons."""
    content = {
        "schema": "qnas.space/1",
        "name": "neurons",
        "source": "made for tests",
        "input": {"channels": 3, "resolution_px": 32},
        "norm": norm,
        "activation": "gelu",
        "stem": {"channels": 8, "kernel": 2, "stride": 2},
        "transition": "conv",
        "candidates": [{"block": "quadra", "neuron": list(NEURONS), "kernel": 5, "expansion": 2}],
        "stages": [{"channels": 8, "positions": len(NEURONS), "stride": 1}],
        "head": {"classes": 10},
    }
    return parse_space(json.dumps(content), "neurons.yaml")


# QuadraBlocks with norms and activations of their own; the scale behind a square stays
NORMED = tuple(
    {"block": "quadra", "kernel": kernel, "expansion": 2, **words}
    for kernel, words in (
        (3, {"norm": "layernorm", "act": "relu6"}),
        (5, {"norm": "batchnorm", "act": "hswish"}),
        (3, {"norm": "scale"}),
        (5, {"norm": "scale", "act": "relu6", "neuron": "linear"}),
        (3, {"norm": "scale", "act": "relu6", "neuron": "factored"}),
        (3, {"norm": "scale", "act": "relu", "neuron": "type3"}),
        (3, {"norm": "batchnorm", "act": "relu6", "neuron": "factored"}),
        (3, {"norm": "layernorm", "act": "hswish", "neuron": "fan"}),
    )
)


def normed_product(norm: str) -> tuple[Product, SearchSpace, Arch]:
    """Return an untrained network of QuadraBlocks with norms and activations of their own."""
    content = neural_space(norm).written() | {"name": "normed", "candidates": NORMED}
    content["stages"] = [{"channels": 8, "positions": len(NORMED), "stride": 1}]
    space = parse_space(json.dumps(content), "normed.yaml")
    arch = every_candidate(space)
    return product_of(space, arch, space.input.resolution_px), space, arch


# the blocks whose layers are no chain; the first stage with every activation that a candidate may choose
WIRED = (
    *({"block": "star", "kernel": 3, "expansion": 3, "mixers": m} for m in ("double", "single")),
    {"block": "mbconv", "kernel": 5, "expansion": 2, "neuron": "factored"},
    {"block": "mbconv", "kernel": 3, "expansion": 1, "neuron": "factored", "attention": "se"},
    {"block": "mbconv", "kernel": 3, "expansion": 2, "attention": "se", "act": "hswish"},
    {"block": "mbconv", "kernel": 3, "expansion": 2, "neuron": "factored", "act": "gelu"},
    {"block": "quadra", "kernel": 3, "expansion": 2, "neuron": "factored"},
)


def wired_space(activation: str = "relu6") -> SearchSpace:
    """Return a space of star blocks and of inverted residuals with options; two change the shape."""
    content = {
        "schema": "qnas.space/1",
        "name": "wired",
        "source": "made for tests",
        "input": {"channels": 3, "resolution_px": 32},
        "norm": "batchnorm",
        "activation": activation,
        "stem": {"channels": 8, "kernel": 3, "stride": 2, "activation": True},
        "transition": "block",
        "candidates": WIRED,
        "stages": [
            {"channels": 8, "positions": len(WIRED), "stride": 1},
            {"channels": 16, "positions": 1, "stride": 2, "candidates": [WIRED[2]]},
            {"channels": 16, "positions": 1, "stride": 1, "candidates": [WIRED[0]]},
            {"channels": 24, "positions": 1, "stride": 2, "candidates": [WIRED[4]]},
        ],
        "head": {"classes": 10},
    }
    return parse_space(json.dumps(content), "wired.yaml")


def wired_product(activation: str = "relu6") -> tuple[Product, SearchSpace, Arch]:
    """Return an untrained network with each of these blocks, its space and architecture."""
    space = wired_space(activation)
    arch = every_candidate(space)
    return product_of(space, arch, space.input.resolution_px), space, arch


def every_candidate(space: SearchSpace) -> Arch:
    """Return a network with the candidates of its positions in turn."""
    return Arch(tuple(p.names[i % len(p.names)] for i, p in enumerate(space.positions)))


def settled(space: SearchSpace, arch: Arch) -> nn.Sequential:
    """Return a network whose norms do something, so that none folds away unseen."""
    torch.manual_seed(0)
    network = build_subnet(space, arch, 10)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            nn.init.normal_(norm.running_mean, std=0.1)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):  # equal scales would be written as one number
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)
            elif isinstance(norm, LayerScale):
                norm.weight.uniform_(-1.5, 1.5)
    return network.eval()


def neural_product(norm: str) -> tuple[Product, SearchSpace, Arch]:
    space = neural_space(norm)
    arch = all_candidates(space)
    return product_of(space, arch, space.input.resolution_px), space, arch


def product_of(space: SearchSpace, arch: Arch, px: int) -> Product:
    """Return an untrained network of ten classes for export."""
    blocks = lower(space, arch, resolution_px=px, classes=10)
    network = settled(space, arch)
    return replace(
        trained(), network=network, blocks=blocks, resolution_px=px, calibration=digits(128, "train").at(px)
    )
