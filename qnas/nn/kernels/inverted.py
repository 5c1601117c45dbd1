"""The C++ kernels of an inverted residual in training, as plain functions of tensors, and its plain form.

y = [x +] N3(PW2(A(N2(DW(A(N1(PW1(x)))))))), with batch norms N that use the statistics of the batch, a
depthwise convolution DW and an activation A. A block without an expansion begins with DW. The forward pass
keeps the maps before the norms; the backward pass recomputes the rest. Tensors are float32 on the CPU, maps
in channels_last memory; inputs in another format are copied into it. Results are bitwise the same for any
number of threads (`torch.get_num_threads`). No autograd.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.nn.kernels import native

KERNELS, STRIDES = (3, 5, 7, 9), (1, 2)

# the activations and their numbers in C++
ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "relu6": (0, F.relu6),
    "relu": (1, F.relu),
    "hswish": (2, F.hardswish),
}


class Weights(NamedTuple):
    """The parameters of the convolutions, (E, C, 1, 1), (E, 1, k, k) and (C', E, 1, 1), and of the norms.

    Without an expansion, E is C, and the first three are None.
    """

    expand: Tensor | None
    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    depthwise: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    project: Tensor
    norm3_weight: Tensor
    norm3_bias: Tensor


ABSENT = ("expand", "norm1_weight", "norm1_bias")  # without an expansion


@dataclass(frozen=True)
class Options:
    """What is not in the tensors' shapes."""

    stride: int
    padding: tuple[int, int]  # rows above and columns left of the map; the result has ceil(H / stride) rows
    activation: str  # of ACTIVATIONS
    eps: float
    is_residual: bool


class Kept(NamedTuple):
    """What the backward pass needs: maps before the norms in a layout of the kernels' own, and statistics.

    A mean and a biased variance are those of a norm's channels. Without an expansion, h1 and its are None.
    """

    h1: Tensor | None
    h2: Tensor
    h3: Tensor
    mean1: Tensor | None
    variance1: Tensor | None
    mean2: Tensor
    variance2: Tensor
    mean3: Tensor
    variance3: Tensor


def is_supported(x: Tensor, weights: Weights, options: Options) -> bool:
    """Return whether the kernels are available and serve these tensors, which must fit one another."""
    return (
        weights.depthwise.shape[-1] in KERNELS
        and options.stride in STRIDES
        and options.activation in ACTIVATIONS
        and x.numel() > 0
        and all(t is None or (t.is_cpu and t.dtype == torch.float32) for t in (x, *weights))
        and native.library() is not None
    )


def forward(x: Tensor, weights: Weights, options: Options) -> tuple[Tensor, Kept]:
    """Return y and what the backward pass needs.

    x: (B, C, H, W); y: (B, C', ceil(H / stride), ceil(W / stride)).
    """
    sizes, shape = _sizes(x, weights, options)
    batch, c_out, height, width = shape
    places_in, places_out = x.numel() // x.shape[1], batch * height * width
    hidden = len(weights.depthwise)
    y = x.new_empty(batch, height, width, c_out).permute(0, 3, 1, 2)
    h1 = None if weights.expand is None else _grouped(x, hidden, places_in)
    h2, h3 = _grouped(x, hidden, places_out), _grouped(x, c_out, places_out)
    of_h1 = (None, None) if h1 is None else (x.new_empty(hidden), x.new_empty(hidden))
    kept = Kept(h1, h2, h3, *of_h1, *(x.new_empty(c) for c in (hidden, hidden, c_out, c_out)))
    inputs = [_dense(x), *_contiguous(weights)]
    native.call("qnas_inverted_forward", sizes, options.eps, inputs, [y, *kept])
    return y, kept


def backward(
    grad: Tensor, x: Tensor, weights: Weights, options: Options, kept: Kept, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and the weights; None for those not `needed`.

    grad: that of y. `needed`: for x and each of the weights.
    """
    sizes, shape = _sizes(x, weights, options)
    assert grad.shape == shape, f"grad must be {shape}, got {tuple(grad.shape)}"
    x, inputs = _dense(x), _contiguous(weights)
    outputs = [
        # the gradients of norms are sums that the others need
        torch.empty_like(t, memory_format=torch.preserve_format if t is x else torch.contiguous_format)
        if t is not None and (is_needed or t.ndim == 1)
        else None
        for t, is_needed in zip((x, *inputs), needed, strict=True)
    ]
    arguments = [x, *inputs, *kept, _dense(grad)]
    native.call("qnas_inverted_backward", sizes, options.eps, arguments, outputs)
    return tuple(t if is_needed else None for t, is_needed in zip(outputs, needed, strict=True))


def reference(x: Tensor, weights: Weights, options: Options) -> Tensor:
    """Compute y in torch's operators, on any device and in any floating dtype."""
    activate = ACTIVATIONS[options.activation][1]

    def normalise(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(h, None, None, weight, bias, training=True, eps=options.eps)

    h = x
    if weights.expand is not None:
        h = activate(normalise(F.conv2d(x, weights.expand), weights.norm1_weight, weights.norm1_bias))
    kernel, stride = weights.depthwise.shape[-1], options.stride
    # rows and columns of padding on both sides, as many as the last windows reach over the map
    around = []
    for size, before in zip(x.shape[:1:-1], options.padding[::-1], strict=True):
        around += [before, (-(-size // stride) - 1) * stride + kernel - size - before]
    h = F.conv2d(F.pad(h, around), weights.depthwise, stride=stride, groups=len(weights.depthwise))
    h = activate(normalise(h, weights.norm2_weight, weights.norm2_bias))
    y = normalise(F.conv2d(h, weights.project), weights.norm3_weight, weights.norm3_bias)
    return x + y if options.is_residual else y


def _sizes(x: Tensor, weights: Weights, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the shapes; return the sizes as the kernels take them, and y's shape."""
    batch, channels, height, width = x.shape
    hidden, c_out, kernel = len(weights.depthwise), len(weights.project), weights.depthwise.shape[-1]
    has_expand = weights.expand is not None
    assert has_expand or hidden == channels, f"{hidden} hidden channels for {channels} without an expansion"
    expected: dict[str, tuple[int, ...]] = {
        "expand": (hidden, channels, 1, 1),
        **dict.fromkeys(("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"), (hidden,)),
        "depthwise": (hidden, 1, kernel, kernel),
        "project": (c_out, hidden, 1, 1),
        **dict.fromkeys(("norm3_weight", "norm3_bias"), (c_out,)),
    }
    for name, tensor in weights._asdict().items():
        wanted = expected[name] if has_expand or name not in ABSENT else None
        found = None if tensor is None else tuple(tensor.shape)
        assert found == wanted, f"{name} must be {wanted}, got {found}"
    stride = options.stride
    shape = (batch, c_out, -(-height // stride), -(-width // stride))
    assert not options.is_residual or shape == tuple(x.shape), "a residual block keeps its shape"
    widths = (channels, hidden, c_out)
    flags = (ACTIVATIONS[options.activation][0], int(has_expand), int(options.is_residual))
    return (batch, height, width, *widths, kernel, stride, *options.padding, *flags), shape


def _grouped(x: Tensor, channels: int, places: int) -> Tensor:
    """Return memory for a map as (groups of channels, places, lanes)."""
    library = native.library()
    assert library is not None
    return x.new_empty(-(-channels // library.lanes) * places * library.lanes)


def _contiguous(weights: Weights) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in weights]


def _dense(x: Tensor) -> Tensor:
    """Return x in dense channels_last memory, copied if necessary.

    The strides are compared, since torch leaves them ambiguous for maps of one position or one channel.
    """
    _, channels, height, width = x.shape
    if x.stride() == (height * width * channels, 1, width * channels, channels):
        return x
    return x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
