"""The neurons of a QuadraBlock's mixer as functions of tensors.

`qnas.spaces.neurons` has their formulas. QuadraNet's neuron has its own kernels (`qnas.nn.quadratic`). The
others use torch's operators, with a depthwise weight gradient that is fast on CPUs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnas.nn.kernels.lean_quadratic import (
    depthwise,
    depthwise_backward,
    stock_gradients,
    weight_gradient_form,
)
from qnas.nn.quadratic import differentiable_gradients, is_watched, quadratic_conv2d
from qnas.spaces.neurons import DEFAULT_NEURON, NEURONS

Convolution = tuple[Tensor, Tensor | None]  # weights (C, 1, k, k), k odd, and bias (C,)


def run_neuron(name: str, x: Tensor, convolutions: Sequence[Convolution]) -> Tensor:
    """Compute a neuron: (B, C, H, W) -> (B, C, H, W). The convolutions are in the order of its roles."""
    if name == DEFAULT_NEURON:
        a, b, c = convolutions
        assert a[1] is b[1] is None, "the factors of QuadraNet's neuron have no bias"
        return quadratic_conv2d(x, a[0], b[0], c[0], c[1])
    calls = [partial(depthwise_conv2d, weight=weight, bias=bias) for weight, bias in convolutions]
    return cast(Tensor, NEURONS[name].formula(x, *calls))


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own weights at stride 1, padded to keep the size.

    x: (B, C, H, W); weight: (C, 1, k, k) with k odd; bias: (C,). On a CPU, the weight gradient is computed by
    `lean_quadratic` where that is faster. Otherwise, under autocast, and when traced or compiled, everything
    is torch's.
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
    """The convolution in eager mode on a CPU, with a fast weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return depthwise(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        bias = grad.sum((0, 2, 3)) if needed[2] else None
        if torch.is_grad_enabled():  # create_graph: only torch's operators have second derivatives
            y = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
            return (*differentiable_gradients(y, (x, weight), grad, needed[:2]), bias)
        with torch.autocast("cpu", enabled=False):  # keep the dtypes of the forward pass
            return (*depthwise_backward(grad, x, weight, needed[:2]), bias)
