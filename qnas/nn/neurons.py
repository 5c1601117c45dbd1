"""What the mixer of a QuadraBlock computes of its input X: a neuron in depthwise form.

`*` is a depthwise convolution at stride 1, padded to keep the size, `.` and `^2` are elementwise:

    quadranet   (W_a * X) . (W_b * X) + W_c * X                       QuadraNet, arXiv 2311.17956, eq. 6
    linear      W_c * X + b
    type2       W_s * X^2                                             types as counted in QuadraLib,
    type3       (W_a * X)^2                                           MLSys 2022, arXiv 2204.01701
    type4       (W_a * X) . (W_b * X)
    fan         (W_a * X + b_a) . (W_b * X + b_b) + W_s * X^2 + c     Fan et al., arXiv 1704.08362
    compact     W_c * X + W_s * X^2 + b                               ReLinear, arXiv 2110.06081

Fan's w_r, w_g, w_b and b_r, b_g are W_a, W_b, W_s and b_a, b_b here. The compact neuron's two constants
`W_r x + b + W_b x^2 + c` are one, b. QuadraNet's neuron has kernels of its own (`qnas.nn.quadratic`), the
others are torch's operators with the depthwise weight gradient that is fast on CPUs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnas.nn.kernels.lean_quadratic import (
    depthwise,
    depthwise_backward,
    stock_gradients,
    weight_gradient_form,
)
from qnas.nn.quadratic import is_watched, quadratic_conv2d
from qnas.spaces.space import Neuron

Convolution = tuple[Tensor, Tensor | None]  # weights (C, 1, k, k), k odd, and bias (C,)


def quadranet(x: Tensor, a: Convolution, b: Convolution, c: Convolution) -> Tensor:
    """Return (W_a * x) . (W_b * x) + W_c * x + bias; a and b have no bias. (B, C, H, W), as all here."""
    assert a[1] is b[1] is None, "the factors of QuadraNet's neuron have no bias"
    return quadratic_conv2d(x, a[0], b[0], c[0], c[1])


def linear(x: Tensor, c: Convolution) -> Tensor:
    """Return W_c * x + bias."""
    return depthwise_conv2d(x, *c)


def type2(x: Tensor, s: Convolution) -> Tensor:
    """Return W_s * x^2 + bias; the neuron has no bias but that of a folded norm."""
    return depthwise_conv2d(x * x, *s)


def type3(x: Tensor, a: Convolution) -> Tensor:
    """Return (W_a * x + bias)^2; the neuron has no bias."""
    y = depthwise_conv2d(x, *a)
    return y * y


def type4(x: Tensor, a: Convolution, b: Convolution) -> Tensor:
    """Return (W_a * x + bias) . (W_b * x + bias); the neuron has no biases."""
    return depthwise_conv2d(x, *a) * depthwise_conv2d(x, *b)


def fan(x: Tensor, a: Convolution, b: Convolution, s: Convolution) -> Tensor:
    """Return (W_a * x + b_a) . (W_b * x + b_b) + W_s * x^2 + c."""
    return depthwise_conv2d(x, *a) * depthwise_conv2d(x, *b) + depthwise_conv2d(x * x, *s)


def compact(x: Tensor, c: Convolution, s: Convolution) -> Tensor:
    """Return W_c * x + W_s * x^2 + bias, which either convolution may have."""
    return depthwise_conv2d(x, *c) + depthwise_conv2d(x * x, *s)


# Each takes x and its convolutions in the order of `lower.MIXERS`.
NEURONS: dict[Neuron, Callable[..., Tensor]] = {
    "quadranet": quadranet,
    "linear": linear,
    "type2": type2,
    "type3": type3,
    "type4": type4,
    "fan": fan,
    "compact": compact,
}


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own weights at stride 1, padded to keep the size.

    x: (B, C, H, W); weight: (C, 1, k, k) with k odd; bias: (C,). On a CPU the weights' gradient is that of
    `lean_quadratic`, where that is faster; where a program is traced or compiled, under autocast and
    elsewhere all is torch's.
    """
    if (
        torch.compiler.is_compiling()
        or not (x.is_cpu and torch.is_grad_enabled())
        or any(type(t) not in (Tensor, nn.Parameter) for t in (x, weight))
        or is_watched()
        or torch.is_autocast_enabled("cpu")
        or weight_gradient_form(x, weight.shape[-1]) is stock_gradients
    ):
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    y: Tensor = _Depthwise.apply(x, weight, bias)
    return y


class _Depthwise(torch.autograd.Function):
    """The convolution in eager mode on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return depthwise(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        bias = grad.sum((0, 2, 3)) if needed[2] else None
        if torch.is_grad_enabled():  # create_graph: only torch's operators can be differentiated again
            wanted = [t for t, is_needed in zip((x, weight), needed[:2], strict=True) if is_needed]
            y = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True) if wanted else ())
            return (*(next(found) if is_needed else None for is_needed in needed[:2]), bias)
        with torch.autocast("cpu", enabled=False):  # in the types of the forward pass
            return (*depthwise_backward(grad, x, weight, needed[:2]), bias)
