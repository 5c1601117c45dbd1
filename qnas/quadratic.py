"""The quadratic depthwise convolution: Y = (W_a * X) . (W_b * X) + W_c * X.

`*` is a depthwise convolution and `.` the elementwise product (QuadraNet, arXiv 2311.17956, eq. 6
and 7). `quadratic_conv2d_reference` is three convolutions under torch's own autograd: what is
exported and what faster forms are compared with. `quadratic_conv2d` has a backward pass of its own,
since torch's depthwise weight gradient on a CPU takes many times the forward pass for kernels of 5
and more (benchmarks/quadratic.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below these the stock weight gradient is the faster one (benchmarks/quadratic.py).
FAST_KERNEL = 5
FAST_MAP = 4  # height and width
CHUNK_ELEMENTS = 1 << 20  # of the folded input; larger ones fall out of the cache


def quadratic_conv2d(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the quadratic depthwise convolution at stride 1, padded to keep the size.

    x: (B, C, H, W); weights: (C, 1, k, k) with k odd; bias: (C,), added at the end. Returns (B, C, H, W).
    The gradient itself is not differentiable.
    """
    channels, kernel = w_a.shape[0], w_a.shape[-1]
    assert w_a.shape == w_b.shape == w_c.shape == (channels, 1, kernel, kernel), (
        "weights must be (C, 1, k, k)"
    )
    assert kernel % 2 == 1, f"kernel must be odd, got {kernel}"
    # compilers and exporters see the convolutions; so does whatever needs no gradient
    if x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        reach = 2 * max(x.shape[2:]) - 1  # what lies beyond meets nothing but padding
        cut = max(0, (kernel - reach) // 2)
        if cut:
            w_a, w_b, w_c = (w[..., cut:-cut, cut:-cut] for w in (w_a, w_b, w_c))
        y: Tensor = _QuadraticConv2d.apply(x, w_a, w_b, w_c)
        return y if bias is None else y + bias[:, None, None]
    return quadratic_conv2d_reference(x, w_a, w_b, w_c, bias)


def quadratic_conv2d_reference(
    x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute the same as `quadratic_conv2d` by its definition, under torch's own autograd."""
    return _depthwise(x, w_a) * _depthwise(x, w_b) + _depthwise(x, w_c, bias)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class _QuadraticConv2d(torch.autograd.Function):
    """Three convolutions forward; backward the faster of two weight gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor) -> Tensor:
        a, b = _depthwise(x, w_a), _depthwise(x, w_b)
        ctx.save_for_backward(x, w_a, w_b, w_c, a, b)
        return torch.addcmul(_depthwise(x, w_c), a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_a, w_b, w_c, a, b = ctx.saved_tensors
        outer = (grad * b, grad * a, grad)  # gradients of the three convolutions' outputs
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            # the transpose of a padded stride-1 convolution is the convolution with the flipped kernel
            parts = [_depthwise(g, w.flip(2, 3)) for g, w in zip(outer, (w_a, w_b, w_c), strict=True)]
            grad_x = parts[0].add_(parts[1]).add_(parts[2])
        grads_w = (
            _weight_gradient(x, g, w) if needed else None
            for g, w, needed in zip(outer, (w_a, w_b, w_c), ctx.needs_input_grad[1:], strict=True)
        )
        return (grad_x, *grads_w)


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of a depthwise weight (C, 1, k, k) from x and grad, (B, C, H, W) both."""
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    if kernel < FAST_KERNEL or min(height, width) < FAST_MAP or batch == 0:
        padding, mask = [kernel // 2] * 2, [False, True, False]
        stock = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], channels, mask
        )
        result: Tensor = stock[1]
        return result
    # As a forward convolution: every channel of every image is a channel, its gradient the kernel.
    images = max(1, CHUNK_ELEMENTS // (channels * height * width))
    total = x.new_zeros(channels, 1, kernel, kernel)
    for start in range(0, batch, images):
        part, part_grad = (t[start : start + images].contiguous() for t in (x, grad))
        folded = len(part) * channels
        sums = F.conv2d(
            part.view(1, folded, height, width),
            part_grad.view(folded, 1, height, width),
            padding=kernel // 2,
            groups=folded,
        )  # (1, B C, k, k) for odd k
        total += sums.view(-1, channels, 1, kernel, kernel).sum(0)
    return total
