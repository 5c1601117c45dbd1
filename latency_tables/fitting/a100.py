"""An A100 from its operator timings and its published networks: their work, and batches of 128.

Operators were timed one at a time, each launched by Python: none takes less than 24 to 45 microseconds,
however little it computes, since launching takes that long. What large ones take for each element or
multiply-add beyond that is the work itself (`Grid.beyond`), from which `a100_latency` prices a single image.

In a batch of 128, launches are shared. The published figures are with TF32, whose matrix products were not
timed. Their rate is the one number fitted to networks, the ConvNeXts; their intensity is chosen by the same
from a few. QuadraNet, HorNet and Swin take no part in either, but the form of the model, a roofline for
products and timed passes for all else, was chosen with their errors in sight.

Depthwise convolutions were not timed: they move their maps at the bandwidth that elementwise operators reach.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fitting.fit import scaled
from fitting.operators import MS_PER_ELEMENT
from qnas.latency.device import Figures, KernelModel
from qnas.latency.evaluation import Array, figures
from qnas.latency.features import FEATURES
from qnas.latency.grid import Grid
from qnas.latency.intervals import LEVELS, Uncertainty, pooled, relative_errors
from qnas.latency.kernels import Kernel, fuse_operators
from qnas.spaces.arch import arch_from_indices
from qnas.spaces.lower import layers_of, lower
from qnas.spaces.space import load_space

LAUNCH_MS = 0.003  # of a kernel, which a batch shares: stated, not fitted
BATCH = 128
PRODUCTS = ("linear", "conv")
INTENSITIES = (256, 512, 768, 1024)  # multiply-adds for each element that moves, of which one is chosen
_MOVED = 1e3 * MS_PER_ELEMENT  # ms for a thousand elements

Terms = dict[str, float]


@dataclass(frozen=True)
class PublishedNetwork:
    """A network with its published throughput on an A100."""

    name: str
    family: str
    images_per_s: float
    operators: tuple[Kernel, ...]

    @property
    def ms(self) -> float:
        """Milliseconds an image."""
        return 1e3 / self.images_per_s


def _head(px: int, channels: int) -> tuple[Kernel, ...]:
    return (
        Kernel("gap", px, channels, channels),
        Kernel("ln", 1, channels, channels),
        _rows(1, channels, 1000),
    )


def _rows(rows: int, c_in: int, c_out: int) -> Kernel:
    """Return a linear layer on rows."""
    return Kernel("linear", 1, c_in, c_out, batch=rows)


def _mlp(px: int, channels: int) -> tuple[Kernel, ...]:
    wide = 4 * channels
    return (
        _rows(px**2, channels, wide),
        Kernel("gelu", px, wide, wide),
        _rows(px**2, wide, channels),
    )


def _stages(px: int, widths: Iterable[int]) -> list[tuple[int, int, tuple[Kernel, ...]]]:
    """Return resolution, channels and first operators of each stage of a ConvNeXt or a HorNet."""
    found: list[tuple[int, int, tuple[Kernel, ...]]] = []
    px, before = px // 4, 0
    for channels in widths:
        if not before:
            first = (Kernel("conv", 4 * px, 3, channels, 4, 4), Kernel("ln", px, channels, channels))
        else:
            first = (Kernel("ln", px, before, before), Kernel("conv", px, before, channels, 2, 2))
            px //= 2
        found.append((px, channels, first))
        before = channels
    return found


def convnext(width: int, depths: Iterable[int], px: int) -> tuple[Kernel, ...]:
    """Return the operators of a ConvNeXt (arXiv 2201.03545)."""
    operators: list[Kernel] = []
    for (side, c, first), depth in zip(_stages(px, (width << i for i in range(4))), depths, strict=True):
        block = (
            Kernel("dwconv", side, c, c, 7),
            Kernel("ln", side, c, c),
            *_mlp(side, c),
            Kernel("scale", side, c, c),
            Kernel("add", side, c, c),
        )
        operators += [*first, *depth * block]
    return (*operators, *_head(side, c))


def hornet(width: int, px: int = 224) -> tuple[Kernel, ...]:
    """Return the operators of a HorNet with 7x7 convolutions (arXiv 2207.14284), as benchmarks/hornet.py."""
    operators: list[Kernel] = []
    stages = _stages(px, (width << i for i in range(4)))
    for (side, c, first), order, depth in zip(stages, (2, 3, 4, 5), (2, 3, 18, 2), strict=True):
        widths = [c >> k for k in reversed(range(order))]
        gated = [Kernel("mul", side, widths[0], widths[0])]
        for narrow, wide in pairwise(widths):
            gated += [Kernel("conv", side, narrow, wide), Kernel("mul", side, wide, wide)]
        end = (Kernel("scale", side, c, c), Kernel("add", side, c, c))
        block = (
            Kernel("ln", side, c, c),
            Kernel("conv", side, c, 2 * c),
            Kernel("dwconv", side, sum(widths), sum(widths), 7),
            Kernel("mul_scalar", side, sum(widths), sum(widths)),
            *gated,
            Kernel("conv", side, c, c),
            *end,
            Kernel("ln", side, c, c),
            *_mlp(side, c),
            *end,
        )
        operators += [*first, *depth * block]
    return (*operators, *_head(side, c))


def swin(width: int, depths: Iterable[int], heads: int, px: int, window: int) -> tuple[Kernel, ...]:
    """Return the operators of a Swin (arXiv 2103.14030), with its copies into windows and back."""
    side = px // 4
    operators = [Kernel("conv", px, 3, width, 4, 4), Kernel("ln", side, width, width)]
    for stage, depth in enumerate(depths):
        c, scores = width << stage, (heads << stage) * window**2
        if stage:
            side //= 2
            copied = (Kernel("shuffle", side, 2 * c, 2 * c), Kernel("ln", side, 2 * c, 2 * c))
            operators += [*copied, _rows(side**2, 2 * c, c)]
        for block in range(depth):
            # every second block rolls its map before it cuts it, and masks what the roll has joined
            moves = (1 + block % 2) * (Kernel("shuffle", side, c, c),)
            operators += [
                Kernel("ln", side, c, c),
                *moves,
                _rows(side**2, c, 3 * c),
                Kernel("shuffle", side, 3 * c, 3 * c),
                Kernel("mul_scalar", side, c, c),
                _rows(side**2, c, window**2),
                *(1 + block % 2) * (Kernel("add", side, scores, scores),),
                Kernel("softmax", side, scores, scores),
                _rows(side**2, window**2, c),
                Kernel("shuffle", side, c, c),
                _rows(side**2, c, c),
                *moves,
                Kernel("add", side, c, c),
                Kernel("ln", side, c, c),
                *_mlp(side, c),
                Kernel("add", side, c, c),
            ]
    return (*operators, *_head(side, c))


def quadranet(space: str) -> tuple[Kernel, ...]:
    """Return the operators of a fixed space."""
    found = load_space(space)
    blocks = lower(found, arch_from_indices(found, (0,) * len(found.positions)))
    return tuple(
        Kernel(s.op, s.resolution_px, s.c_in, s.c_out, s.kernel, s.stride) for s in layers_of(blocks)
    )


def _published() -> tuple[PublishedNetwork, ...]:
    """Return the published figures: ConvNeXt's table (with Swin), QuadraNet's table I (with HorNet)."""
    sizes = {"T": (96, 9), "S": (96, 27), "B": (128, 27), "L": (192, 27), "XL": (256, 27)}
    convnexts = {
        224: {"T": 1943.5, "S": 1275.3, "B": 969.0, "L": 611.5, "XL": 424.4},
        384: {"B": 336.6, "L": 211.4, "XL": 147.4},
    }
    found = [
        PublishedNetwork(f"ConvNeXt-{size} {px}", "convnext", rate, convnext(width, (3, 3, deep, 3), px))
        for px, rates in convnexts.items()
        for size, rate in rates.items()
        for width, deep in [sizes[size]]
    ]
    heads = {"T": (96, 6, 3), "S": (96, 18, 3), "B": (128, 18, 4), "L": (192, 18, 6)}
    swins = {(224, 7): {"T": 1325.6, "S": 857.3, "B": 662.8, "L": 435.9}, (384, 12): {"B": 242.5, "L": 157.9}}
    for (px, window), rates in swins.items():
        for size, rate in rates.items():
            width, deep, first = heads[size]
            network = swin(width, (2, 2, deep, 2), first, px, window)
            found.append(PublishedNetwork(f"Swin-{size} {px}", "swin", rate, network))
    quadranets = {"25-T": 2433, "36-T": 1971, "36-S": 1117, "25-B": 1138, "36-B": 892}
    for name, rate in quadranets.items():
        network = quadranet(f"quadranet{name.lower()}")
        found.append(PublishedNetwork(f"QuadraNet{name}", "quadranet", rate, network))
    for size, width, rate in (("T", 64, 1254), ("S", 96, 813), ("B", 128, 641)):
        found.append(PublishedNetwork(f"HorNet-{size}", "hornet", rate, hornet(width)))
    return tuple(found)


PUBLISHED = _published()
FITTED = "convnext"  # the family that gives the rate of matrix products


def moved_terms(*further: str) -> Terms:
    """Return the terms of elements that are read or written once."""
    return dict.fromkeys(("kelements_in", "kelements_out", *further), _MOVED)


def work_of(grids: Mapping[str, Grid], products: Mapping[str, Terms]) -> dict[str, Terms]:
    """Return the terms of each kind: the work that large timed operators show."""
    elements = {kind: 1e3 * grids[kind].beyond["elements"] for kind in ("relu", "gelu", "mul", "add")}
    norm = 1e3 * grids["layernorm"].beyond["rows*channels"]
    terms: dict[str, Terms] = {kind: {"kelements_in": ms} for kind, ms in elements.items()}
    terms |= {"layernorm": {"kelements_in": norm}}
    return terms | {"dwconv": moved_terms("kweights"), "concat": moved_terms(), **products}


def _launched(work: Mapping[str, Terms]) -> dict[str, Terms]:
    """Return the terms of kernels whose launches a batch shares."""
    return {kind: scaled({"launch": LAUNCH_MS / BATCH, **of_kind}, 1) for kind, of_kind in work.items()}


# Kind with a cost -> kinds that were not timed and move as much.
_ALIKE: dict[str, tuple[str, ...]] = {
    "relu": (
        "clip",
        "sigmoid",
        "hsigmoid",
        "swish",
        "hswish",
        "add_scalar",
        "mul_scalar",
        "square",
        "softmax",
    ),
    "add": ("sub", "elementwise"),
    "mul": ("batchnorm",),
    "concat": ("split", "reshape", "transpose", "shuffle", "slice", "maxpool", "avgpool", "gap"),
}
_ROWS = {"conv1x1": "pixel", "patch": "patch"}  # a linear layer with a row for each
# Kind without a cost of its own -> the kind that costs as much.
LIKE: dict[str, str] = {
    **dict.fromkeys(_ROWS, "linear"),
    **{kind: timed for timed, kinds in _ALIKE.items() for kind in kinds},
    "scale": "relu",
}
# What a kind's cost rests on, where no operator of it was timed.
_STANDS_FOR = {
    "dwconv": "input, output and weights once at the 1.3 TB/s that elementwise operators reach",
    "concat": "input and output once at 1.3 TB/s",
    **{kind: f"as {timed}" for kind, timed in LIKE.items() if kind not in _ROWS},
    "scale": "one map in and out, as relu",
}


def note_of(kind: str) -> str:
    """Return what the cost of a kind rests on; empty where it was timed by itself."""
    return f"as linear with a row for every {_ROWS[kind]}" if kind in _ROWS else _STANDS_FOR.get(kind, "")


def kernel_models(terms: Mapping[str, Terms]) -> dict[str, KernelModel]:
    """Return the models of all kinds of kernels, those that were not timed as others that move as much."""
    model = {}
    for kind in sorted({*terms, *LIKE}):
        estimated, note = kind in _STANDS_FOR, note_of(kind)
        cost = {"like": LIKE[kind]} if kind in LIKE else {"terms": terms[kind]}
        model[kind] = KernelModel.model_validate(
            {
                "kind": "estimated" if estimated else "fitted",
                "note": f"not timed: {note}" if estimated else note,
                **cost,
            }
        )
    return model


def throughput_model(grids: Mapping[str, Grid]) -> dict[str, KernelModel]:
    """Return the kernels of one image at BATCH, the rate of matrix products fitted to the FITTED family."""
    seen = [network for network in PUBLISHED if network.family == FITTED]
    measured = np.array([network.ms for network in seen])
    found: dict[float, tuple[str, float]] = {}
    for feature in (f"mmacs_roof_{intensity}" for intensity in INTENSITIES):
        unit, none = (
            kernel_models(_launched(work_of(grids, {kind: {feature: rate} for kind in PRODUCTS})))
            for rate in (1.0, 0.0)
        )
        fixed = predict(none, seen)
        slope = (predict(unit, seen) - fixed) / measured
        left = 1 - fixed / measured
        rate = float(slope @ left / (slope @ slope))
        found[float(np.sum((slope * rate - left) ** 2))] = (feature, rate)
    feature, rate = found[min(found)]
    products = {kind: {feature: rate} for kind in PRODUCTS}
    return kernel_models(_launched(work_of(grids, products)))


def predict(model: Mapping[str, KernelModel], networks: Iterable[PublishedNetwork]) -> Array:
    """Return the milliseconds an image of networks."""

    def of_kernel(kernel: Kernel) -> float:
        cost = model[kernel.kind]
        cost = model[cost.like] if cost.like is not None else cost
        assert cost.terms is not None
        return sum(weight * FEATURES[name](kernel) for name, weight in cost.terms.items())

    return np.array([sum(map(of_kernel, fuse_operators(n.operators, "eager"))) for n in networks])


def published_accuracy(model: Mapping[str, KernelModel]) -> dict[str, dict[str, Figures]]:
    """Return how the throughput model compares with the published figures, by family."""
    accuracy: dict[str, dict[str, Figures]] = {"fitted networks": {}, "unseen family": {}}
    for family in dict.fromkeys(network.family for network in PUBLISHED):
        networks = [network for network in PUBLISHED if network.family == family]
        which = "fitted networks" if family == FITTED else "unseen family"
        accuracy[which][family] = figures(predict(model, networks), [n.ms for n in networks])
    return accuracy


def published_uncertainty(model: Mapping[str, KernelModel]) -> Uncertainty:
    """Return the intervals of the throughput model: its errors on the families that the fit did not see.

    Three families are too few for the higher levels.
    """
    errors = {}
    for family in dict.fromkeys(n.family for n in PUBLISHED if n.family != FITTED):
        networks = [network for network in PUBLISHED if network.family == family]
        measured = np.array([network.ms for network in networks])
        errors[family] = relative_errors(measured, predict(model, networks), np.zeros(len(networks)), 1.0)
    return pooled(
        errors,
        weight=1.0,
        source="published throughputs of families that the fit did not see, each family with the same "
        "weight; the form of the model was chosen with them in sight",
        levels=LEVELS[:2],
    )
