"""Networks whose latency at batch 1 on an A100 is published, as operators in running order.

OVERLAPPED were timed by TensorRT 8, which launches kernels ahead of the GPU:

- the float baselines of NVIDIA's toolkit for quantisation (NVIDIA/TensorRT, tools/tensorflow-quantization,
  the READMEs of its examples, Apache-2.0), on Keras' networks;
- GPUNet in float16 (NVIDIA/DeepLearningExamples, PyTorch/Classification/GPUNet, README and configs; the code
  is Apache-2.0);
- YOLOv8's classifiers in float16 (the table of Ultralytics' documentation, "Speed A100 TensorRT").

EAGER were timed with every operator launched by Python or TensorFlow: the TensorFlow baselines of the same
toolkit, and EfficientNets by PyTorch with TF32 (NVIDIA/DeepLearningExamples,
PyTorch/Classification/ConvNets/efficientnet, README: images a second at batch 1).

Activations are written as `relu`: all of them pass once over their map.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from qnas.latency.kernels import Kernel
from qnas.latency.public_networks import public_networks

Operators = tuple[Kernel, ...]


@dataclass(frozen=True)
class TimedNetwork:
    """A network with its published latency at batch 1.

    `tensor_cores`: its products ran on tensor cores, in float16 or TF32.
    """

    name: str
    family: str
    latency_ms: float
    operators: Operators
    tensor_cores: bool = False


def _conv(
    px: int, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, *, active: bool = True
) -> Operators:
    """Return a convolution with its norm, and its activation."""
    out_px = -(-px // stride)
    norm = Kernel("bn", out_px, c_out, c_out)
    ops = (Kernel("conv", px, c_in, c_out, kernel, stride), norm)
    return (*ops, Kernel("relu", out_px, c_out, c_out)) if active else ops


def _depthwise(px: int, channels: int, kernel: int, stride: int = 1) -> Operators:
    conv = Kernel("dwconv", px, channels, channels, kernel, stride)
    return (conv, *_conv(px, channels, channels, kernel, stride)[1:])


def _head(px: int, channels: int) -> Operators:
    return Kernel("gap", px, channels, channels), Kernel("linear", 1, channels, 1000)


def resnet(depths: Iterable[int]) -> Operators:
    """Return Keras' ResNet v1 (arXiv 1512.03385): strides are in the first 1x1 convolution of a stage."""
    ops = [*_conv(224, 3, 64, 7, 2), Kernel("maxpool", 112, 64, 64, 3, 2)]
    px, c = 56, 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            out_px = px // stride
            if not block:
                ops += _conv(px, c, 4 * width, 1, stride, active=False)
            ops += _conv(px, c, width, 1, stride) + _conv(out_px, width, width, 3)
            ops += _conv(out_px, width, 4 * width, active=False)
            px, c = out_px, 4 * width
            ops += [Kernel("add", px, c, c), Kernel("relu", px, c, c)]
    return (*ops, *_head(px, c))


def resnet_v2(depths: Iterable[int]) -> Operators:
    """Return Keras' ResNet v2 (arXiv 1603.05027): strides are in the last block of a stage."""
    ops = [Kernel("conv", 224, 3, 64, 7, 2), Kernel("maxpool", 112, 64, 64, 3, 2)]
    px, c = 56, 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage < 3 and block == depth - 1 else 1
            out_px = px // stride
            ops += [Kernel("bn", px, c, c), Kernel("relu", px, c, c)]
            if not block:
                ops.append(Kernel("conv", px, c, 4 * width))
            elif stride > 1:
                ops.append(Kernel("maxpool", px, c, c, 1, stride))
            ops += _conv(px, c, width) + _conv(px, width, width, 3, stride)
            px, c = out_px, 4 * width
            ops += [Kernel("conv", px, width, c), Kernel("add", px, c, c)]
    return (*ops, Kernel("bn", px, c, c), Kernel("relu", px, c, c), *_head(px, c))


def mobilenet_v1() -> Operators:
    """Return MobileNet v1 (arXiv 1704.04861)."""
    ops, px, c = [*_conv(224, 3, 32, 3, 2)], 112, 32
    wide = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * [(512, 1)], (1024, 2), (1024, 1)]
    for c_out, stride in wide:
        ops += _depthwise(px, c, 3, stride)
        px //= stride
        ops += _conv(px, c, c_out)
        c = c_out
    return (*ops, *_head(px, c))


def mobilenet_v2() -> Operators:
    """Return MobileNet v2 (arXiv 1801.04381)."""
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
    ops, px, c = [*_conv(224, 3, 32, 3, 2)], 112, 32
    for expansion, c_out, depth, stride in (*rows, (6, 320, 1, 1)):
        for block in range(depth):
            part, px = inverted(px, c, c_out, 3, 1 if block else stride, expansion * c)
            ops += part if expansion > 1 else part[len(_conv(px, c, c)) :]
            c = c_out
    return (*ops, *_conv(px, c, 1280), *_head(px, 1280))


def inverted(
    px: int, c_in: int, c_out: int, kernel: int, stride: int, hidden: int, squeezed: int = 0
) -> tuple[Operators, int]:
    """Return an inverted residual, with a squeeze-and-excitation of so many channels, and its resolution."""
    ops = _conv(px, c_in, hidden)
    ops += _depthwise(px, hidden, kernel, stride)
    px = -(-px // stride)
    ops += _gate(px, hidden, squeezed) + _conv(px, hidden, c_out, active=False)
    if stride == 1 and c_in == c_out:
        ops += (Kernel("add", px, c_out, c_out),)
    return ops, px


def _gate(px: int, channels: int, squeezed: int) -> Operators:
    """Return a squeeze-and-excitation; none of 0 channels."""
    if not squeezed:
        return ()
    return (
        Kernel("gap", px, channels, channels),
        Kernel("conv", 1, channels, squeezed),
        Kernel("relu", 1, squeezed, squeezed),
        Kernel("conv", 1, squeezed, channels),
        Kernel("sigmoid", 1, channels, channels),
        Kernel("scale", px, channels, channels),
    )


def inception_v3() -> Operators:
    """Return Inception v3 (arXiv 1512.00567), its maps cut to whole strides.

    A 1x7 convolution is written as a 7x7 one on a seventh of its channels: as many multiply-adds.
    """
    ops = [*_conv(298, 3, 32, 3, 2), *_conv(147, 32, 32, 3), *_conv(147, 32, 64, 3)]
    ops += [Kernel("maxpool", 146, 64, 64, 3, 2), *_conv(73, 64, 80), *_conv(71, 80, 192, 3)]
    ops.append(Kernel("maxpool", 70, 192, 192, 3, 2))
    px, c = 35, 192

    def chain(*sizes: tuple[int, int]) -> Operators:
        """Return convolutions one after another, each of channels and kernel; of 3 and 7, as above."""
        found: Operators = ()
        before = c
        for c_out, kernel in sizes:
            part = _conv(px, before if kernel > 0 else max(1, before // -kernel), c_out, abs(kernel))
            before, found = c_out, found + part
        return found

    def joined(channels: int) -> int:
        ops.append(Kernel("concat", px, channels, channels))
        return channels

    for pooled in (32, 64, 64):
        ops += chain((64, 1)) + chain((48, 1), (64, 5)) + chain((64, 1), (96, 3), (96, 3))
        ops += (Kernel("avgpool", px, c, c, 3), *chain((pooled, 1)))
        c = joined(224 + pooled)
    ops += _conv(34, c, 384, 3, 2) + chain((64, 1), (96, 3)) + _conv(34, 96, 96, 3, 2)
    ops.append(Kernel("maxpool", 34, c, c, 3, 2))
    px = 17
    c = joined(768)
    for width in (128, 160, 160, 192):
        ops += chain((192, 1)) + chain((width, 1), (width, -7), (192, -7))
        ops += chain((width, 1), (width, -7), (width, -7), (width, -7), (192, -7))
        ops += (Kernel("avgpool", px, c, c, 3), *chain((192, 1)))
        c = joined(768)
    ops += chain((192, 1)) + _conv(16, 192, 320, 3, 2)
    ops += chain((192, 1), (192, -7), (192, -7)) + _conv(16, 192, 192, 3, 2)
    ops.append(Kernel("maxpool", 16, c, c, 3, 2))
    px = 8
    c = joined(1280)
    for _ in range(2):
        ops += chain((320, 1)) + chain((384, 1), (384, -3)) + _conv(px, 128, 384, 3)
        ops += chain((448, 1), (384, 3), (384, -3)) + _conv(px, 128, 384, 3)
        ops += (Kernel("avgpool", px, c, c, 3), *chain((192, 1)))
        c = joined(2048)
    return (*ops, *_head(px, c))


def _divisible(channels: float) -> int:
    """Return channels as a multiple of 8, at most a tenth less."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@dataclass(frozen=True)
class _Row:
    """Equal layers of a GPUNet: a convolution (expansion 0), or inverted residuals.

    `fused`: the expansion has the kernel, and there is no depthwise convolution. `gated`: with
    squeeze-and-excitation of a quarter of the input's channels.
    """

    c_out: int
    kernel: int = 3
    stride: int = 1
    expansion: float = 0
    count: int = 1
    fused: bool = False
    gated: bool = False


def gpunet(px: int, width: int, rows: Iterable[_Row], tail: int, *, distilled: bool = False) -> Operators:
    """Return a GPUNet (arXiv 2205.00841)."""
    ops, c = [*_conv(px, 3, width, 3, 2)], width
    px = -(-px // 2)
    for row in rows:
        for _ in range(row.count):
            hidden = round(c * row.expansion) if distilled else _divisible(c * row.expansion)
            squeezed = round(hidden * 0.25 / row.expansion) if row.gated else 0
            if not row.expansion:
                ops += _conv(px, c, row.c_out, row.kernel, row.stride)
                px = -(-px // row.stride)
            elif row.fused:
                ops += _conv(px, c, hidden, row.kernel, row.stride)
                px = -(-px // row.stride)
                ops += _gate(px, hidden, squeezed) + _conv(px, hidden, row.c_out, active=False)
                if row.stride == 1 and c == row.c_out:
                    ops.append(Kernel("add", px, c, c))
            else:
                part, px = inverted(px, c, row.c_out, row.kernel, row.stride, hidden, squeezed)
                ops += part
            c = row.c_out
    if not distilled:
        return (*ops, *_conv(px, c, tail), *_head(px, tail))
    pooled = (Kernel("gap", px, 1152, 1152), Kernel("conv", 1, 1152, tail), Kernel("relu", 1, tail, tail))
    return (*ops, *_conv(px, c, 1152), *pooled, Kernel("linear", 1, tail, 1000))


def _plain(*rows: tuple[int, int, int, float]) -> tuple[_Row, ...]:
    """Return rows of channels, kernel, stride and expansion."""
    return tuple(_Row(*row) for row in rows)


_GPUNETS: dict[str, tuple[float, Operators]] = {
    "GPUNet-0": (
        0.46,
        gpunet(
            320,
            32,
            (
                _Row(32, count=2),
                _Row(32, 3, 2, 5, fused=True),
                _Row(32, 3, 1, 5, fused=True),
                _Row(64, 3, 2, 5, fused=True),
                _Row(64, 3, 1, 5, 2, fused=True),
                _Row(256, 3, 2, 5),
                _Row(256, 3, 1, 5, 2),
                _Row(704, 3, 2, 5, gated=True),
                _Row(704, 3, 1, 5, gated=True),
            ),
            1280,
        ),
    ),
    "GPUNet-1": (
        0.59,
        gpunet(
            288,
            24,
            (
                _Row(24),
                _Row(64, 3, 2, 4, fused=True),
                _Row(64, 3, 1, 4, fused=True),
                _Row(96, 3, 2, 4, fused=True),
                _Row(96, 3, 1, 4, fused=True),
                _Row(160, 3, 2, 2, gated=True),
                _Row(288, 3, 1, 5, 4),
                _Row(448, 3, 2, 4, gated=True),
                _Row(448, 3, 1, 4, 3, gated=True),
            ),
            1280,
        ),
    ),
    "GPUNet-2": (
        1.25,
        gpunet(
            384,
            32,
            (
                _Row(32, count=3),
                _Row(32, 5, 2, 6, fused=True, gated=True),
                _Row(112, 3, 2, 3, fused=True),
                _Row(112, 3, 1, 3, 2, fused=True),
                _Row(144, 3, 2, 6),
                _Row(144, 3, 1, 6, 5),
                _Row(160, 5, 1, 3, 4),
                _Row(224, 3, 2, 3, gated=True),
                _Row(224, 3, 1, 3, 7, gated=True),
                _Row(832, 5, 1, 2, 7),
            ),
            1280,
        ),
    ),
    "GPUNet-P0": (
        0.45,
        gpunet(
            224,
            32,
            (
                _Row(32, count=2),
                _Row(64, 3, 2),
                _Row(96, 3, 2, 8),
                _Row(96, 3, 1, 7.67, 2),
                *_plain((256, 3, 2, 7.67), (256, 5, 1, 4.25), (256, 3, 1, 4.75), (704, 3, 2, 8)),
                *_plain((704, 5, 1, 3.82), (704, 3, 1, 3.36), (704, 3, 1, 2.55), (704, 3, 2, 5.73)),
            ),
            1984,
        ),
    ),
    "GPUNet-P1": (
        0.61,
        gpunet(
            224,
            32,
            (
                _Row(32, count=2),
                _Row(64, 5, 2),
                _Row(64, 3, 1, 8, 2),
                *_plain((96, 5, 2, 8), (96, 5, 1, 8), (256, 5, 2, 8), (256, 5, 1, 7.5), (256, 3, 1, 7.88)),
                *_plain((704, 5, 2, 7.88), (704, 5, 1, 8), (704, 3, 1, 7.41), (704, 5, 1, 8)),
                *_plain((704, 5, 2, 7.95)),
            ),
            1984,
        ),
    ),
    "GPUNet-D1": (
        0.94,
        gpunet(
            456,
            33,
            (
                *_plain((33, 3, 1, 1), (44, 3, 2, 3), (44, 5, 1, 4), (44, 3, 1, 3), (67, 5, 2, 4)),
                *_plain((67, 5, 1, 4), (67, 3, 1, 6), (67, 5, 1, 3), (134, 7, 2, 6), (134, 5, 1, 6)),
                *_plain((134, 3, 1, 3), (134, 5, 1, 4), (190, 3, 1, 6), (190, 5, 1, 6), (190, 7, 1, 6)),
                *_plain((190, 3, 1, 4), (268, 3, 2, 6), (268, 3, 1, 6), (268, 5, 1, 6)),
                _Row(268, 3, 1, 3, 3),
            ),
            1984,
            distilled=True,
        ),
    ),
    "GPUNet-D2": (
        1.40,
        gpunet(
            528,
            48,
            (
                _Row(48, count=2),
                *_plain((48, 3, 1, 1), (64, 3, 2, 3), (64, 5, 1, 4), (64, 3, 1, 3), (96, 5, 2, 4)),
                *_plain((96, 5, 1, 4), (96, 3, 1, 6), (96, 5, 1, 3), (192, 7, 2, 6), (192, 5, 1, 6)),
                *_plain((192, 3, 1, 3), (192, 5, 1, 4), (192, 5, 1, 4), (272, 3, 1, 6), (272, 5, 1, 6)),
                *_plain((272, 7, 1, 6), (272, 5, 1, 6), (272, 3, 1, 4), (384, 3, 2, 6), (384, 3, 1, 6)),
                *_plain((384, 5, 1, 6)),
                _Row(384, 3, 1, 3, 4),
            ),
            1984,
            distilled=True,
        ),
    ),
}


def yolov8_classifier(width: float, depth: float) -> Operators:
    """Return a classifier of YOLOv8 at 224 px by its factors of width and depth."""
    ops: list[Kernel] = []
    px, c = 224, 3
    for channels, repeats in ((64, 0), (128, 3), (256, 6), (512, 6), (1024, 3)):
        c_out = -(-int(channels * width) // 8) * 8
        ops += _conv(px, c, c_out, 3, 2)
        px, c, count = px // 2, c_out, max(1, round(repeats * depth)) if repeats else 0
        if count:
            half = c // 2
            bottleneck = (*_conv(px, half, half, 3), *_conv(px, half, half, 3), Kernel("add", px, half, half))
            joined = (2 + count) * half
            ops += [*_conv(px, c, c), *count * bottleneck, Kernel("concat", px, joined, joined)]
            ops += _conv(px, joined, c)
    return (*ops, *_conv(px, c, 1280), *_head(px, 1280))


_YOLO = {
    "YOLOv8n-cls": (0.31, 0.25, 0.33),
    "YOLOv8s-cls": (0.35, 0.5, 0.33),
    "YOLOv8m-cls": (0.62, 0.75, 0.67),
    "YOLOv8l-cls": (0.87, 1, 1),
    "YOLOv8x-cls": (1.01, 1.25, 1),
}


def efficientnet(name: str, resolution_px: int) -> Operators:
    """Return the operators of a network of public_networks, where padding is a part of a convolution."""
    known = public_networks()
    (index,) = (
        i
        for i, network in enumerate(known.networks)
        if (network.name, network.resolution_px) == (name, resolution_px)
    )
    return tuple(o.kernel for o in known.sequence(index) if o.kernel.kind != "pad")


_50, _101 = (3, 4, 6, 3), (3, 4, 23, 3)
# name: family, operators, ms by TensorRT (0: not published), on tensor cores, ms by TensorFlow
_TOOLKIT: dict[str, tuple[str, Operators, float, bool, float]] = {
    "MobileNet-v1": ("mobilenet", mobilenet_v1(), 0.32, True, 1.99),
    "MobileNet-v2": ("mobilenet", mobilenet_v2(), 0.55, True, 3.71),
    "ResNet50-v1": ("resnet", resnet(_50), 1.96, False, 7.95),
    "ResNet101-v1": ("resnet", resnet(_101), 3.84, False, 15.92),
    "ResNet50-v2": ("resnetv2", resnet_v2(_50), 2.35, False, 6.16),
    "ResNet101-v2": ("resnetv2", resnet_v2(_101), 4.55, False, 14.13),
    "Inception-v3": ("inception", inception_v3(), 1.39, True, 9.01),
    "EfficientNet-B0": ("efficientnet", efficientnet("tf_efficientnet_b0", 224), 0, False, 6.77),
    "EfficientNet-B3": ("efficientnet", efficientnet("tf_efficientnet_b3", 300), 0, False, 10.33),
}

OVERLAPPED: tuple[TimedNetwork, ...] = (
    *(TimedNetwork(name, "gpunet", ms, ops, True) for name, (ms, ops) in _GPUNETS.items()),
    *(
        TimedNetwork(name, "yolov8", ms, yolov8_classifier(width, depth), True)
        for name, (ms, width, depth) in _YOLO.items()
    ),
    *(
        TimedNetwork(name, family, ms, ops, on_tensor_cores)
        for name, (family, ops, ms, on_tensor_cores, _) in _TOOLKIT.items()
        if ms
    ),
)
EAGER: tuple[TimedNetwork, ...] = (
    *(TimedNetwork(name, family, ms, ops) for name, (family, ops, _, _, ms) in _TOOLKIT.items()),
    TimedNetwork("EfficientNet-B0, PyTorch", "efficientnet", 1e3 / 130, efficientnet("efficientnet_b0", 224)),
    # published at 380 px, shipped at 384
    TimedNetwork("EfficientNet-B4, PyTorch", "efficientnet", 1e3 / 69, efficientnet("efficientnet_b4", 384)),
)
