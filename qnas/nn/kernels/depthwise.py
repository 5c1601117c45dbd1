"""The C++ kernel of a depthwise convolution's gradients, as a plain function of tensors.

Tensors are float32 on the CPU, maps in channels_last memory; inputs in another format are copied into it.
Results are bitwise the same for any number of threads (`torch.get_num_threads`). No autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qnas.nn.kernels import native

KERNELS, STRIDES = (3, 5, 7, 9), (1, 2)


def is_supported(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return whether the kernel is available and serves these tensors and this stride."""
    is_served = weight.shape[-1] in KERNELS and stride in STRIDES and x.numel() > 0
    is_float = x.dtype == weight.dtype == torch.float32
    return is_served and is_float and x.is_cpu and native.library() is not None


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, needed: Sequence[bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and the weights; None for those not `needed`.

    x: (B, C, H, W); weight: (C, 1, k, k), for a convolution padded by k // 2; grad: (B, C, H', W') of its
    result, H' = ceil(H / stride).
    """
    kernel, (height, width) = weight.shape[-1], x.shape[2:]
    expected = (*x.shape[:2], -(-height // stride), -(-width // stride))
    assert weight.shape == (x.shape[1], 1, kernel, kernel), f"{tuple(weight.shape)} for {tuple(x.shape)}"
    assert grad.shape == expected, f"grad must be {expected}, got {tuple(grad.shape)}"
    grad, x = (each.contiguous(memory_format=torch.channels_last) for each in (grad, x))
    to_x = torch.empty_like(x) if needed[0] else None
    to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    sizes = (*x.shape, kernel, stride)
    native.call("qnas_depthwise_backward", sizes, 0.0, [x, weight.contiguous(), grad], [to_x, to_weight])
    return to_x, to_weight
