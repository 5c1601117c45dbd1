"""Depthwise convolutions that train fast on a CPU.

The forward pass is torch's. Its gradient of the weights is slow for kernels of more than three taps across,
so the gradients come from the C++ kernel (`kernels.depthwise`) or, without a compiler, from other forms in
torch's operators (`kernels.lean_quadratic`). benchmarks/block.py compares a training step with torch's own.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnas.nn.kernels import depthwise as native_depthwise
from qnas.nn.kernels.lean_quadratic import depthwise_backward, stock_gradients, weight_gradient_form
from qnas.nn.quadratic import differentiable_gradients, is_watched

Form = Literal["native", "lean", "stock"]

# Places of a map from which on the C++ kernel is faster than torch's with three taps across, at stride 1.
# It takes 0.4 to 0.9 of torch's time there, 1.3 on maps of 8 x 8; 0.1 to 0.5 with more taps.
THREE_TAPS_PLACES = 14 * 14


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Convolve each channel with its own weights, padded by half the kernel.

    x: (B, C, H, W); weight: (C, 1, k, k) with k odd; bias: (C,). The result has ceil(H / stride) rows. Under
    autocast, and when traced or compiled, everything is torch's.
    """
    form = choose_form(x, weight, stride)
    if form == "stock":
        return _stock(x, weight, bias, stride)
    y: Tensor = _Depthwise.apply(form, x, weight, bias, stride)
    return y


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of stride 1 or 2, padded by half its odd kernel, by `depthwise_conv2d`."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, *, bias: bool = True) -> None:
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        return depthwise_conv2d(x, self.weight, self.bias, self.stride[0])


def choose_form(x: Tensor, weight: Tensor, stride: int) -> Form:
    """Return how the gradients are computed: the fastest form that serves these tensors."""
    if (
        torch.compiler.is_compiling()
        or not (x.is_cpu and torch.is_grad_enabled())
        or any(type(t) not in (Tensor, nn.Parameter) for t in (x, weight))
        or is_watched()
        or torch.is_autocast_enabled("cpu")
    ):
        return "stock"
    kernel, places = weight.shape[-1], x.shape[2] * x.shape[3]
    # a single place has a form of its own
    is_faster = places > 1 if kernel > 3 else stride == 1 and places >= THREE_TAPS_PLACES
    if is_faster and native_depthwise.is_supported(x, weight, stride):
        return "native"
    is_lean = stride == 1 and weight_gradient_form(x, kernel) is not stock_gradients
    return "lean" if is_lean else "stock"


def _stock(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    # int: under torch.jit.trace a size is a tensor, which torch 2.8 does not accept as padding
    return F.conv2d(x, weight, bias, stride, int(weight.shape[-1]) // 2, groups=weight.shape[0])


class _Depthwise(torch.autograd.Function):
    """The convolution in eager mode on a CPU, with fast gradients."""

    @staticmethod
    def forward(ctx: Any, form: Form, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.form, ctx.stride = form, stride
        ctx.save_for_backward(x, weight)
        return _stock(x, weight, bias, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:3]
        bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        if torch.is_grad_enabled():  # create_graph: only torch's operators have second derivatives
            y = _stock(x, weight, None, ctx.stride)
            return (None, *differentiable_gradients(y, (x, weight), grad, needed), bias, None)
        if ctx.form == "native":
            return (None, *native_depthwise.backward(grad, x, weight, ctx.stride, needed), bias, None)
        with torch.autocast("cpu", enabled=False):  # keep the dtypes of the forward pass
            return (None, *depthwise_backward(grad, x, weight, needed), bias, None)
